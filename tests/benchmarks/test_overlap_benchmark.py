"""benchmarks/overlap.py: what it computes from the metrics of two runs, and what it starts."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
from scripts import load_script

from nemo_trd.config.load import compose

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "overlap.py"
ON_POLICY = {"rollout": 2.0, "refinement": 1.0, "teacher": 1.0, "student": 4.0, "step": 8.5}


@pytest.fixture(scope="module")
def benchmark() -> Any:
    return load_script(FILE)


def test_the_ideal_is_the_longer_side_over_both_and_only_the_ratio_has_the_rest_of_a_step(
    benchmark: Any,
) -> None:
    overlapped = {**ON_POLICY, "wait_for_samples": 0.1, "step": 5.1}
    found = benchmark.ratios(ON_POLICY, overlapped)
    assert found == {"ratio": pytest.approx(5.1 / 8.5), "ideal_ratio": pytest.approx(5 / 8)}
    longer_rollouts = {**ON_POLICY, "rollout": 9.0}
    assert benchmark.ratios(longer_rollouts, overlapped)["ideal_ratio"] == pytest.approx(10 / 15)


def test_steps_of_the_warm_up_and_the_last_one_do_not_count(benchmark: Any) -> None:
    lines = [{"step": n, "loss": 1.0, "seconds/step": float(10**n)} for n in range(1, 6)]
    lines[3]["seconds/weight_sync"] = 3.0  # a phase that one step had not
    seconds = benchmark.mean_seconds(lines, 2)
    assert seconds == {"step": pytest.approx(5500.0), "weight_sync": pytest.approx(1.5)}
    with pytest.raises(ValueError, match="leave none to count"):
        benchmark.mean_seconds(lines, 4)


def test_repeats_are_pooled_and_each_is_shown(benchmark: Any) -> None:
    slower = {phase: 3 * value for phase, value in ON_POLICY.items()}
    seconds = {"0": benchmark.pooled([ON_POLICY, slower]), "1": {**ON_POLICY, "step": 12.0}}
    assert seconds["0"]["step"] == pytest.approx(17.0)
    each = [{"ratio": 0.5, "ideal_ratio": 0.6}, {"ratio": 0.7, "ideal_ratio": 0.8}]
    result = {**benchmark.ratios(seconds["0"], seconds["1"]), "seconds": seconds, "repeats": each}
    shown = benchmark.table(result)
    assert "| student | 8.00 | 4.00 |" in shown
    assert "ratio 0.706, ideal 0.625: 1.13 times it, at most 1.15" in shown
    assert "0.500 (0.600), 0.700 (0.800)" in shown
    result["ratio"] = 0.72
    assert "MORE THAN 1.15" in benchmark.table(result)


def test_its_runs_differ_in_staleness_only_and_their_settings_are_valid(
    benchmark: Any, tmp_path: Path
) -> None:
    args = argparse.Namespace(prompts=3, max_tokens=7, steps=4, warm_up=1)
    urls = {"student": "http://127.0.0.1:1", "teacher": "http://127.0.0.1:2"}
    runs = [
        compose(benchmark.settings(args, tmp_path, urls, tmp_path / "run", staleness)).model_dump()
        for staleness in (0, 1)
    ]
    assert [run["generation"].pop("max_staleness") for run in runs] == [0, 1]
    assert runs[0] == runs[1]
    assert runs[0]["train"]["num_steps"] == 6


def test_what_is_started_on_some_cores_stays_there_and_the_caller_does_not(benchmark: Any) -> None:
    before = os.sched_getaffinity(0)
    core = max(before)
    with benchmark.on_cores([core]):
        assert os.sched_getaffinity(0) == {core}
    assert os.sched_getaffinity(0) == before
