"""benchmarks/packing.py: its ways compute the same, and what it makes of their figures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from launch import launch
from scripts import load_script

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "packing.py"


@pytest.fixture(scope="module")
def benchmark() -> Any:
    return load_script(FILE)


def measure_all(case: dict[str, Any], results: str) -> None:
    """On one rank: every way, one after the other."""
    module = load_script(FILE)
    Path(results).write_text(json.dumps({way: module.measure(case, way) for way in module.WAYS}))


@pytest.mark.distributed
def test_all_ways_have_one_loss(benchmark: Any, tmp_path: Path) -> None:
    sizes = benchmark.TOY | {"hidden_size": 16, "head_dim": 8, "num_hidden_layers": 1}
    case = {"name": "tiny", "lengths": [(4, 9), (2, 1), (7, 20)], "sizes": sizes, "budget": 64}
    launch(1, measure_all, case, str(tmp_path / "seen.json"))
    seen = json.loads((tmp_path / "seen.json").read_text())
    result = benchmark.compare(case, 1, lambda _, way: seen[way])  # refuses losses that differ
    computed = {way: (row["tokens"], row["real"]) for way, row in result["ways"].items()}
    assert computed == {"packed": (40, 40), "one_by_one": (40, 40), "padded": (2 * 26 + 2, 40)}
    assert min(row["seconds"] for row in result["ways"].values()) > 0
    assert "| tiny | packed | 1.000 |" in benchmark.table([result])


def test_rows_are_sorted_and_padding_counts(benchmark: Any) -> None:
    lengths = [(2, 3), (10, 11), (4, 3)]
    assert benchmark.micro_batches(lengths, 26, "padded") == [[(10, 11)], [(4, 3), (2, 3)]]
    assert benchmark.micro_batches(lengths, 26, "packed") == [[(10, 11), (4, 3)], [(2, 3)]]


def test_medians_are_compared_and_other_losses_refused(benchmark: Any) -> None:
    case = {"name": "x", "lengths": [(1, 2)]}
    runs = iter([9.0, 1, 4, 1, 1, 4, 2, 1, 8] * 2)
    figures = {"loss": 1.0, "tokens": 2, "real": 2, "bytes": 4}
    result = benchmark.compare(case, 3, lambda *_: {**figures, "seconds": next(runs)})
    assert {way: row["time_ratio"] for way, row in result["ways"].items()} == {
        "packed": 0.5,
        "one_by_one": 0.25,
        "padded": 1.0,
    }
    losses = iter([1.0, 1.0, 1.1])
    with pytest.raises(RuntimeError, match="losses differ"):
        benchmark.compare(case, 1, lambda *_: {**figures, "seconds": 1.0, "loss": next(losses)})


def test_a_case_without_its_data_is_left_out_with_the_reason(
    benchmark: Any, tmp_path: Path
) -> None:
    args = argparse.Namespace(cases=["smollm2"], gsm8k=tmp_path / "none", problems=2, layers=1)
    (case,) = benchmark.make_cases(args)
    result = benchmark.compare(case, 1)
    assert "none" in result["left_out"]
    assert "| smollm2 | left out: " in benchmark.table([result])
