"""The teacher's states are handed over beside its passes, and no order of exchanges can block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from exchanges import Exchanges, check_no_circle
from launch import launch
from parallel_layouts import (
    ONE_EACH,
    PP2,
    TEACHER_CP2,
    TEACHER_PP2,
    TEACHER_TP2,
    TP2,
    student,
    teacher,
    trajectories,
)
from tiny_models import make_model

pytestmark = pytest.mark.distributed

WORLD, PROMPTS = 8, 21
LAYOUTS = {
    "teacher tp2, student pp4": [*student(pipeline_model_parallel_size=4), *TEACHER_TP2],
    "teacher pp4, student tp2": [*TP2, *teacher(pipeline_model_parallel_size=4)],
    "teacher tp2 pp2, student pp2": [*PP2, *TEACHER_TP2, *TEACHER_PP2],
    "teacher cp2 pp2, student cp4": [*student(context_parallel_size=4), *TEACHER_CP2, *TEACHER_PP2],
}


def test_hand_over_beside_the_passes_in_an_order_in_which_no_rank_waits_for_ever(
    tmp_path: Path,
) -> None:
    sizes: dict[str, Any] = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    for role in ("student", "teacher"):
        make_model(tmp_path / role, "qwen3", num_hidden_layers=4, **sizes)
    launch(1, check_layouts, str(tmp_path), timeout=300)


def check_layouts(directory: str) -> None:
    for name, layout in LAYOUTS.items():
        ranks = [exchanges_of(rank, directory, layout) for rank in range(WORLD)]
        everyone = tuple(range(WORLD))
        senders = 0
        for rank, asked in enumerate(ranks):
            # NCCL makes a communicator at its first use, for which all members must come.
            first = next(batch for batch in asked if batch[0][1] == everyone)
            assert first[0][0] == "allreduce_", name
            last_pass = max(i for i, batch in enumerate(asked) if batch[0][0] == "pass")
            sending = [i for i, batch in enumerate(asked) if sends(batch, rank)]
            senders += bool(sending)
            assert sum(i > last_pass for i in sending) <= 1, name  # of the last micro-batch
        assert senders, name
        check_no_circle(ranks, name)


def sends(batch: list[Any], rank: int) -> bool:
    """Whether a rank sends states in a batch: in the group of all ranks."""
    return any(kind == f"to one of {WORLD}" and pair[0] == rank for kind, pair, _ in batch)


def exchanges_of(rank: int, directory: str, layout: list[str]) -> list[list[Any]]:
    """What a rank asks of its communicators in one pass of the teacher."""
    from unittest import mock

    import torch.distributed as dist
    from fake_world import on_the_host, rank_of
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from nemo_trd.algorithm import micro_batches
    from nemo_trd.config.load import compose
    from nemo_trd.megatron import hand_over
    from nemo_trd.megatron import teacher as module
    from nemo_trd.megatron.process_groups import process_groups

    paths = [f"model.{role}.path={directory}/{role}" for role in ("student", "teacher")]
    config = compose(["model=local", *paths, "precision.dtype=fp32", *ONE_EACH, *layout])
    exchanges = Exchanges()
    run_model = module.run_model

    def noted_pass(*args: Any) -> Any:
        exchanges.note("pass", (rank,))
        return run_model(*args)

    with (
        rank_of(rank, WORLD),
        mock.patch.object(module, "load_hf_weights"),
        mock.patch.object(module, "last_stage_ranks", last_stage_ranks),
        mock.patch.object(module, "run_model", noted_pass),
        mock.patch.object(module, "own_context", on_the_host(module.own_context)),
        mock.patch.object(hand_over, "_pieces_of_rank", on_the_host(hand_over._pieces_of_rank)),
        mock.patch.object(dist, "batch_isend_irecv", exchanges.one_batch(dist.batch_isend_irecv)),
        exchanges.followed(),
    ):
        groups = process_groups(config.parallel.student)
        frozen = module.Teacher(config, groups)
        with unset_fake_temporarily():
            steps = [t for step in range(3) for t in trajectories(config, step)]
            size = groups.dp.size()
            plan = micro_batches.plan(config, steps, data_parallel_size=size, cost=lambda t: 1)
        frozen.states(plan)
    return exchanges.asked


def last_stage_ranks(groups: Any) -> list[list[list[int]]]:
    """As the function of this name finds out by asking all ranks."""
    tp, cp, dp = groups.tp.size(), groups.cp.size(), groups.dp.size()
    ranks = iter(range(WORLD - tp * cp * dp, WORLD))
    return [[[next(ranks) for _ in range(tp)] for _ in range(cp)] for _ in range(dp)]
