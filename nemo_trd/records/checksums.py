"""Checksums of the files of a checkpoint: SHA-256, as `sha256sum` prints it.

One core computes 1.4 GiB/s where it has instructions for it (SHA-NI), a third of that where not.
Files are hashed by several threads and divided among the ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

THREADS = 4
_PREFIX = "checksums_"  # of the files that ranks leave for the one that commits


def checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def checksums(directory: Path, names: Sequence[str]) -> dict[str, str]:
    """By name, of files below `directory`. hashlib lets the threads run beside each other."""
    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        return dict(pool.map(lambda name: (name, checksum(directory / name)), names))


def text_checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def leave(directory: Path, rank: int, names: Sequence[str]) -> None:
    """Hash what this rank has just written, and keep that in `directory` for `collect`."""
    text = json.dumps(checksums(directory, names))
    (directory / f"{_PREFIX}{rank:05d}.json").write_text(text, encoding="utf-8")


def collect(directory: Path) -> dict[str, str]:
    """Read what the ranks left, and remove it; a record that was cut off counts for nothing."""
    sums: dict[str, str] = {}
    for file in sorted(directory.glob(f"{_PREFIX}*.json")):
        with suppress(ValueError):
            sums |= json.loads(file.read_text(encoding="utf-8"))
        file.unlink()
    return sums


def first_difference(directory: Path, expected: Mapping[str, str]) -> str | None:
    """The file whose bytes are others than those that were saved, in words; None without one."""
    try:
        actual = checksums(directory, list(expected))
    except OSError as error:
        return f"{os.path.basename(str(error.filename))} cannot be read ({error.strerror})"
    for name, value in actual.items():
        if value != expected[name]:
            return f"{name} is damaged: its bytes are not those that were saved (SHA-256 differs)"
    return None
