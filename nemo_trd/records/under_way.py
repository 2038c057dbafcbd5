"""Completions of the step under way, written as they come: a run that dies loses none of them.

RUN_DIR/under_way/rank_0.jsonl   one completion a line, of the step that the rank samples
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_trd.data.types import Completion, GenerationRequest


class UnderWay:
    """Keeps what is generated for one step, and finds what a run that died in it has kept.

    Kept completions serve until the weights change: those that come may bear the number of weights
    that were lost. Those of all ranks are read: the next run may have another number of ranks.

    Args:
        directory: shared by all ranks.
        settings: digest of the settings on which completions depend.
        staleness: how much older than the current weights those may be that sampled a completion.
    """

    def __init__(self, directory: Path, rank: int, settings: str, staleness: int = 0) -> None:
        self._directory = directory
        self._file = directory / f"rank_{rank}.jsonl"
        self._settings = settings
        self._staleness = staleness
        self._step: int | None = None
        self._weight_version: int | None = None
        self._kept: dict[str, Completion] = {}
        for file in sorted(directory.glob("rank_*.jsonl")):
            self._kept |= _read(file)

    def begin(self, step: int, weight_version: int) -> None:
        """Begin with a step of these weights: from the second one on, with an empty record."""
        if self._step not in (None, step):
            self._file.unlink(missing_ok=True)
        if self._weight_version not in (None, weight_version):
            self._kept = {}
        self._step, self._weight_version = step, weight_version

    def find(self, request: GenerationRequest, weight_version: int) -> Completion | None:
        """The completion of an equal request, if weights that may have sampled it."""
        kept = self._kept.get(self._key(request))
        if kept is None or not 0 <= weight_version - kept.weight_version <= self._staleness:
            return None
        return kept

    def add(self, request: GenerationRequest, completion: Completion) -> None:
        """Write a completion down."""
        record = {"request": self._key(request), **asdict(completion)}
        self._directory.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def end(self) -> None:
        """Delete the record: no step is left."""
        self._file.unlink(missing_ok=True)
        with suppress(OSError):  # other ranks have not come here yet
            self._directory.rmdir()

    def drop_other_ranks(self, world_size: int) -> None:
        """Delete records of ranks that there are no more. For one rank, when all have read them."""
        own = {f"rank_{rank}.jsonl" for rank in range(world_size)}
        for file in self._directory.glob("rank_*.jsonl"):
            if file.name not in own:
                file.unlink()

    def _key(self, request: GenerationRequest) -> str:
        asked = f"{self._settings} {request.seed} {request.prompt_token_ids}"
        return hashlib.blake2b(asked.encode(), digest_size=16).hexdigest()


def _read(file: Path) -> dict[str, Completion]:
    """Completions by request; a kill while writing leaves a line that is none."""
    kept = {}
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record: dict[str, Any] = json.loads(line)
            request = record.pop("request")
            for name in ("token_ids", "logprobs", "drafts"):
                record[name] = None if record.get(name) is None else tuple(record[name])
            record["versions"] = tuple(map(tuple, record.get("versions", ())))
            kept[request] = Completion(**record)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return kept
