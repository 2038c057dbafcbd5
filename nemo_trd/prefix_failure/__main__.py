"""python -m nemo_trd.prefix_failure: see main.py."""

import sys

from nemo_trd.prefix_failure.main import main

if __name__ == "__main__":
    sys.exit(main())
