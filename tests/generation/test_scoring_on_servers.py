"""Whole runs with `teacher.scoring=server`, on real vLLM servers, beside runs whose teacher is in
Megatron. Both sample the same: the first step has the same trajectories."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from launch import launch
from safetensors.torch import load_file
from servers import ENVIRONMENT, HIDDEN, VOCABULARY, settings_on

pytestmark = [pytest.mark.vllm, pytest.mark.distributed]

TOP_K, WIDE = 64, 257
ONE_STEP = ["train.num_steps=1", "checkpoint.export_hf=false"]


def run_training(overrides: list[str]) -> None:
    """On every rank."""
    import sys

    from nemo_trd.config.load import compose
    from nemo_trd.train import launch

    sys.exit(launch(compose(overrides)))


def first_step(
    inputs: Path, urls: dict[str, str], run_dir: Path, *overrides: str, ranks: int = 1
) -> dict[str, float]:
    launch(
        ranks,
        run_training,
        [*settings_on(inputs, urls, run_dir), *ONE_STEP, *overrides],
        timeout=300,
        environment=ENVIRONMENT,
    )
    told = (run_dir / "log.txt").read_text()
    assert f"{urls['teacher']} serves the teacher: its log-probabilities differ by" in told
    (line,) = (run_dir / "metrics.jsonl").read_text().splitlines()
    return json.loads(line)


def assert_equal_steps(served: dict[str, float], held: dict[str, float]) -> None:
    for name in ("loss", "grad_norm", "student_nll", "teacher_nll", "teacher_tail_mass"):
        print(f"{name}: server {served[name]!r}, megatron {held[name]!r}")
        assert served[name] == pytest.approx(held[name], rel=1e-4), name
    assert served["label_tokens"] == held["label_tokens"] > 20
    assert served["loss"] > 0.1
    assert "teacher_entropy" in held and "teacher_entropy" not in served


def test_a_server_scores_as_megatron_does_and_differs_from_the_full_vocabulary_by_its_tail(
    served_models: Path, urls: dict[str, str], tmp_path: Path
) -> None:
    """The bucket joins ids, so its KL is never more than that of more ids, or of all. What is
    missing for a token is T KL(t in the tail || s in the tail), with T its tail mass: at most T
    times the log of the largest 1 / s there, which is at most log(V - k) + (largest - smallest
    logit of the student)."""
    split = ["parallel.student.pipeline_model_parallel_size=2"]  # the loss is on one of the ranks
    top_k, server = f"loss.top_k={TOP_K}", "teacher.scoring=server"
    served = first_step(served_models, urls, tmp_path / "served", top_k, server, *split, ranks=2)
    held = first_step(served_models, urls, tmp_path / "held", top_k)
    assert_equal_steps(served, held)

    wide = first_step(served_models, urls, tmp_path / "wide", f"loss.top_k={WIDE}", server)
    full = first_step(served_models, urls, tmp_path / "full")
    for step in (served, wide):
        assert step["label_tokens"] == full["label_tokens"]
        assert step["student_nll"] == pytest.approx(full["student_nll"], rel=1e-4)
    assert served["loss"] < wide["loss"] < full["loss"]
    weights = load_file(served_models / "student" / "model.safetensors")
    longest = math.sqrt(HIDDEN) * float(weights["model.norm.weight"].abs().max())
    spread = 2 * longest * float(weights["lm_head.weight"].norm(dim=-1).max())
    for step, k in ((served, TOP_K), (wide, WIDE)):
        bound = step["teacher_tail_mass"] * (math.log(VOCABULARY - k) + spread)
        print(f"k {k}: {step['loss']} of {full['loss']}, bound of the difference {bound}")
        assert full["loss"] - step["loss"] <= bound
    assert bound < full["loss"] / 4


def test_in_opsd_the_server_is_the_student_of_step_0(
    served_models: Path, urls: dict[str, str], tmp_path: Path
) -> None:
    """Both models are that of the teacher's server; the student's server is given its weights."""
    opsd = [
        *(
            "algorithm.mode=opsd",
            "model.teacher=null",
            f"model.student.path={served_models / 'teacher'}",
        ),
        "refinement.templates.opsd='{problem} {reference_solution} {rollout}'",
        "refinement.templates.privileged_prompt='{problem} {reference_solution}'",
        *("loss.divergence=reverse_kl", "loss.top_k_tail=renormalize", f"loss.top_k={TOP_K}"),
    ]
    served = first_step(served_models, urls, tmp_path / "served", *opsd, "teacher.scoring=server")
    held = first_step(served_models, urls, tmp_path / "held", *opsd)
    assert_equal_steps(served, held)
