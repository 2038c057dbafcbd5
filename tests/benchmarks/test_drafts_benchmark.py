"""benchmarks/drafts.py: what it asks the servers for, and what it shows."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from scripts import load_script

from nemo_trd.data.types import Completion

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "drafts.py"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FILE.parent))
    return load_script(FILE)


class Rewriter:
    """Accepts half of eight drafted tokens of each of its rewrites, which have as many tokens."""

    def generate(self, asked: Any, sampling: Any, description: str) -> list[Completion]:
        return [Completion((1,) * 8, "length", 0, drafts=(8, 4)) for _ in asked]


def test_acceptance_is_that_of_the_rewrites_with_drafts(benchmark: Any, tmp_path: Path) -> None:
    args = argparse.Namespace(model=tmp_path, problems=tmp_path / "p.jsonl", max_tokens=8)
    assert benchmark.configured(args).generation.refinement.max_tokens == 8
    both = {"without": Rewriter(), "with": Rewriter()}
    figures, rewrites = benchmark.rewrite(both, [1, 2, 3], benchmark.sampling(args, 0), 2)
    assert rewrites["with"] == rewrites["without"] and len(rewrites["with"]) == 3
    assert figures["tokens"] == {"without": 24, "with": 24}
    assert (figures["draft_acceptance"], figures["tokens_per_decode_step"]) == (0.5, 2)
    row = {**figures, "seconds": {"without": 4.0, "with": 3.0}, "ratio": 0.75}
    result = {"greedy": row, "sampled": row, "rewrites": 3, "different": 0, "temperature": 0.7}
    shown = benchmark.table(result)
    assert "| T = 0.7 | 4.0 s | 3.0 s | 0.75 | 50.0% | 2.00 |" in shown
