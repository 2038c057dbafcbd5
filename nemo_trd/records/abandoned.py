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

from nemo_trd.records import latest
from nemo_trd.records.checkpoint_dir import (
    PARTIAL,
    candidates,
    checkpoint_name,
    complete_checkpoints,
    defects,
    read_state,
    records_of,
)

_NAME = "abandoned_{:03d}"
METRICS, SUMMARY = ("metrics.jsonl", "evaluation.jsonl"), "summary.json"


def begin_line(root: Path, resumed: Path | None) -> list[str]:
    """Make `resumed` (None: nothing) the end of the current line, before a run writes anything.

    What was saved after it, or is damaged, goes to a directory of its own. Remains of saves that
    were cut off are removed. To be called by one process that holds the run directory's lock.

    Args:
        root: RUN_DIR/checkpoints; need not exist.

    Returns:
        What was done, one sentence each, for the log.
    """
    notices = []
    for leftover in sorted(root.glob(f"step_*{PARTIAL}")):
        shutil.rmtree(leftover)
        notices.append(f"removed {leftover}, which a save that was cut off had left")
    resumed = _named(root, resumed.resolve() if resumed is not None else None)
    line = complete_checkpoints(root)
    places = [checkpoint.resolve() for checkpoint in line]
    kept = line[: places.index(resumed) + 1] if resumed in places else []
    copy = latest.copied(root)
    aside = [c for c in line if c not in kept or c == copy or defects(c)]
    if aside:
        place = move_aside(root, aside, read_state(kept[-1]).step if kept else 0)
        notices.append(
            f"moved {len(aside)} checkpoints that this run does not go on from to {place}: "
            f"{', '.join(checkpoint.name for checkpoint in aside)}. To go on from one of them: "
            f"checkpoint.resume={place / aside[-1].name}"
        )
    elif resumed is None:
        notices += _reminder(root)
    if not kept:
        _take_records(root.parent, resumed)
    if resumed is not None and resumed.is_relative_to(root.resolve()):
        current = root / resumed.relative_to(root.resolve())
        if latest.read(root) != current:
            latest.point(root, current)
    else:
        latest.forget(root)
    return notices


def _named(root: Path, resumed: Path | None) -> Path | None:
    """Give a copy in the place of `latest` the name of its step, unless that one is there too.

    Returns `resumed`, where it is then.
    """
    copy = latest.copied(root)
    if copy is None or defects(copy):
        return resumed
    place, named = copy.resolve(), root / checkpoint_name(read_state(copy).step)
    if not named.exists():
        os.rename(copy, named)
    return named.resolve() if resumed == place else resumed


def move_aside(root: Path, checkpoints: list[Path], step: int) -> Path:
    """Move checkpoints to a new abandoned directory. Copy the run's records there, which are about
    to be cut back to `step`; move its summary and the samples of later steps."""
    taken = [int(p.name.rpartition("_")[2]) for p in _places(root)]
    place = root / _NAME.format(max(taken, default=0) + 1)
    place.mkdir()
    run_dir = root.parent
    for name in (*METRICS, "config.yaml", SUMMARY):
        if (run_dir / name).is_file():
            shutil.copy2(run_dir / name, place / name)
    (run_dir / SUMMARY).unlink(missing_ok=True)  # of an end that this line has not reached
    for file in sorted((run_dir / "samples").glob("step_*")):
        number = re.match(r"step_(\d+)", file.name)
        if number and int(number[1]) > step:
            (place / "samples").mkdir(exist_ok=True)
            os.rename(file, place / "samples" / file.name)
    for checkpoint in checkpoints:
        os.rename(checkpoint, place / checkpoint.name)
    latest.sync_directory(root)
    return place


def _take_records(run_dir: Path, resumed: Path | None) -> None:
    """Put the metrics that led to `resumed` in the place of those of another line."""
    if resumed is not None and records_of(resumed) == run_dir.resolve():
        return  # it has been given another name
    (run_dir / SUMMARY).unlink(missing_ok=True)
    for name in METRICS:
        known = records_of(resumed) / name if resumed else None
        if known is not None and known.is_file():
            shutil.copy2(known, run_dir / name)
        else:
            (run_dir / name).unlink(missing_ok=True)


def _places(root: Path) -> list[Path]:
    """Directories of abandoned checkpoints, oldest first."""
    places = [
        path for path in root.glob("abandoned_*") if re.fullmatch(r"abandoned_\d+", path.name)
    ]
    return sorted(places, key=lambda path: int(path.name.rpartition("_")[2]))


def _reminder(root: Path) -> list[str]:
    """A run that starts at step 0 beside abandoned checkpoints may not be what was meant."""
    kept = [checkpoint for place in _places(root) for checkpoint in complete_checkpoints(place)]
    if not kept or candidates(root):
        return []
    return [
        f"no checkpoint in {root} is current, so this run starts at step 0; {len(kept)} that "
        f"earlier runs did not go on from are kept there. To go on from the last one: "
        f"checkpoint.resume={kept[-1]}"
    ]
