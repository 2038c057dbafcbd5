"""python -m nemo_trd.evaluate: see main.py."""

import sys

from nemo_trd.evaluate.main import main

if __name__ == "__main__":
    sys.exit(main())
