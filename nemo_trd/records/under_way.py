"""Completions of the steps under way, written as they come: a run that dies loses none of them.

RUN_DIR/under_way/step_000005_rank_0.jsonl   one completion a line, that the rank asked for
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_trd.data.types import Completion, GenerationRequest
from nemo_trd.records.step_lines import write_atomically


class UnderWay:
    """Keeps what is generated for steps that have yet to train, and finds what a run has kept.

    Where one died, a completion serves if weights sampled it that the new run has had, too: those
    of higher versions are lost, and others will bear their numbers. Those of all ranks are read:
    the next run may have another number of ranks.

    `notices` tell of damaged lines. A last line that a kill has cut off is none.

    Args:
        directory: shared by all ranks.
        settings: digest of the settings on which completions depend.
        max_staleness: that of `generation`. So many steps to come are sampled while one trains.
    """

    def __init__(self, directory: Path, rank: int, settings: str, max_staleness: int = 0) -> None:
        self._directory = directory
        self._rank = rank
        self._settings = settings
        self._staleness = max_staleness
        self._step: int | None = None
        self._kept: dict[int, dict[str, Completion]] = {}  # by step
        self.notices: list[str] = []
        for step, _, file in self._files():
            lines, damaged = _read(file)
            self._kept.setdefault(step, {}).update(lines)
            if damaged:
                again = "what they held is sampled again"
                self.notices.append(f"{file}: {damaged} damaged lines; {again}")

    def begin(self, step: int, weight_version: int) -> None:
        """Begin with a step of these weights, and forget those that have trained."""
        if self._step is None:
            self._forget_lost_weights(weight_version)
        self._step, first = step, step - self._staleness
        self._kept = {s: kept for s, kept in self._kept.items() if s >= first}
        for other, rank, file in self._files():
            if rank == self._rank and other < first:
                file.unlink()

    def _forget_lost_weights(self, version: int) -> None:
        """Drop what later weights than `version` sampled, and torn lines of this rank."""
        self._kept = {
            step: {request: c for request, c in kept.items() if _newest(c) <= version}
            for step, kept in self._kept.items()
        }
        for _, rank, file in self._files():
            if rank == self._rank:
                own, _ = _read(file)
                _write(file, {r: c for r, c in own.items() if _newest(c) <= version})

    def find(self, request: GenerationRequest, weight_version: int) -> Completion | None:
        """The completion of an equal request, if weights that may have sampled it."""
        key = self._key(request)
        kept = next((kept[key] for kept in self._kept.values() if key in kept), None)
        if kept is None or not 0 <= weight_version - kept.weight_version <= self._staleness:
            return None
        return kept

    def add(self, request: GenerationRequest, completion: Completion) -> None:
        """Write a completion down."""
        assert self._step is not None
        self._directory.mkdir(parents=True, exist_ok=True)
        with self._file(self._step, self._rank).open("a", encoding="utf-8") as file:
            file.write(_line(self._key(request), completion))

    def end(self) -> None:
        """Delete this rank's record: no step is left."""
        for _, rank, file in self._files():
            if rank == self._rank:
                file.unlink()
        with suppress(OSError):  # other ranks have not come here yet
            self._directory.rmdir()

    def take_over(self, world_size: int) -> None:
        """Take the records of ranks that there are no more. For rank 0, when all have read them."""
        for step, rank, file in self._files():
            if rank >= world_size:
                own = self._file(step, self._rank)
                lines, _ = _read(own) if own.exists() else ({}, 0)
                _write(own, lines | _read(file)[0])
                file.unlink()

    def _file(self, step: int, rank: int) -> Path:
        return self._directory / f"step_{step:06d}_rank_{rank}.jsonl"

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """Step and rank of each file, and the file."""
        for file in sorted(self._directory.glob("step_*_rank_*.jsonl")):
            if found := re.fullmatch(r"step_(\d+)_rank_(\d+)\.jsonl", file.name):
                yield int(found[1]), int(found[2]), file

    def _key(self, request: GenerationRequest) -> str:
        asked = f"{self._settings} {request.seed} {request.prompt_token_ids}"
        return hashlib.blake2b(asked.encode(), digest_size=16).hexdigest()


def _newest(completion: Completion) -> int:
    """The latest version of the weights that sampled it."""
    return max([completion.weight_version, *(version for version, _ in completion.versions)])


def _line(request: str, completion: Completion) -> str:
    return json.dumps({"request": request, **asdict(completion)}) + "\n"


def _write(file: Path, completions: dict[str, Completion]) -> None:
    write_atomically(file, "".join(_line(*item) for item in completions.items()))


def _read(file: Path) -> tuple[dict[str, Completion], int]:
    """Completions by request, and the number of damaged lines.

    A last line without an end is none of them: a kill while it was written leaves one.
    """
    kept, damaged = {}, 0
    *lines, _ = file.read_text(encoding="utf-8", errors="replace").split("\n")
    for line in lines:
        try:
            record: dict[str, Any] = json.loads(line)
            request = record.pop("request")
            for name in ("token_ids", "logprobs", "drafts"):
                record[name] = None if record.get(name) is None else tuple(record[name])
            record["versions"] = tuple(map(tuple, record.get("versions", ())))
            kept[request] = Completion(**record)
        except (ValueError, TypeError, KeyError, AttributeError):
            damaged += 1
    return kept, damaged
