"""python -m nemo_trd.doctor: see main.py."""

import sys

from nemo_trd.doctor.main import main

if __name__ == "__main__":
    sys.exit(main())
