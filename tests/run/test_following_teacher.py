"""Whole runs whose teacher follows the student, and writes the rewrites as it is then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch
from tiny_models import make_model
from training_run import settings

pytestmark = pytest.mark.distributed


def run_in_turn(runs: list[list[str]]) -> None:
    """On one rank: a run for each list of settings; then who rewrites has the teacher's weights."""
    from nemo_trd.config.load import compose
    from nemo_trd.train import launch, train

    def trained(run: Any) -> int:
        assert train(run) == 0
        rewriting = run._generators.teacher.model.state_dict()
        answering = run._generators.student.model.state_dict()
        for name, tensor in run.student.export_teacher_weights():
            assert torch.equal(rewriting[name], tensor), name
        assert any(not torch.equal(rewriting[name], answering[name]) for name in answering)
        return 0

    for overrides in runs:
        assert launch(compose(overrides), trained) == 0


@pytest.mark.parametrize("adapter", [[], ["student.adapter=lora"]], ids=["all", "adapter"])
def test_rewrites_are_the_averages_also_when_a_run_goes_on(
    adapter: list[str], tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    make_model(tmp_path / "student", "qwen3", tokenizer=True, **sizes)
    rows = [{"question": f"{n}+1?", "answer": f"so #### {n + 1}"} for n in range(6)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(name: str, steps: int) -> list[str]:
        own = settings(tmp_path, tmp_path / name, *adapter, f"train.num_steps={steps}")
        own = [s for s in own if not s.startswith("model.teacher.path")]
        own += ["refinement.templates.opsd='{problem} {reference_solution} {rollout}'"]
        own += ["refinement.templates.privileged_prompt='{problem} {reference_solution}'"]
        own += ["optimizer.schedule=constant", "optimizer.warmup_fraction=0.0"]
        return [*own, "algorithm.mode=opsd", "model.teacher=null", "teacher.ema=0.5"]

    launch(1, run_in_turn, [run("whole", 4), run("parts", 2), run("parts", 4)])
    whole, parts = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("whole", "parts")
    )
    assert len(whole) == len(parts) == 4
    for figure in ("loss", "grad_norm", "generated_tokens"):
        assert [line[figure] for line in whole] == [line[figure] for line in parts]
