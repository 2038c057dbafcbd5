"""benchmarks/generation.py: what it computes from pairs, and what it pairs."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import FakeVllm
from pooled_generator import SAMPLING, expected, generator, requests
from scripts import load_script

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "generation.py"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FILE.parent))
    return load_script(FILE)


def seconds(rollout: float, refinement: float) -> dict[str, float]:
    return {"rollout": rollout, "refinement": refinement}


def test_ratios_are_of_sums_over_the_pairs(benchmark: Any) -> None:
    pairs = [
        {"two_phases": seconds(3, 1), "streamed": seconds(3, 0.5)},
        {"two_phases": seconds(1, 3), "streamed": seconds(1, 2.5)},
        {"two_phases": seconds(3, 1), "streamed": seconds(3, 0.8)},
    ]
    found = benchmark.ratios(pairs)
    assert found == {"ratio": pytest.approx(10.8 / 12), "ideal_ratio": pytest.approx(7 / 12)}
    result = {**found, "pairs": [{**p, **benchmark.ratios([p])} for p in pairs]}
    scores = {
        "bytes": {"json": 6000.0, "binary": 520.0},
        "client": {"json": 1.5, "binary": 0.01},
        "seconds": {"with_scores": 2.0},
    }
    shown = benchmark.table(
        {**result, "different_samples": 0, "client_seconds": 0.005, "scores": scores}
    )
    assert "| 6000 | 520 | 11.5 |" in shown and "| 1.5000 | 0.0100 | 150.0 |" in shown
    assert "with scores: 2.00 s for 1,000 labels" in shown
    assert "| refinement | 1.67 | 1.27 |" in shown and "MORE THAN 1.15" in shown
    assert "0.875 (0.750)" in shown and "client: 5.0 ms" in shown


def test_the_two_phases_ask_the_teacher_after_the_last_rollout(benchmark: Any) -> None:
    """The same completions; nothing is asked while one request is not known."""
    asked = requests(4)
    completions: dict[int, Any] = {}

    async def run() -> int:
        loop = asyncio.get_running_loop()
        pending: list[Any] = [loop.create_future() for _ in asked]
        for future, request in zip(pending[:-1], asked, strict=False):
            future.set_result(request)
        phases = benchmark.AfterTheLast(generator(server))
        task = asyncio.create_task(
            phases.stream(pending, SAMPLING, "refinements", completions.__setitem__)
        )
        await asyncio.sleep(0.2)
        before = server.asked
        pending[-1].set_result(asked[-1])
        await task
        return before

    with FakeVllm() as server:
        assert asyncio.run(run()) == 0
    assert [completions[position] for position in range(len(asked))] == expected(asked)


def test_its_settings_are_valid(benchmark: Any, tmp_path: Path) -> None:
    args = argparse.Namespace(prompts=3, max_tokens=7, steps=4, warm_up=0, concurrency=5)
    urls = {"student": "http://127.0.0.1:1", "teacher": "http://127.0.0.1:2"}
    generation = benchmark.configured(args, tmp_path, urls).generation
    assert generation.vllm.client.max_concurrency == 5
    assert (generation.rollout.top_k, generation.refinement.top_p) == (0, 1)
