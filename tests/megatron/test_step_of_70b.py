"""A training step of a rank of trd_70b at its true shapes, on fake tensors.

TransformerEngine's Python and megatron-core's schedule run as on a GPU. A fake tensor has no
values, so that whatever would read one back to the host between the first micro-batch and the last
ends the step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WORLD, RANK = 32, 24  # TP 8, PP 4: the first rank of the last stage
TRAJECTORIES = 4


def test_a_step_of_the_last_stage_passes_and_reads_nothing_back(tmp_path: Path) -> None:
    output = launch(1, check_step, str(tmp_path), timeout=500, transformer_engine=True)
    assert "the step has passed" in output


def check_step(directory: str) -> None:
    from contextlib import ExitStack
    from unittest import mock

    import torch
    from fake_world import on_the_host, rank_of

    from nemo_trd.config.load import compose
    from nemo_trd.data.types import Trajectory
    from nemo_trd.megatron import hand_over, loss_head
    from nemo_trd.megatron import student as student_module
    from nemo_trd.megatron import teacher as teacher_module
    from nemo_trd.plan.shapes import SHIPPED

    shape = json.loads((SHIPPED / "Llama-3.3-70B-Instruct.json").read_text())
    (Path(directory) / "config.json").write_text(json.dumps(shape))
    config = compose(["experiment=trd_70b", f"model.student.path={directory}"])
    prompt, context = config.data.max_prompt_tokens, config.refinement.max_context_tokens
    answer = (1,) * config.generation.refinement.max_tokens
    trajectories = [
        Trajectory(i, 0, "refinement", (1,) * prompt, (1,) * context, answer, 0)
        for i in range(TRAJECTORIES)
    ]

    def output_weight(hf: Any, *_: Any, dtype: Any, device: Any, rows: int) -> torch.Tensor:
        return torch.empty(rows, hf.hidden_size, dtype=dtype, device=device)

    with rank_of(RANK, WORLD) as tensors, ExitStack() as patches:
        for module in (student_module, teacher_module):
            patches.enter_context(mock.patch.object(module, "load_hf_weights"))
            run = nothing_is_read_within(module.run_schedule, tensors)
            patches.enter_context(mock.patch.object(module, "run_schedule", run))
        patches.enter_context(mock.patch.object(loss_head, "read_output_weight", output_weight))
        pieces = on_the_host(hand_over._pieces_of_rank)
        patches.enter_context(mock.patch.object(hand_over, "_pieces_of_rank", pieces))
        tensors.answers = True
        student = student_module.Student(config)
        teacher = teacher_module.Teacher(config, student.groups)
        plan = on_the_host(student.pack)(trajectories)
        states = teacher.states(plan)
        labels = [len(micro_batch.labels) for micro_batch in plan[0]]
        assert len(labels) > 1 and sum(labels) == TRAJECTORIES * len(answer)
        assert [tuple(s.shape) for s in states if s is not None] == [
            (n, shape["hidden_size"]) for n in labels
        ]
        student.train_step(plan, states)
    assert student.models[0].config.transformer_impl == "transformer_engine"
    print("the step has passed", flush=True)


def nothing_is_read_within(run_schedule: Any, tensors: Any) -> Any:
    """A pass in which reading is an error, from its first micro-batch to its last."""

    def run(chunks: Any, *args: Any, **options: Any) -> Any:
        config = chunks[0].config
        finish = config.finalize_model_grads_func

        def behind_the_last(*args: Any, **kwargs: Any) -> None:
            tensors.answers = True
            finish(*args, **kwargs)

        config.finalize_model_grads_func = finish and behind_the_last
        tensors.answers = False
        result = run_schedule(chunks, *args, **options)
        tensors.answers = True
        config.finalize_model_grads_func = finish
        return result

    return run
