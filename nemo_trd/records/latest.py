"""`latest`: which checkpoint of a directory is current. A link, or else a text file.

Some object and FUSE mounts refuse symbolic links. There `latest` is a file of one line that holds
the same path, relative to the directory that it is in.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from nemo_trd.records.step_lines import write_atomically

NAME = "latest"
# What file systems answer to a call that they do not have.
_NO_LINKS = {errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM, errno.ENOSYS, errno.EINVAL}
_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}
_NO_DIRECTORY_SYNC |= {errno.EACCES, errno.EISDIR}


def point(root: Path, checkpoint: Path) -> None:
    """Let `latest` of `root` lead to a checkpoint below it. A crash leaves the old or the new."""
    target = str(checkpoint.relative_to(root))
    fresh = root / f"{NAME}.partial"
    fresh.unlink(missing_ok=True)
    try:
        fresh.symlink_to(target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        write_atomically(root / NAME, target + "\n")
    else:
        os.replace(fresh, root / NAME)
    sync_directory(root)


def forget(root: Path) -> None:
    """Nothing is current any more."""
    (root / NAME).unlink(missing_ok=True)


def read(root: Path) -> Path | None:
    """Where `latest` leads, whether something is there or not; None without it."""
    there = os.path.lexists(root / NAME) and copied(root) is None
    return follow(root / NAME) if there else None


def copied(root: Path) -> Path | None:
    """A directory in the place of `latest`, as copying with all links followed makes it."""
    place = root / NAME
    return place if place.is_dir() and not place.is_symlink() else None


def follow(path: Path) -> Path:
    """The directory that a path means: a link, or a text file named `latest`, is followed."""
    if path.name == NAME and path.is_file():
        target = path.read_text(encoding="utf-8", errors="replace").strip()
        return Path(os.path.normpath(path.parent / (target or "nowhere")))
    if path.is_symlink():
        return Path(os.path.normpath(path.parent / os.readlink(path)))
    return path


def sync_directory(directory: Path) -> None:
    """Put the names in a directory on the disk, where the file system can do that for a directory.

    What it says of the data of a file (a full disk, a defect) is never passed over: see
    `sync_file`.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError as error:
        if error.errno in _NO_DIRECTORY_SYNC:
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise
    finally:
        os.close(descriptor)


def sync_file(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
