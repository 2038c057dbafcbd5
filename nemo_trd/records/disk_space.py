"""Disk space for checkpoints: whether one fits, and the error when it does not."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from nemo_trd.config.errors import ConfigError, rule_broken

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# In messages that come from another process, without their OSError. The last two are what torch's
# writer says after a write that the system cut short, and all that megatron-core 0.19 tells of it.
SIGNS = (
    *("No space left", "Disk quota exceeded", "File too large"),
    *("unexpected pos", "error: <class 'OSError'>"),
)
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def free_bytes(directory: Path) -> int | None:
    """Bytes that may be written below a directory that need not exist; None where nobody knows.

    Some network and object mounts report no size at all. Quotas are not seen here.
    """
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    answer = os.statvfs(place)
    return answer.f_bavail * answer.f_frsize if answer.f_blocks else None


def size(count: int) -> str:
    """1536 -> "1.5 KiB"."""
    value, unit = float(count), 0
    while value >= 1024 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {UNITS[unit]}" if unit else f"{count} bytes"


def lacking(root: Path, needed: int) -> str | None:
    """Shortage of space for `needed` bytes below `root`, in words; None when they fit."""
    free = free_bytes(root)
    if free is None or free >= needed:
        return None
    return f"{size(free)} are free in {root}, and a checkpoint needs {size(needed)}"


def first_checkpoint(weights: int, layers: int) -> int:
    """Bytes of a checkpoint before there is one.

    Args:
        weights: bytes of weights, main weights and Adam states.
        layers: of the model; a layer has about a dozen tensors, each of which is written three
            times, with 2 KiB of names and padding around it.
    """
    return weights + 3 * 2048 * (12 * layers + 3) + 65536


def check_before_start(root: Path, needed: int) -> None:
    """Refuse a run whose first checkpoint will not fit. What a cut-off save left counts as free.

    Args:
        root: RUN_DIR/checkpoints; need not exist.
        needed: bytes of one checkpoint.

    Raises:
        ConfigError: directory, free bytes and bytes needed.
    """
    leftovers = sum(f.stat().st_size for f in root.glob("step_*.partial/**/*") if f.is_file())
    missing = lacking(root, max(0, needed - leftovers))
    if missing is not None:
        raise no_space(root, missing)


def no_space(root: Path, missing: str) -> ConfigError:
    return rule_broken(
        "run.dir",
        str(root.parent),
        f"the disk is too full to save: {missing}",
        "free some space, lower checkpoint.keep_last and remove old checkpoints, or give a run.dir "
        "on a larger disk",
    )


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, says that nothing more can be written."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if any(sign in str(error) for sign in SIGNS):
            return True
        error = error.__cause__ or error.__context__
    return False
