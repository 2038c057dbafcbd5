"""Sampling steps to come while this one trains: `generation.max_staleness`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from nemo_trd.config.schema import Config
from nemo_trd.data.types import Refinement
from nemo_trd.distributed.exchange import merge_shares
from nemo_trd.records.timers import Timers

Samples = dict[int, list[Refinement]]  # by step
Sample = Callable[[int, Timers], list[Refinement]]


def sampling_ahead(
    sample: Sample, config: Config, timers: Timers, ready: Mapping[int, list[Refinement]]
) -> Lookahead | RunAhead:
    """What hands out the samples of a run with these settings.

    Args:
        sample: draws the samples of a step.
        timers: get the phases of `sample`.
        ready: samples that there are already, by step.
    """
    kind = RunAhead if config.generation.max_staleness > 1 else Lookahead
    return kind(sample, config, timers, ready)


class Lookahead:
    """Hands out the samples of a step; those of the next one are drawn in the background.

    With `max_staleness` 0 nothing is drawn ahead: `take` does the work, on current weights. With 1
    the samples of a step come from the weights before the last update: `settle` waits for the
    background before weights change. So results do not depend on what was faster. (Where servers
    died while a step was drawn, what is missing comes from the weights that the resumed run has.)

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

    def kept(self, ending: bool) -> Samples:
        """What a checkpoint keeps: the samples of steps to come. All of them, after `settle`."""
        return dict(self.ready)

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


class RunAhead:
    """Hands out the samples of a step; up to `max_staleness` steps to come are drawn meanwhile.

    A thread draws one step after the other, without regard to new weights. It begins with a step
    as soon as no more than `max_staleness` others have yet to train before it, so no sample is of
    older weights by more than that, if every server got all of them.

    `timers` get the phases of `sample` when a step takes its samples, `wait_for_samples`, in which
    training waited, and `wait_for_training`, in which the thread did.
    """

    def __init__(
        self,
        sample: Sample,
        config: Config,
        timers: Timers,
        ready: Mapping[int, list[Refinement]],
        agree: Callable[[int], int] = lambda step: max(merge_shares([step])),
    ) -> None:
        """Args: agree: gives all ranks the largest of their numbers. Collective."""
        self._sample = sample
        self._staleness = config.generation.max_staleness
        self._last = config.train.num_steps - 1
        self._timers = timers
        self._agree = agree
        self._from_before = frozenset(ready)  # drawn before the run was cut off
        self._changed = threading.Condition()
        # All below only with `_changed` held.
        self._ready = dict(ready)
        self._seconds: dict[int, dict[str, float]] = {}  # of drawing, by step and phase
        self._begun = self._done = -1  # the last step that the thread has begun, and has done
        self._limit = -1  # the last one that it may begin with
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    def take(self, step: int) -> list[Refinement]:
        """The samples of `step`, as soon as they are drawn. What went wrong there is raised."""
        self._allow(step, first=step)
        with self._timers("wait_for_samples"), self._changed:
            self._changed.wait_for(lambda: step in self._ready or self._failure is not None)
            if step not in self._ready:
                assert self._failure is not None
                raise self._failure
            self._timers.add(self._seconds.pop(step, {}))
            return self._ready.pop(step)

    def start(self, step: int) -> None:
        """Let the thread go on: the step before `step` trains now."""
        self._allow(step - 1 + self._staleness, first=step)

    def settle(self) -> None:
        """Nothing: weights change while samples are drawn."""

    def kept(self, ending: bool) -> Samples:
        """What a checkpoint keeps: the samples of steps to come that are drawn. Collective.

        Args:
            ending: whether the run ends. What is under way is waited for, nothing more is begun.
        """
        if ending:
            with self._changed:
                self._limit = self._begun
            last = self._agree(self._begun)  # all ranks draw a step together, or none does
            with self._changed:
                self._limit = last
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._done >= last or self._failure is not None)
                if self._failure is not None:
                    raise self._failure
        with self._changed:
            return dict(self._ready)

    def _allow(self, limit: int, first: int) -> None:
        with self._changed:
            if self._thread is None:
                self._begun = self._done = first - 1
                self._thread = threading.Thread(target=self._draw, name="run-ahead", daemon=True)
                self._thread.start()
            self._limit = max(self._limit, min(limit, self._last))
            self._changed.notify_all()

    def _draw(self) -> None:
        while True:
            begin = time.perf_counter()
            with self._changed:
                self._changed.wait_for(lambda: self._begun < self._limit)
                self._begun = step = self._begun + 1
                if step in self._from_before:
                    self._done = step
                    self._changed.notify_all()
                    continue
            timers = Timers()
            timers.add({"wait_for_training": time.perf_counter() - begin})
            try:
                refinements = self._sample(step, timers)
            except BaseException as error:
                with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._ready[step] = refinements
                self._seconds[step] = timers.phases()
                self._done = step
                self._changed.notify_all()
