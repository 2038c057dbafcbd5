"""What a resumed run takes from its checkpoint, what from its settings, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_model

from nemo_trd.checkpoint_dir import TrainerState
from nemo_trd.config import compose
from nemo_trd.megatron.checkpoint import Checkpointer
from nemo_trd.megatron.student import Student, scheduled_lr

FP32, BF16 = ["precision.dtype=fp32"], ["precision.dtype=bf16"]
DISTRIBUTED = ["optimizer.distributed=true"]
BEFORE = ["train.num_steps=8", "optimizer.lr=1e-2", "optimizer.weight_decay=0.1"]
CHANGES = [
    *("optimizer.lr=4e-3", "optimizer.min_lr=1e-3", "optimizer.warmup_fraction=0.25"),
    *("optimizer.weight_decay=0.3", "optimizer.betas=[0.8,0.7]", "optimizer.eps=1e-3"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48}
    return make_model(tmp_path_factory.mktemp("resume") / "model", "qwen3", **sizes)


def student(model: Path, root: Path, *overrides: str) -> tuple[Student, Checkpointer]:
    paths = [f"model.{role}.path={model}" for role in ("student", "teacher")]
    config = compose(["model=local", *paths, *BEFORE, *overrides])
    made = Student(config)
    return made, Checkpointer(config.checkpoint, root, made)


def update(student: Student, numbers: range) -> list[float]:
    """Updates with gradients that depend on their number alone; their learning rates."""
    rates = []
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for parameter in (p for chunk in student.chunks for p in chunk.parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.main_grad.copy_(noise)
        rates.append(student.update()["lr"])
    return rates


def weights(student: Student) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for m in student.models for p in m.parameters()])


@pytest.mark.parametrize("kind", [[], DISTRIBUTED], ids=["plain", "distributed"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_settings_of_the_optimizer_are_those_of_the_run_not_of_its_checkpoint(
    kind: list[str], dtype: list[str], model: Path, one_rank: Any, tmp_path: Path
) -> None:
    before, saver = student(model, tmp_path, *kind, *dtype)
    update(before, range(3))
    saver.save(TrainerState(3, 3, 0, 7, "", {}))
    after, loader = student(model, tmp_path, *kind, *dtype, *CHANGES, "train.num_steps=15")
    loader.load(tmp_path / "step_00000003")
    rates = update(after, range(3, 6))  # of 16 steps the first 4 warm up
    expected = [4e-3, *(1e-3 + 3e-3 * (1 + math.cos(math.pi * n / 12)) / 2 for n in (1, 2))]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert [scheduled_lr(after._config.optimizer, 15, n) for n in (4, 5, 6)] == rates
    decays = set()
    for group in after.optimizer.param_groups:
        assert (group["max_lr"], group["min_lr"], group["eps"]) == (4e-3, 1e-3, 1e-3)
        assert tuple(group["betas"]) == (0.8, 0.7) and group["lr"] == rates[-1]
        decays.add(group["weight_decay"])
    assert decays == {0.3, 0.0}  # none for norms
    # As if the run had been given these settings while it was going on.
    for group, new in zip(before.optimizer.param_groups, after.optimizer.param_groups, strict=True):
        group |= {k: v for k, v in new.items() if k not in ("params", "lr", "step")}
    before.scheduler = after.scheduler
    after.scheduler.optimizer, after.scheduler.num_steps = before.optimizer, 3
    assert update(before, range(3, 6)) == rates
    assert torch.equal(weights(before), weights(after))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("first", [[], DISTRIBUTED], ids=["to-distributed", "from-distributed"])
def test_a_run_goes_on_bit_for_bit_with_the_other_kind_of_optimizer(
    first: list[str], dtype: list[str], model: Path, one_rank: Any, tmp_path: Path
) -> None:
    same = [*dtype, "optimizer.clip_grad=0"]  # the two add up the gradient's norm in other orders
    whole, saver = student(model, tmp_path, *first, *same)
    update(whole, range(3))
    saver.save(TrainerState(3, 3, 0, 7, "", {}))
    other = [] if first else DISTRIBUTED
    resumed, loader = student(model, tmp_path, *other, *same)
    loader.load(tmp_path / "step_00000003")
    assert type(resumed.optimizer.chained_optimizers[0]) is not type(
        whole.optimizer.chained_optimizers[0]
    )
    assert update(resumed, range(3, 6)) == update(whole, range(3, 6))
    assert torch.equal(weights(resumed), weights(whole))


@pytest.mark.parametrize("kind", [[], DISTRIBUTED], ids=["plain", "distributed"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_a_checkpoint_from_before_the_first_update_can_be_resumed(
    kind: list[str], dtype: list[str], model: Path, one_rank: Any, tmp_path: Path
) -> None:
    whole, saver = student(model, tmp_path, *kind, *dtype)
    saver.save(TrainerState(1, 0, 1, 7, "", {}))  # its only step had nothing to train on
    resumed, loader = student(model, tmp_path, *kind, *dtype)
    loader.load(tmp_path / "step_00000001")
    assert update(resumed, range(2)) == update(whole, range(2))
    assert torch.equal(weights(resumed), weights(whole))
