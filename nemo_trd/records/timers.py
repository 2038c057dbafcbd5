"""Seconds of a step by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


class Timers:
    """Wall-clock seconds of a step by phase: rollout, refinement, teacher, student, ..."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._step_start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time of the block to `phase`; work that it left to the GPU is waited for."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.add({phase: time.perf_counter() - start})

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add what was measured elsewhere, by phase."""
        for phase, elapsed in seconds.items():
            self._seconds[phase] = self._seconds.get(phase, 0.0) + elapsed

    def phases(self) -> dict[str, float]:
        """Seconds by phase since the last `take`, in order of first use."""
        return dict(self._seconds)

    def take(self) -> dict[str, float]:
        """Begin a new step. Seconds by phase of the one that ends; "step" is all of it."""
        now = time.perf_counter()
        taken = {**self._seconds, "step": now - self._step_start}
        self._seconds, self._step_start = {}, now
        return taken
