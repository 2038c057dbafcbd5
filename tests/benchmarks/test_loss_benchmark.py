"""benchmarks/loss.py: every strategy runs, computes the same loss, and is reported."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import oracles
import pytest
from scripts import load_script

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "loss.py"
SIZES = {"tokens": 96, "vocab": 500, "hidden": 16, "chunk_size": 32, "threads": 1}
NEEDED = {"modelopt": oracles.MODELOPT, "trl": oracles.TRL, "liger": "liger_kernel.chunked_loss"}


@pytest.fixture(scope="module")
def benchmark() -> Any:
    return load_script(FILE)


def measured(benchmark: Any, strategy: str, **settings: Any) -> dict[str, Any]:
    defaults = {"dtype": "fp32", "divergence": "forward_kl", "beta": 0.5, "repeats": 1}
    return benchmark.measure(
        argparse.Namespace(strategy=strategy, **{**SIZES, **defaults, **settings})
    )


@pytest.mark.parametrize("strategy", ["chunked", "modelopt", "trl", "liger", "ours"])
def test_every_strategy_computes_the_loss_of_dense(benchmark: Any, strategy: str) -> None:
    if strategy in NEEDED:
        oracles.need(NEEDED[strategy])
    for divergence in oracles.DIVERGENCES:
        if (strategy, divergence) == ("modelopt", "jsd"):
            continue
        dense = measured(benchmark, "dense", divergence=divergence)
        row = measured(benchmark, strategy, divergence=divergence)
        assert row["loss"] == pytest.approx(dense["loss"], rel=1e-4)
        assert row["grad_error"] < 1e-5
        assert row["seconds"] > 0 and row["peak_gb"] >= 0


def test_the_command_line_writes_rows_a_table_and_a_plot(
    benchmark: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    files = [f"--json={tmp_path / 'loss.json'}", f"--plot={tmp_path / 'memory.png'}"]
    path = os.pathsep.join(filter(None, [str(FILE.parents[1]), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)  # of the processes that it starts
    monkeypatch.setattr(sys, "argv", [str(FILE), "--only", "ours", *sizes, *files])
    measure_apart, rows = benchmark.measure_apart, []

    def measure_once(args: argparse.Namespace, strategy: str, tokens: int) -> dict[str, Any]:
        if rows:  # for the plot, with fewer tokens
            return rows[0] | {"tokens": tokens}
        rows.append(measure_apart(args, strategy, tokens))
        return rows[0]

    monkeypatch.setattr(benchmark, "measure_apart", measure_once)
    benchmark.main()
    (row,) = json.loads((tmp_path / "loss.json").read_text())
    assert {"name", "seconds", "peak_gb", "grad_error"} <= row.keys()
    assert row["name"] == "ours" and row["tokens"] == SIZES["tokens"]
    assert "| ours |" in capsys.readouterr().out
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_has_ratios_to_chunked_and_says_what_did_not_run(benchmark: Any) -> None:
    numbers = {"peak_gb": 4.0, "seconds": 8.0, "grad_error": 1e-7}
    ours = {"peak_gb": 1.0, "seconds": 2.0, "grad_error": 1e-7}
    rows = [{"name": "chunked", **numbers}, {"name": "ours", **ours}]
    lines = benchmark.table([*rows, {"name": "trl", "failed": "no module"}]).splitlines()
    assert lines[-3:] == [
        "| chunked | 4.00 | 1.00 | 8.00 | 1.00 | 1.0e-07 |",
        "| ours | 1.00 | 0.25 | 2.00 | 0.25 | 1.0e-07 |",
        "| trl | not run: no module | | | | |",
    ]
