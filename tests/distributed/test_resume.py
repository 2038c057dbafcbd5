"""A run that was saved and resumed equals one that was not interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launch import launch
from test_parallel_layouts import DISTRIBUTED, PP2, TP2, VPP2, trajectories
from tiny_models import make_model

pytestmark = pytest.mark.distributed

HALF = 2


def run_steps(directory: str, overrides: list[str], first: int, last: int, results: str) -> None:
    """On every rank: resume from the checkpoint of step `first`, if not 0, and save at `last`."""
    import torch.distributed as dist

    from nemo_trd.checkpoint_dir import TrainerState, find_checkpoint
    from nemo_trd.config import compose
    from nemo_trd.megatron.checkpoint import Checkpointer
    from nemo_trd.megatron.runtime import init_distributed
    from nemo_trd.megatron.student import Student
    from nemo_trd.megatron.teacher import Teacher

    watch = init_distributed(timeout_minutes=2)
    model_paths = [f"model.{role}.path={directory}/{role}" for role in ("student", "teacher")]
    settings = ["precision.dtype=fp32", "optimizer.lr=1e-2"]
    config = compose(["model=local", *model_paths, *settings, *overrides])
    student = Student(config)
    teacher = Teacher(config, student.groups)
    root = Path(directory) / "checkpoints"
    checkpointer = Checkpointer(config.checkpoint, root, student, needed=0)
    if first:
        checkpoint = find_checkpoint(config.checkpoint, root)
        assert checkpoint is not None and checkpointer.load(checkpoint).step == first
    seen = []
    for step in range(first, last):
        plan = student.pack(trajectories(config, step))
        metrics = student.train_step(plan, teacher.states(plan)).metrics
        seen.append((metrics["loss"], metrics["grad_norm"], metrics["lr"]))
    checkpointer.save(TrainerState(last, last, 0, 7, config.digest(), {}))
    checkpointer.wait()
    checkpointer.close()
    if dist.get_rank() == 0:
        Path(results).write_text(json.dumps(seen))
    watch.close()


def steps(directory: Path, ranks: int, overrides: list[str], first: int, last: int) -> Any:
    results = directory / "results.json"
    launch(ranks, run_steps, str(directory), overrides, first, last, str(results))
    return json.loads(results.read_text())


def models(directory: Path) -> Path:
    sizes = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    make_model(directory / "student", "qwen3", tie_word_embeddings=True, **sizes)
    make_model(directory / "teacher", "qwen3", seed=1, **sizes)
    return directory


def test_resuming_on_one_layout_is_bitwise_past_cut_and_damaged_saves(tmp_path: Path) -> None:
    whole = steps(models(tmp_path / "whole"), 1, [], 0, 2 * HALF)
    broken = models(tmp_path / "broken")
    assert steps(broken, 1, ["checkpoint.async_save=true"], 0, HALF) == whole[:HALF]
    cut = broken / "checkpoints" / "step_00000009.partial"  # what a killed save leaves behind
    cut.mkdir()
    damaged = broken / "checkpoints" / "step_00000008"
    damaged.mkdir()
    (damaged / "trainer_state.json").write_text('{"step": 8, "files": {"x.distcp": 10}}')
    assert steps(broken, 1, [], HALF, 2 * HALF) == whole[HALF:]


@pytest.mark.parametrize(("ranks", "layout"), [(4, TP2 + PP2), (2, PP2 + VPP2), (2, DISTRIBUTED)])
def test_resuming_on_another_layout_agrees(ranks: int, layout: list[str], tmp_path: Path) -> None:
    optimizer = layout if layout == DISTRIBUTED else []
    whole = steps(models(tmp_path / "whole"), 1, optimizer, 0, 2 * HALF)
    broken = models(tmp_path / "broken")
    steps(broken, 1, optimizer, 0, HALF)
    resumed = steps(broken, ranks, layout, HALF, HALF + 1)
    resumed += steps(broken, 1, optimizer, HALF + 1, 2 * HALF)  # and back again
    for step, expected in zip(resumed, whole[HALF:], strict=True):
        assert step == pytest.approx(expected, rel=1e-5)
