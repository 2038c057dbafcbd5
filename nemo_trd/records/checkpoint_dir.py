"""Checkpoint directories on disk: names, completeness, the newest good one. Imports no torch.

    RUN_DIR/checkpoints/step_00000050/            what megatron/checkpoint.py writes
                        step_00000050/trainer_state.json   written last: position, sizes, checksums
                        latest -> step_00000050   the current one; see latest.py
                        step_00000100.partial/    a save that is under way, or was cut off
                        abandoned_001/            what a run did not go on from; see abandoned.py

A checkpoint is written under its partial name and renamed when every file is there, and only
then does `latest` move: whatever is found under a final name was complete. The checkpoints of one
`checkpoints` directory are one line: each was saved by a run that went on from the one before.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from nemo_trd.config.errors import ConfigError, rule_broken
from nemo_trd.config.schema import Checkpoint
from nemo_trd.data.types import Refinement
from nemo_trd.records import checksums, latest

STATE_FILE, SAMPLES_FILE = "trainer_state.json", "samples_ahead.json"
SAMPLES = TypeAdapter(dict[int, list[Refinement]])
PARTIAL = ".partial"
# What STATE_FILE holds beside a TrainerState: sizes and SHA-256 by file, the place in the order of
# saving, and the SHA-256 of all that.
RECORD = ("files", "checksums", "order", "own_checksum")


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands; what `trainer_state.json` holds beside the record of the files."""

    step: int  # optimizer steps done, skipped ones included
    weight_version: int
    failed_steps: int  # in a row, up to now
    num_prompts: int  # the order of prompts depends on how many there are
    digest: str  # of the settings that change the numbers
    model: dict[str, Any]  # what identifies the student's architecture
    settings: dict[str, Any] = field(default_factory=dict)  # all of the run's, without credentials
    slurm_job: str | None = None  # that saved it


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def commit(partial: Path, state: TrainerState, keep_last: int) -> Path:
    """Turn a fully written partial directory into the newest checkpoint, and prune old ones."""
    root = partial.parent
    known = checksums.collect(partial)
    names = [str(f.relative_to(partial)) for f in sorted(partial.rglob("*")) if f.is_file()]
    known |= checksums.checksums(partial, [name for name in names if name not in known])
    record = {
        **asdict(state),
        "order": 1 + max((_order(p)[0] for p in complete_checkpoints(root)), default=0),
        "files": {name: (partial / name).stat().st_size for name in names},
        "checksums": {name: known[name] for name in names},
    }
    record["own_checksum"] = checksums.text_checksum(_canonical(record))
    (partial / STATE_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")
    _sync_to_disk(partial)
    final = root / partial.name.removesuffix(PARTIAL)
    if final.exists():  # another attempt at the same step, which nothing goes on from
        _remove(final)
    os.rename(partial, final)
    latest.point(root, final)
    for old in complete_checkpoints(root)[:-keep_last]:
        if old != final:
            _remove(old)
    return final


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint. One that a kill leaves half has no final name any more."""
    doomed = checkpoint.with_name(f"step_removed{PARTIAL}")
    if doomed.exists():
        shutil.rmtree(doomed)
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)


def _canonical(record: Mapping[str, Any]) -> str:
    """The text that `own_checksum` is of."""
    kept = {name: value for name, value in record.items() if name != "own_checksum"}
    return json.dumps(kept, sort_keys=True)


def _sync_to_disk(directory: Path) -> None:
    for path in directory.rglob("*"):
        latest.sync_directory(path) if path.is_dir() else latest.sync_file(path)
    latest.sync_directory(directory)


def complete_checkpoints(root: Path) -> list[Path]:
    """Directories with a final name, and a copy in the place of `latest`, as they were saved."""
    named = [p for p in root.glob("step_*") if p.is_dir() and not p.name.endswith(PARTIAL)]
    return sorted([*named, *filter(None, [latest.copied(root)])], key=_order)


def _order(checkpoint: Path) -> tuple[int, str]:
    """Sorts by saving. Checkpoints that record no order are older than those that do."""
    try:
        order = read_record(checkpoint)["order"]
    except (OSError, ValueError, KeyError):
        order = 0
    return order if isinstance(order, int) else 0, checkpoint.name


def read_record(checkpoint: Path) -> dict[str, Any]:
    """All that STATE_FILE holds.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    record = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return record


def defects(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be loaded, or None when all its files have the recorded size."""
    try:
        record = read_record(checkpoint)
        recorded = dict(record["files"])
        read_state(checkpoint)
    except FileNotFoundError:
        return f"{STATE_FILE} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{STATE_FILE} is damaged ({error})"
    own = record.get("own_checksum")
    if own is not None and own != checksums.text_checksum(_canonical(record)):
        return f"{STATE_FILE} is damaged: its text is not what was saved (SHA-256 differs)"
    for name, size in recorded.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def recorded_checksums(checkpoint: Path) -> dict[str, str]:
    """SHA-256 by file, largest file first; empty for a checkpoint that was saved without."""
    record = read_record(checkpoint)
    sums: dict[str, str] = record.get("checksums", {})
    return dict(sorted(sums.items(), key=lambda item: (-record["files"][item[0]], item[0])))


def checkpoint_size(checkpoint: Path) -> int:
    """Bytes of its files, as recorded."""
    return sum(read_record(checkpoint)["files"].values())


def write_samples_ahead(directory: Path, samples: Mapping[int, list[Refinement]]) -> None:
    """Keep what was sampled for steps to come: with newer weights it would not be the same."""
    (directory / SAMPLES_FILE).write_bytes(SAMPLES.dump_json(dict(samples)))


def read_samples_ahead(checkpoint: Path) -> dict[int, list[Refinement]]:
    """By step; empty where nothing was sampled ahead."""
    file = checkpoint / SAMPLES_FILE
    return SAMPLES.validate_json(file.read_bytes()) if file.is_file() else {}


def read_state(checkpoint: Path) -> TrainerState:
    settings = read_record(checkpoint)
    return TrainerState(**{name: v for name, v in settings.items() if name not in RECORD})


def records_of(checkpoint: Path) -> Path:
    """Where settings and metrics of its run are: the run directory, or beside abandoned ones."""
    aside = (checkpoint.parent / "config.yaml").is_file()
    return checkpoint.parent if aside else checkpoint.parent.parent


def candidates(root: Path) -> list[Path]:
    """Checkpoints to go on from, best first: where `latest` leads, then what was saved before.

    Without `latest`, or where it leads nowhere, the one that was saved last comes first.
    """
    current = latest.read(root)
    line = complete_checkpoints(root)
    if current is None or not current.is_dir():
        return line[::-1]
    others = line or complete_checkpoints(current.parent)  # `latest` may lead to abandoned ones
    return [current, *(other for other in reversed(others) if other != current)]


def find_checkpoint(settings: Checkpoint, root: Path) -> Path | None:
    """The checkpoint to resume from, None to start from step 0. Sizes are compared, not bytes.

    With `checkpoint.resume=auto` damaged checkpoints are passed over; before it is loaded,
    `megatron.verification.verified_checkpoint` reads the files, and says so.

    Raises:
        ConfigError: a named checkpoint is missing or damaged, or all of the run's are damaged.
    """
    allowed = wanted_checkpoints(settings, root)
    reasons = {}
    for candidate in allowed:
        reason = defects(candidate) if candidate.is_dir() else "there is no such directory"
        if reason is None:
            return candidate
        reasons[candidate] = reason
    if reasons:
        raise damaged(settings, root, reasons)
    return None


def wanted_checkpoints(settings: Checkpoint, root: Path) -> list[Path]:
    """Checkpoints that `checkpoint.resume` allows, best first.

    A requeued Slurm job goes on from what it has saved, wherever its first attempt began.
    """
    if settings.resume == "auto":
        return candidates(root)
    if own := [c for c in candidates(root) if _is_of_an_earlier_attempt(c)]:
        return own
    return [] if settings.resume == "never" else [latest.follow(Path(settings.resume))]


def _is_of_an_earlier_attempt(checkpoint: Path) -> bool:
    """Whether the Slurm job of this process saved it before it was requeued."""
    job, attempt = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    if job is None or attempt == "0":
        return False
    try:
        return read_record(checkpoint).get("slurm_job") == job
    except (OSError, ValueError):
        return False


def damaged(settings: Checkpoint, root: Path, reasons: Mapping[Path, str]) -> ConfigError:
    """None of the `wanted_checkpoints` can be loaded; `reasons` say why, best first."""
    [first, *_] = reasons
    if settings.resume != "auto":
        return rule_broken(
            "checkpoint.resume", settings.resume, reasons[first], "name a complete checkpoint"
        )
    return ConfigError(
        f"checkpoint.resume = 'auto': all {len(reasons)} checkpoints in {root} are damaged; "
        f"{first.name}: {reasons[first]}. "
        "Fix: restore one, or start anew with checkpoint.resume=never, which moves them aside."
    )
