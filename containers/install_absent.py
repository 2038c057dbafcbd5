"""Installs the pinned packages that this interpreter lacks, and nothing that they depend on.

python3 install_absent.py DIRECTORY     with requirements-train.txt and requirements-server.txt
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nemo_trd.doctor.main import role_here


def absent(pins: list[str]) -> list[str]:
    """Those of `name==version` whose package is not installed, in any version."""
    missing = []
    for pin in pins:
        try:
            version(pin.split("==")[0])
        except PackageNotFoundError:
            missing.append(pin)
    return missing


def main(directory: Path) -> None:
    lines = (directory / f"requirements-{role_here()}.txt").read_text().splitlines()
    missing = absent([line for line in lines if not line.startswith("#")])
    print("absent in the base:", *(missing or ["nothing"]))
    if missing:
        pip = [sys.executable, "-m", "pip", "install", "--no-deps"]
        subprocess.run([*pip, *missing], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
