"""python -m nemo_trd.plan: see main.py."""

import sys

from nemo_trd.plan.main import main

if __name__ == "__main__":
    sys.exit(main())
