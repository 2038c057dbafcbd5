"""python -m nemo_trd.serve: see main.py."""

import sys

from nemo_trd.serve.main import main

if __name__ == "__main__":
    sys.exit(main())
