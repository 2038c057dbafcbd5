"""Records of a run that people and programs read: JSON lines, each of one step."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class StepLines:
    """A file of JSON lines that holds each step once, whatever was interrupted or repeated."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        self._path = path
        self._last_step = -1
        self._drop_after(resumed_step)

    def append(self, step: int, record: Mapping[str, Any]) -> None:
        if step <= self._last_step:
            self._drop_after(step - 1)
        line = json.dumps({"step": step, **record}, allow_nan=False)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self._last_step = step

    def read(self) -> list[dict[str, Any]]:
        """Every complete line; a kill while writing leaves an incomplete one."""
        return read_lines(self._path)[0] if self._path.exists() else []

    def _drop_after(self, step: int) -> None:
        if not self._path.exists():
            return
        kept = [record for record in self.read() if record["step"] <= step]
        write_atomically(self._path, "".join(json.dumps(record) + "\n" for record in kept))
        self._last_step = max((record["step"] for record in kept), default=-1)


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The complete lines of a file, and how many others it has.

    A line is complete when it is a JSON object with a step, and ended. Lines end at a line feed
    alone: the texts of samples may hold any other separator.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    unfinished = lines.pop()
    records, broken = [], int(bool(unfinished))
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and "step" in record:
            records.append(record)
        else:
            broken += 1
    return records, broken


def write_atomically(path: Path, text: str) -> None:
    """Whoever reads `path`, also after a crash, finds the old text or the new one."""
    unfinished = path.with_name(f"{path.name}.partial")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
