"""A student that has given its memory back for a while goes on as if it had not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launch import launch
from tiny_models import make_model

pytestmark = pytest.mark.distributed

STEPS = 3


def train(overrides: list[str], given_back: bool, record: str) -> None:
    """On every rank: `STEPS` steps, between which the student gives its memory back."""
    import torch
    import torch.distributed as dist

    from nemo_trd.config.load import compose
    from nemo_trd.data.types import Trajectory
    from nemo_trd.distributed.process import init_distributed
    from nemo_trd.megatron.student import Student
    from nemo_trd.megatron.teacher import Teacher

    def tokens(start: int, count: int) -> tuple[int, ...]:
        return tuple((start + 7 * i) % 60 for i in range(count))

    def held(student: Student) -> int:
        """Bytes of all that a step needs: weights, gradients, moments."""
        tensors = [t for c in student.chunks for t in (*c.parameters(), *c.module.buffers())]
        tensors += [t.main_grad for c in student.chunks for t in c.parameters()]
        inner = [o.optimizer for o in student.optimizer.chained_optimizers]
        tensors += [t for o in inner for state in o.state.values() for t in state.values()]
        tensors += [t for o in inner for group in o.param_groups for t in group["params"]]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        return sum(storage.nbytes() for storage in storages.values())

    def in_fp8(student: Student) -> list[Any]:
        """TransformerEngine's layers keep their weights in that form from step to step."""
        modules = [module for model in student.models for module in model.modules()]
        return [w for m in modules for w in getattr(m, "_fp8_workspaces", {}).values()]

    watch = init_distributed(timeout_minutes=2)
    config = compose(overrides)
    student = Student(config)
    teacher = Teacher(config, student.groups)
    trajectories = [
        Trajectory(i, 0, "refinement", tokens(i, 4), tokens(i, 5), tokens(i, n), 0)
        for i, n in enumerate((5, 1, 6, 3))
    ]
    seen = []
    for _ in range(STEPS):
        micro_batches = student.pack(trajectories)
        states = teacher.states(micro_batches)
        seen.append(student.train_step(micro_batches, states).metrics)
        if given_back:
            before = held(student)
            assert bool(in_fp8(student)) == (config.precision.fp8 is not None)
            head = student._head.teacher_weight
            with student.offloaded():
                assert held(student) == 0 < before
                assert not in_fp8(student)
                assert head is None or head.untyped_storage().nbytes() == 0
            assert held(student) == before
    weights = {name: float(t.double().sum()) for name, t in student.export_hf_weights()}
    if dist.get_rank() == 0:
        Path(record).write_text(json.dumps([seen, weights]))
    assert torch.isfinite(torch.tensor([step["loss"] for step in seen])).all()
    watch.close()


@pytest.mark.parametrize(
    ("dtype", "optimizer", "fp8"),
    [("fp32", "false", "null"), ("bf16", "true", "null"), ("bf16", "true", "hybrid")],
)
def test_steps_are_the_same_when_memory_was_given_back_between_them(
    dtype: str, optimizer: str, fp8: str, tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"head_dim": 8, "num_attention_heads": 4, "num_hidden_layers": 2}
    for seed, role in enumerate(("student", "teacher")):
        make_model(tmp_path / role, "qwen3", seed=seed, tie_word_embeddings=True, **sizes)
    overrides = [f"model.{role}.path={tmp_path / role}" for role in ("student", "teacher")]
    overrides += ["model=local", f"precision.dtype={dtype}", f"optimizer.distributed={optimizer}"]
    overrides += ["optimizer.lr=1e-2", f"run.dir={tmp_path / 'run'}", f"precision.fp8={fp8}"]
    for given_back in (False, True):
        record = str(tmp_path / f"{given_back}.json")
        launch(2, train, overrides, given_back, record, transformer_engine=fp8 != "null")
    without, with_it = (json.loads((tmp_path / f"{b}.json").read_text()) for b in (False, True))
    assert with_it == without
    assert len({step["loss"] for step in with_it[0]}) == STEPS
