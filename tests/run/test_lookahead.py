"""Samples of the next step are drawn beside this one, and never from other weights."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from nemo_trd.records.timers import Timers
from nemo_trd.run.lookahead import Lookahead, RunAhead

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


def ahead(
    weights: Any, ready: dict[int, list[Any]] | None = None, agree: Any = lambda step: step
) -> tuple[RunAhead, Timers]:
    settings, timers = config(2), Timers()
    settings.train.num_steps = 6
    return RunAhead(weights.sample, settings, timers, ready or {}, agree), timers


class GatedWeights(Weights):
    """Each step is drawn when it may be."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = [threading.Event() for _ in range(6)]
        self.asked = [threading.Event() for _ in range(6)]

    def sample(self, step: int, timers: Timers) -> list[Any]:
        self.asked[step].set()
        assert self.gates[step].wait(60)
        return super().sample(step, timers)


def test_with_staleness_2_two_steps_are_drawn_while_one_trains_and_weights_change() -> None:
    weights = GatedWeights()
    samples, timers = ahead(weights)
    weights.gates[0].set()
    assert samples.take(0) == [(0, 0)]
    samples.start(1)
    assert weights.asked[1].wait(60)
    weights.version = 1  # nobody waits for what is under way
    samples.settle()
    weights.gates[1].set(), weights.gates[2].set()
    assert samples.take(1) == [(1, 1)]
    assert not weights.asked[3].wait(0.2)  # until the next step trains
    samples.start(2)
    assert weights.asked[3].wait(60)
    assert set(samples.kept(ending=False)) <= {2}
    weights.gates[3].set()
    assert set(samples.kept(ending=True)) == {2, 3}
    assert weights.drawn == [0, 1, 2, 3] and set(weights.thread) == {"run-ahead"}
    assert {"rollout", "wait_for_samples", "wait_for_training"} == set(timers.phases())


def test_a_rank_that_ends_draws_what_another_has_begun() -> None:
    weights = GatedWeights()
    for gate in weights.gates:
        gate.set()
    samples, _ = ahead(weights, agree=lambda step: step + 1)
    samples.take(0)
    samples.start(1)
    kept = samples.kept(ending=True)
    assert sorted(kept) == list(range(1, max(kept) + 1)) and weights.drawn[-1] == max(kept)


def test_what_was_drawn_ahead_is_not_drawn_again() -> None:
    weights = GatedWeights()
    for gate in weights.gates:
        gate.set()
    samples, _ = ahead(weights, {1: [("kept", 1)], 2: [("kept", 2)]})
    assert samples.take(1) == [("kept", 1)]
    samples.start(2)
    assert samples.take(2) == [("kept", 2)]
    assert samples.take(3) == [(3, 0)]
    assert weights.drawn[0] == 3


def test_what_goes_wrong_far_ahead_is_raised_when_its_step_comes() -> None:
    def broken(step: int, timers: Timers) -> list[Any]:
        if step == 2:
            raise OSError("servers are gone")
        return []

    settings = config(2)
    samples = RunAhead(broken, settings, Timers(), {}, agree=lambda step: step)
    for step in range(2):
        assert samples.take(step) == []
        samples.start(step + 1)
    with pytest.raises(OSError, match="servers are gone"):
        samples.take(2)
    with pytest.raises(OSError, match="servers are gone"):
        samples.kept(ending=True)
