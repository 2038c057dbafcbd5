"""The passes of a training step on a rank of trd_70b, at its true shapes, on fake tensors.

TransformerEngine's Python and megatron-core's schedule run as on a GPU. A fake tensor has no
values, so that whatever would read one back to the host between the first micro-batch and the last
ends the step. What follows them, from the sum of gradients over ranks on, is not run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WORLD, RANK = 32, 24  # TP 8, PP 4: the first rank of the last stage
TRAJECTORIES = 2  # a micro-batch each


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_step_of_the_last_stage_passes_and_reads_nothing_back(
    precision: str, tmp_path: Path
) -> None:
    arguments = (str(tmp_path), precision)
    output = launch(1, check_step, *arguments, timeout=500, transformer_engine=True)
    assert "the step has passed" in output


def check_step(directory: str, precision: str) -> None:
    from contextlib import ExitStack
    from unittest import mock

    import torch
    import transformer_engine_torch
    from fake_world import on_the_host, rank_of

    from nemo_trd.config.load import compose
    from nemo_trd.data.types import Trajectory
    from nemo_trd.loss import comparison, fused, logits
    from nemo_trd.megatron import hand_over, loss_head
    from nemo_trd.megatron import student as student_module
    from nemo_trd.megatron import teacher as teacher_module
    from nemo_trd.plan.shapes import SHIPPED

    shape = json.loads((SHIPPED / "Llama-3.3-70B-Instruct.json").read_text())
    (Path(directory) / "config.json").write_text(json.dumps(shape))
    settings = [f"model.student.path={directory}", f"precision={precision}"]
    settings += ["train.max_tokens_per_micro_batch=null", "train.micro_batch_size=1"]
    config = compose(["experiment=trd_70b", *settings])
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
        for module in (comparison, logits):  # a chunk at once
            patches.enter_context(mock.patch.object(module, "CPU_BLOCK_BYTES", 1 << 40))
        patches.enter_context(mock.patch.object(fused, "check_ids"))  # on a GPU it looks at nothing
        patches.enter_context(fused_attention_of_fake_tensors())
        tensors.answers = True
        student = student_module.Student(config)
        teacher = teacher_module.Teacher(config, student.groups)
        plan = on_the_host(student.pack)(trajectories)
        states = teacher.states(plan)
        expected = [(len(answer), shape["hidden_size"])] * TRAJECTORIES
        assert [tuple(state.shape) for state in states if state is not None] == expected
        student.compute_gradients(plan, states)
    in_bf16 = transformer_engine_torch.matrix_products["bfloat16", "bfloat16"]
    assert transformer_engine_torch.matrix_products and (in_bf16 > 0) == (precision == "bf16")
    print("the step has passed", flush=True)


def fused_attention_of_fake_tensors() -> Any:
    """TransformerEngine finds no fused attention for a class of tensors that it does not know."""
    from dataclasses import replace
    from unittest import mock

    import torch
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    choose = utils.get_attention_backend

    def choose_for_tensors(parameters: Any) -> Any:
        return choose(replace(parameters, qkv_type=torch.Tensor))

    return mock.patch.object(utils, "get_attention_backend", choose_for_tensors)


def nothing_is_read_within(run_schedule: Any, tensors: Any) -> Any:
    """A pass in which reading is an error, and which ends behind its last micro-batch."""

    def run(chunks: Any, *args: Any, **options: Any) -> Any:
        chunks[0].config.finalize_model_grads_func = None
        tensors.answers = False
        result = run_schedule(chunks, *args, **options)
        tensors.answers = True
        return result

    return run
