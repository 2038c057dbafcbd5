"""Whole runs of the training entry point: stopping, resuming, failing."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from launch import run_ranks
from tiny_models import make_model

pytestmark = pytest.mark.distributed

STEPS = 4
PP2 = ["parallel.student.pipeline_model_parallel_size=2"]


def run_training(overrides: list[str], fault: str) -> None:
    """On every rank: the entry point, with one thing that goes wrong in it."""
    import os
    import signal
    import sys

    import torch.distributed as dist

    from nemo_trd.config import compose
    from nemo_trd.megatron.student import Student
    from nemo_trd.metrics import RunLogger
    from nemo_trd.train import launch

    record, train_step = RunLogger.step, Student.train_step

    def terminated(self: Any, step: int, *rest: Any) -> None:
        record(self, step, *rest)
        if step == STEPS // 2 and dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    def broken(self: Any, *arguments: Any) -> Any:
        if dist.get_rank() == dist.get_world_size() - 1:
            raise RuntimeError("broken on purpose")
        return train_step(self, *arguments)

    if fault == "SIGTERM":
        RunLogger.step = terminated  # type: ignore[method-assign]
    if fault == "exception":
        Student.train_step = broken  # type: ignore[method-assign]
    sys.exit(launch(compose(overrides)))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models that share a tokenizer, and problems."""
    root = tmp_path_factory.mktemp("inputs")
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    for seed, role in enumerate(("student", "teacher")):
        make_model(root / role, "qwen3", seed=seed, tokenizer=True, **sizes)
    rows = [{"question": f"{n}+1?", "answer": f"so #### {n + 1}"} for n in range(6)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def settings(inputs: Path, run_dir: Path, *overrides: str) -> list[str]:
    sampling = [
        f"generation.{which}.{setting}"
        for which in ("rollout", "refinement")
        for setting in ("max_tokens=12", "temperature=1.0", "top_k=0", "top_p=1.0")
    ]
    return [
        *("model=local", "data=gsm8k", "data.max_prompt_tokens=64", "data.verifier=exact"),
        *(f"model.{role}.path={inputs / role}" for role in ("student", "teacher")),
        *(f"data.train.path={inputs / 'data.jsonl'}", f"run.dir={run_dir}"),
        *("refinement.templates.opd='{problem} {rollout}'", "refinement.max_context_tokens=200"),
        *("refinement.on_failure=rollout", *sampling),
        *(f"train.num_steps={STEPS}", "train.prompts_per_step=4", "precision.dtype=fp32"),
        *("optimizer.lr=1e-3", "logging.progress=false", "logging.samples_interval=2"),
        *overrides,
    ]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """What does not depend on the clock, of every step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds/", "tokens_per_second", "time")
    return [{k: v for k, v in line.items() if not k.startswith(clock)} for line in lines]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_terminated_run_saves_and_resumes_to_the_same_numbers(
    ranks: int, inputs: Path, tmp_path: Path
) -> None:
    layout = PP2 if ranks == 2 else []
    whole, cut = (settings(inputs, tmp_path / name, *layout) for name in ("whole", "cut"))
    assert run_ranks(ranks, run_training, whole, "")[0] == 0
    code, output = run_ranks(ranks, run_training, cut, "SIGTERM")
    assert code != 0 and "stopped on request after step 2" in output
    assert "exitcode  : 75" in output  # of the rank; torchrun's own is another
    assert len(metrics(tmp_path / "cut")) == STEPS // 2
    assert run_ranks(ranks, run_training, cut, "")[0] == 0
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert len(metrics(tmp_path / "cut")) == STEPS
    files = {path.name for path in (tmp_path / "cut").iterdir()}
    assert files >= {"checkpoints", "export", "samples", "summary.json", "config.yaml"}


def test_an_exception_on_one_rank_ends_all_ranks_with_its_cause(
    inputs: Path, tmp_path: Path
) -> None:
    start = time.monotonic()
    code, output = run_ranks(
        2, run_training, settings(inputs, tmp_path / "run", *PP2), "exception", timeout=100
    )
    assert code not in (0, -1)  # failed by itself, not by the time limit
    assert "rank 1 failed first: RuntimeError: broken on purpose" in output
    assert time.monotonic() - start < 90


def test_steps_with_nothing_to_train_on_are_skipped_and_then_stop_the_run(
    inputs: Path, tmp_path: Path
) -> None:
    nothing = ["refinement.on_failure=drop", "generation.refinement.max_tokens=1"]
    overrides = settings(inputs, tmp_path / "run", *nothing, "train.max_failed_steps=2")
    code, output = run_ranks(1, run_training, overrides, "")
    assert code == 1
    assert "2 steps in a row (train.max_failed_steps)" in output
    assert "'rejected_truncated': 4" in output
    assert [("loss" in line) for line in metrics(tmp_path / "run")] == [False, False]


def test_bad_settings_end_every_rank_before_anything_is_written(
    inputs: Path, tmp_path: Path
) -> None:
    overrides = settings(inputs, tmp_path / "run", "parallel.student.tensor_model_parallel_size=3")
    code, output = run_ranks(2, run_training, overrides, "")
    assert code not in (0, -1)
    assert "world size = 2" in output and "Fix: " in output
    assert not (tmp_path / "run").exists()


def test_vanilla_distillation_trains_on_rollouts_through_the_same_loop(
    inputs: Path, tmp_path: Path
) -> None:
    overrides = settings(inputs, tmp_path / "run", "algorithm.trajectory=rollout")
    assert run_ranks(1, run_training, overrides, "")[0] == 0
    for line in metrics(tmp_path / "run"):
        assert line["rejected_subset"] == line["rollouts"] == 4
        assert line["loss"] > 0
