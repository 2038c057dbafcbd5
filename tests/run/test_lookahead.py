"""Samples of the next step are drawn beside this one, and never from other weights."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from nemo_trd.records.timers import Timers
from nemo_trd.run.lookahead import Lookahead

STEPS = 3


class Weights:
    """Stands for the servers: what they sample says which weights they had."""

    def __init__(self) -> None:
        self.version = 0
        self.drawn: list[int] = []
        self.thread: list[str] = []

    def sample(self, step: int, timers: Timers) -> list[Any]:
        with timers("rollout"):
            self.drawn.append(step)
            self.thread.append(threading.current_thread().name)
            return [(step, self.version)]


def config(max_staleness: int) -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(
        generation=SimpleNamespace(max_staleness=max_staleness),
        train=SimpleNamespace(num_steps=STEPS),
    )


def run(max_staleness: int, first: int = 0, ready: dict[int, list[Any]] | None = None) -> Any:
    """As the loop does it: what every step trains on, and what would be kept for the next."""
    weights, timers = Weights(), Timers()
    weights.version = first
    samples = Lookahead(weights.sample, config(max_staleness), timers, ready or {})
    trained, kept = [], []
    for step in range(first, STEPS):
        trained += samples.take(step)
        samples.start(step + 1)
        samples.settle()
        weights.version += 1
        kept.append(dict(samples.ready))
    return trained, kept, weights, timers


def test_without_staleness_every_step_samples_with_its_own_weights_in_the_same_thread() -> None:
    trained, kept, weights, timers = run(0)
    assert trained == [(0, 0), (1, 1), (2, 2)]
    assert kept == [{}] * STEPS
    assert set(weights.thread) == {threading.current_thread().name}
    assert set(timers.phases()) == {"rollout"}


def test_with_staleness_1_every_step_after_the_first_is_exactly_one_update_behind() -> None:
    trained, kept, weights, timers = run(1)
    assert trained == [(0, 0), (1, 0), (2, 1)]
    assert weights.drawn == [0, 1, 2]  # nothing beyond the last step
    assert weights.thread[1:] == ["lookahead_0"] * 2
    assert set(timers.phases()) == {"rollout", "wait_for_samples", "wait_for_training"}
    assert kept == [{1: [(1, 0)]}, {2: [(2, 1)]}, {}]


def test_a_resumed_run_trains_on_the_samples_that_were_kept() -> None:
    whole, kept, _, _ = run(1)
    resumed, _, weights, _ = run(1, first=2, ready=kept[1])
    assert resumed == whole[2:]
    assert weights.drawn == []


def test_what_goes_wrong_beside_is_raised_after_the_step() -> None:
    def broken(step: int, timers: Timers) -> list[Any]:
        raise RuntimeError(f"step {step}")

    samples = Lookahead(broken, config(1), Timers(), {0: []})
    assert samples.take(0) == []
    samples.start(1)
    with pytest.raises(RuntimeError, match="step 1"):
        samples.settle()
