"""Checkpoint directories on disk: names, completeness, the newest good one. Imports no torch.

    RUN_DIR/checkpoints/step_00000050/            what megatron/checkpoint.py writes
                        step_00000050/trainer_state.json   written last: position and file sizes
                        latest -> step_00000050
                        step_00000100.partial/    a save that is under way, or was cut off

A checkpoint is written under its partial name and renamed when every file is there, and only
then does `latest` move: whatever is found under a final name was complete.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from nemo_trd.config import Checkpoint, ConfigError, rule_broken
from nemo_trd.types import Refinement

log = logging.getLogger(__name__)

STATE_FILE, SAMPLES_FILE = "trainer_state.json", "samples_ahead.json"
SAMPLES = TypeAdapter(dict[int, list[Refinement]])
PARTIAL = ".partial"


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands; what `trainer_state.json` holds beside the file sizes."""

    step: int  # optimizer steps done, skipped ones included
    weight_version: int
    failed_steps: int  # in a row, up to now
    num_prompts: int  # the order of prompts depends on how many there are
    digest: str  # of the settings that change the numbers
    model: dict[str, Any]  # what identifies the student's architecture


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def commit(partial: Path, state: TrainerState, keep_last: int) -> Path:
    """Turn a fully written partial directory into the newest checkpoint, and prune old ones."""
    root = partial.parent
    files = {
        str(file.relative_to(partial)): file.stat().st_size
        for file in sorted(partial.rglob("*"))
        if file.is_file()
    }
    text = json.dumps({**asdict(state), "files": files}, indent=1)
    (partial / STATE_FILE).write_text(text)
    _sync_to_disk(partial)
    final = root / partial.name.removesuffix(PARTIAL)
    if final.exists():  # an earlier attempt wrote the same step
        shutil.rmtree(final)
    os.rename(partial, final)
    link = root / "latest.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    os.replace(link, root / "latest")
    for old in complete_checkpoints(root)[:-keep_last]:
        shutil.rmtree(old)
    return final


def _sync_to_disk(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def complete_checkpoints(root: Path) -> list[Path]:
    """Directories with a final name, oldest first."""
    found = [p for p in root.glob("step_*") if p.is_dir() and not p.name.endswith(PARTIAL)]
    return sorted(found, key=lambda p: p.name)


def defects(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be loaded, or None when all its files have the recorded size."""
    try:
        recorded = json.loads((checkpoint / STATE_FILE).read_text())["files"]
    except FileNotFoundError:
        return f"{STATE_FILE} is missing"
    except (json.JSONDecodeError, KeyError) as error:
        return f"{STATE_FILE} is damaged ({error})"
    for name, size in recorded.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def write_samples_ahead(directory: Path, samples: Mapping[int, list[Refinement]]) -> None:
    """Keep what was sampled for steps to come: with newer weights it would not be the same."""
    (directory / SAMPLES_FILE).write_bytes(SAMPLES.dump_json(dict(samples)))


def read_samples_ahead(checkpoint: Path) -> dict[int, list[Refinement]]:
    """By step; empty where nothing was sampled ahead."""
    file = checkpoint / SAMPLES_FILE
    return SAMPLES.validate_json(file.read_bytes()) if file.is_file() else {}


def read_state(checkpoint: Path) -> TrainerState:
    settings = json.loads((checkpoint / STATE_FILE).read_text())
    del settings["files"]
    return TrainerState(**settings)


def find_checkpoint(settings: Checkpoint, root: Path) -> Path | None:
    """The checkpoint to resume from, None to start from step 0.

    With `checkpoint.resume=auto` damaged checkpoints are passed over with a warning.

    Raises:
        ConfigError: a named checkpoint is missing or damaged, or all of the run's are damaged.
    """
    if settings.resume == "never":
        return None
    if settings.resume != "auto":
        named = Path(settings.resume)
        reason = defects(named) if named.is_dir() else "there is no such directory"
        if reason:
            raise rule_broken(
                "checkpoint.resume", settings.resume, reason, "name a complete checkpoint"
            )
        return named
    candidates = complete_checkpoints(root)
    for candidate in reversed(candidates):
        reason = defects(candidate)
        if reason is None:
            return candidate
        log.warning("passing over checkpoint %s: %s", candidate, reason)
    if candidates:
        raise ConfigError(
            f"checkpoint.resume = 'auto': all {len(candidates)} checkpoints in {root} are damaged. "
            "Fix: restore one, or start again with checkpoint.resume=never and another run.dir."
        )
    return None
