"""python -m nemo_trd.report: see main.py."""

import sys

from nemo_trd.report.main import main

if __name__ == "__main__":
    sys.exit(main())
