"""Root filesystems made of this machine's files, in place of base images that cannot be had here.

One holds a Python environment as NVIDIA's image has it (/opt/venv), with the real packages of this
one hard-linked from it, without those that the Dockerfile must add.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TOOLS = ("bash", "sh", "env", "id", "install", "cat", "ls", "mkdir", "rm", "uname", "bwrap")
SITE_PACKAGES = f"opt/venv/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
UNUSED = {"..", "__pycache__", "include", "tests"}
# Instead of an index to ask, the image has wheels inside.
PIP_CONF = "[global]\nno-index = true\nfind-links = /opt/wheels\n"
CONSTRAINTS = "packaging==1.0\nomegaconf==1.0\n"  # as NVIDIA's: about what the base has


def closure(names: Iterable[str]) -> set[str]:
    """Normalised names of these distributions and of what they need, as far as installed here."""
    found: set[str] = set()
    waiting = [(name, "") for name in names]
    seen = set(waiting)
    while waiting:
        name, extra = waiting.pop()
        try:
            needs = [Requirement(text) for text in requires(name) or []]
        except PackageNotFoundError:  # CUDA packages, for example
            continue
        found.add(canonicalize_name(name))
        for need in needs:
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                new = {(need.name, wanted) for wanted in ("", *need.extras)} - seen
                seen |= new
                waiting += new
    return found


def make_root(root: Path, names: Iterable[str], wheels: Path) -> None:
    """Fill `root` with tools, Python, and the distributions `names`."""
    for directory in ("tmp", "proc", "dev", "sys", "etc/pip", "root", "opt/venv/bin", "usr"):
        (root / directory).mkdir(parents=True, exist_ok=True)
    (root / "tmp").chmod(0o1777)
    for link in ("bin", "lib", "lib64", "sbin"):
        (root / "usr" / link).mkdir()
        (root / link).symlink_to(f"usr/{link}")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/bash\n")
    (root / "etc/group").write_text("root:x:0:\n")
    (root / "etc/pip.conf").write_text(PIP_CONF)
    (root / "etc/pip/constraint.txt").write_text(CONSTRAINTS)
    shutil.copytree(wheels, root / "opt/wheels")

    python = Path(sys._base_executable).resolve()  # type: ignore[attr-defined]
    stdlib = Path(sysconfig.get_path("stdlib"))
    copy_tree(stdlib, root, without={"site-packages", "dist-packages", "test", "idlelib"})
    programs = [Path(found).resolve() for tool in TOOLS if (found := shutil.which(tool))]
    for program in (python, *programs):
        link_file(program, root)
    for tool in TOOLS:
        target = root / "usr/bin" / tool
        if not target.exists():
            target.symlink_to(Path(shutil.which(tool) or tool).resolve())

    venv = root / "opt/venv"
    (venv / "bin/python3").symlink_to(python)
    (venv / "pyvenv.cfg").write_text(f"home = {python.parent}\n")
    for name in names:
        link_distribution(name, root / SITE_PACKAGES)
    objects = [python, *programs, *stdlib.glob("lib-dynload/*.so")]
    objects += [path for path in (root / SITE_PACKAGES).rglob("*.so*") if path.is_file()]
    for library in system_libraries(objects, root):
        link_file(library, root)


def link_file(path: Path, root: Path) -> None:
    """The same path below `root`; what a symbolic link points to is put in its place."""
    target = root / str(path).lstrip("/")
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    link(path.resolve(), target)


def link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def copy_tree(source: Path, root: Path, without: set[str]) -> None:
    """`source` at the same path below `root`."""
    for directory, names, files in os.walk(source):
        names[:] = [name for name in names if name not in without | {"__pycache__"}]
        for file in files:
            link_file(Path(directory, file), root)


def link_distribution(name: str, site_packages: Path) -> None:
    """The files of an installed distribution that a program which imports it reads."""
    for file in distribution(name).files or []:
        path = Path(str(file.locate()))
        if not UNUSED.isdisjoint(file.parts) or not path.is_file():
            continue
        target = site_packages / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            link(path, target)


def system_libraries(objects: Iterable[Path], root: Path) -> set[Path]:
    """What these programs and libraries load from outside of `root`, the loader included."""
    done = subprocess.run(["ldd", *map(str, objects)], capture_output=True, text=True, check=False)
    paths = {Path(path) for path in re.findall(r"(/\S+\.so\S*) \(0x", done.stdout)}
    return {path for path in paths if not path.is_relative_to(root)}
