"""benchmarks/weight_sync.py: what its servers are started for, what it sums up, and a tiny run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from scripts import load_script
from tiny_models import make_model

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "weight_sync.py"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FILE.parent))
    return load_script(FILE)


def test_servers_differ_in_what_they_are_given_only(benchmark: Any, tmp_path: Path) -> None:
    args = argparse.Namespace(model=tmp_path, rank=16, backend="gloo")
    merged, adapter = (benchmark.configured(args, tmp_path, what) for what in benchmark.KINDS)
    assert merged.served_adapter is None and adapter.served_adapter.rank == 16
    settings = [config.model_dump() for config in (merged, adapter)]
    synced = [of_kind["generation"]["vllm"].pop("weight_sync") for of_kind in settings]
    assert settings[0] == settings[1]
    assert {name for name in synced[0] if synced[0][name] != synced[1][name]} == {
        "what",
        "directory",
    }


def test_bytes_are_compared_and_seconds_are_medians_without_the_first_round(benchmark: Any) -> None:
    seconds = [(9.0, 9.0), (2.0, 0.1), (4.0, 0.3), (3.0, 0.2)]
    rounds = [
        {
            "merged": {"bytes": 4000.0, "sync": sync, "first_token": token, "next_token": 0.1},
            "adapter": {"bytes": 100.0, "sync": sync / 10, "first_token": 1.0, "next_token": 0.5},
        }
        for sync, token in seconds
    ]
    result = benchmark.summed_up(rounds)
    merged = {"bytes": 4000, "sync": 3.0, "first_token": 0.2, "next_token": 0.1}
    assert result["merged"] == merged
    assert result["adapter"]["sync"] == pytest.approx(0.3)
    shown = benchmark.table({**result, "difference": 2e-6})
    assert "| `merged` | 0.0 | 3.00 | 0.20 | 0.10 |" in shown
    assert "40.0 times fewer bytes" in shown and "2.0e-06" in shown


@pytest.mark.vllm
@pytest.mark.slow
def test_a_run_with_a_tiny_model(benchmark: Any, tmp_path: Path) -> None:
    sizes = {"head_dim": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    model = make_model(tmp_path / "model", "qwen3", tokenizer=True, vocab_size=261, **sizes)
    args = argparse.Namespace(model=model, rank=1, backend="file", repeats=1)
    result = benchmark.measure(args, tmp_path)
    assert result["difference"] < benchmark.CLOSE
    assert result["times_fewer_bytes"] > 10
    assert all(result[what][name] > 0 for what in benchmark.KINDS for name in benchmark.SECONDS)
