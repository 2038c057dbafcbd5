"""Sampling the next step while this one trains, for `generation.max_staleness: 1`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from nemo_trd.config.schema import Config
from nemo_trd.data.types import Refinement
from nemo_trd.records.timers import Timers

Sample = Callable[[int, Timers], list[Refinement]]


class Lookahead:
    """Hands out the samples of a step; those of the next one are drawn in the background.

    With `max_staleness` 0 nothing is drawn ahead: `take` does the work, on current weights. With 1
    the samples of a step come from the weights before the last update, always: `settle` waits for
    the background before weights change. So results do not depend on what was faster.

    `timers` get the phases of `sample`, and with 1 also `wait_for_samples`, in which training
    waited, and `wait_for_training`, in which the servers had nothing to do.
    """

    def __init__(
        self, sample: Sample, config: Config, timers: Timers, ready: Mapping[int, list[Refinement]]
    ) -> None:
        self.ready = dict(ready)  # by step: what a checkpoint keeps
        self._sample = sample
        self._ahead = config.generation.max_staleness > 0
        self._num_steps = config.train.num_steps
        self._timers = timers
        self._thread = ThreadPoolExecutor(1, "lookahead")
        self._future: Future[_Drawn] | None = None

    def take(self, step: int) -> list[Refinement]:
        """The samples of `step`, drawn now unless they are ready."""
        if step not in self.ready:
            self.ready[step] = self._sample(step, self._timers)
        return self.ready.pop(step)

    def start(self, step: int) -> None:
        """Begin with the samples of `step`, unless they are ready or the run ends before."""
        if self._ahead and step < self._num_steps and step not in self.ready:
            self._future = self._thread.submit(self._draw, step)

    def _draw(self, step: int) -> _Drawn:
        timers = Timers()
        refinements = self._sample(step, timers)
        return _Drawn(step, refinements, timers.phases(), time.perf_counter())

    def settle(self) -> None:
        """Wait for what `start` began. Afterwards the generators are idle.

        What went wrong in drawing is raised here.
        """
        if self._future is None:
            return
        begin = time.perf_counter()
        with self._timers("wait_for_samples"):
            drawn = self._future.result()
        self._future = None
        self.ready[drawn.step] = drawn.refinements
        idle = max(0.0, begin - drawn.ended)
        self._timers.add({**drawn.seconds, "wait_for_training": idle})


@dataclass(frozen=True)
class _Drawn:
    step: int
    refinements: list[Refinement]
    seconds: dict[str, float]  # by phase
    ended: float  # time.perf_counter()
