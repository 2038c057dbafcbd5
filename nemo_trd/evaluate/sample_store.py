"""The samples of an evaluation on disk, and whether a second start may go on with them.

OUTPUT/settings.json   what the samples depend on
       samples.jsonl   one sample a line, in the order in which they were judged
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_trd.config.errors import ConfigError
from nemo_trd.data.types import FinishReason
from nemo_trd.records.settings_file import keep_settings

SETTINGS_FILE, SAMPLES_FILE = "settings.json", "samples.jsonl"
Key = tuple[str, int, int]  # benchmark, problem, sample


@dataclass(frozen=True)
class Sample:
    """One completion for one problem, and the judgement of it."""

    benchmark: str
    problem: int  # row of the dataset, from 0
    sample: int  # 0 .. samples_per_problem - 1
    seed: int
    finish_reason: FinishReason
    tokens: int
    weight_version: int
    correct: bool | None
    reason: str  # see verifiers/judgement.py
    text: str

    @property
    def key(self) -> Key:
        return self.benchmark, self.problem, self.sample


class SampleStore:
    """Appends samples as they are judged. Methods may be called from any thread.

    Raises:
        ConfigError: the directory holds samples that were made with other settings, naming the
            first one that differs, or samples that cannot be read.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        self._file = output / SAMPLES_FILE
        self._lock = threading.Lock()
        self.samples: dict[Key, Sample] = {}
        keep_settings(output / SETTINGS_FILE, settings, self._file)
        self._read()

    def append(self, sample: Sample) -> None:
        line = json.dumps(asdict(sample)) + "\n"
        with self._lock:
            self.samples[sample.key] = sample
            with self._file.open("a", encoding="utf-8") as file:
                file.write(line)

    def _read(self) -> None:
        """Take over what is there. A kill while writing leaves a last line that is cut off."""
        if not self._file.exists():
            return
        content = self._file.read_bytes()
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                sample = Sample(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise ConfigError(
                    f"{self._file} line {number}: not a sample ({error}). Fix: remove the line; "
                    "the sample is drawn again."
                ) from None
            self.samples[sample.key] = sample
        if whole < len(content):
            with self._file.open("r+b") as file:
                file.truncate(whole)
