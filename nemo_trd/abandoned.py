"""Checkpoints that a run does not go on from are moved aside, with the records that belong to them.

    RUN_DIR/checkpoints/abandoned_001/step_00000006/     named, logged, and never pruned
                                      metrics.jsonl, evaluation.jsonl, config.yaml, summary.json
                                      samples/           of the steps that are done again

Starting anew (`checkpoint.resume=never`) or from an older checkpoint begins another line. Only one
line is current: its checkpoints alone are pruned, and found by `checkpoint.resume=auto`.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from nemo_trd import latest
from nemo_trd.checkpoint_dir import (
    PARTIAL,
    candidates,
    complete_checkpoints,
    defects,
    read_state,
)

_NAME = "abandoned_{:03d}"
RECORDS = ("metrics.jsonl", "evaluation.jsonl", "config.yaml", "summary.json")


def begin_line(root: Path, resumed: Path | None) -> list[str]:
    """Make `resumed` (None: nothing) the end of the current line, before a run writes anything.

    What was saved after it, or is damaged, goes to a directory of its own. Remains of saves that
    were cut off are removed. To be called by one process that holds the run directory's lock.

    Args:
        root: RUN_DIR/checkpoints; need not exist.

    Returns:
        What was done, one sentence each, for the log.
    """
    if not root.is_dir():
        return []
    notices = []
    for leftover in sorted(root.glob(f"step_*{PARTIAL}")):
        shutil.rmtree(leftover)
        notices.append(f"removed {leftover}, which a save that was cut off had left")
    line = complete_checkpoints(root)
    resumed = resumed.resolve() if resumed is not None else None
    places = [checkpoint.resolve() for checkpoint in line]
    kept = line[: places.index(resumed) + 1] if resumed in places else []
    aside = [checkpoint for checkpoint in line if checkpoint not in kept or defects(checkpoint)]
    if aside:
        place = move_aside(root, aside, read_state(resumed).step if resumed else 0)
        notices.append(
            f"moved {len(aside)} checkpoints that this run does not go on from to {place}: "
            f"{', '.join(checkpoint.name for checkpoint in aside)}. To go on from one of them: "
            f"checkpoint.resume={place / aside[-1].name}"
        )
    elif resumed is None:
        notices += _reminder(root)
    if resumed is not None and resumed.is_relative_to(root.resolve()):
        current = root / resumed.relative_to(root.resolve())
        if latest.read(root) != current:
            latest.point(root, current)
    else:
        latest.forget(root)
    return notices


def move_aside(root: Path, checkpoints: list[Path], step: int) -> Path:
    """Move checkpoints to a new abandoned directory. Copy the run's records there, which are about
    to be cut back to `step`, and move the samples of later steps."""
    taken = [int(p.name.rpartition("_")[2]) for p in _places(root)]
    place = root / _NAME.format(max(taken, default=0) + 1)
    place.mkdir()
    run_dir = root.parent
    for name in RECORDS:
        if (run_dir / name).is_file():
            shutil.copy2(run_dir / name, place / name)
    for file in sorted((run_dir / "samples").glob("step_*")):
        number = re.match(r"step_(\d+)", file.name)
        if number and int(number[1]) > step:
            (place / "samples").mkdir(exist_ok=True)
            os.rename(file, place / "samples" / file.name)
    for checkpoint in checkpoints:
        os.rename(checkpoint, place / checkpoint.name)
    latest.sync_directory(root)
    return place


def _places(root: Path) -> list[Path]:
    """Directories of abandoned checkpoints, oldest first."""
    found = [path for path in root.glob("abandoned_*") if re.fullmatch(r"abandoned_\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("_")[2]))


def _reminder(root: Path) -> list[str]:
    """A run that starts at step 0 beside abandoned checkpoints may not be what was meant."""
    found = [checkpoint for place in _places(root) for checkpoint in complete_checkpoints(place)]
    if not found or candidates(root):
        return []
    return [
        f"no checkpoint in {root} is current, so this run starts at step 0; {len(found)} that "
        f"earlier runs did not go on from are kept there. To go on from the last one: "
        f"checkpoint.resume={found[-1]}"
    ]
