"""Pairing, planning and laying out micro-batches."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_trd.algorithm.micro_batches import (
    balance,
    fill,
    make_micro_batch,
    plan,
    real_token_share,
    trajectory_flops,
)
from nemo_trd.algorithm.trajectories import sequence_lengths
from nemo_trd.config.lengths import longest_answer
from nemo_trd.config.load import compose
from nemo_trd.config.schema import Config, Layout
from nemo_trd.data.types import Trajectory
from nemo_trd.models.family import UNALIGNED, PackAlignment, pack_alignment
from nemo_trd.plan.shapes import read_model


def trajectory(index: int, student: int, teacher: int, labels: int) -> Trajectory:
    """One with recognisable tokens: labels count up from 1000 * (index + 1)."""
    return Trajectory(
        prompt_index=index,
        sample_index=0,
        source="refinement",
        student_context=tuple(range(1, student + 1)),
        teacher_context=tuple(range(500, 500 + teacher)),
        labels=tuple(range(1000 * (index + 1), 1000 * (index + 1) + labels)),
        weight_version=0,
    )


def train_section(*overrides: str):
    return compose([f"train.{override}" for override in overrides]).train


@pytest.mark.parametrize("alignment", [UNALIGNED, PackAlignment(1, 64), PackAlignment(4, 16)])
def test_each_label_is_predicted_by_the_position_before_it(alignment: PackAlignment) -> None:
    trajectories = [trajectory(0, 3, 5, 4), trajectory(1, 7, 2, 1), trajectory(2, 1, 1, 6)]
    batch = make_micro_batch(trajectories, student=alignment, teacher=alignment)
    labels = [label for t in trajectories for label in t.labels]
    assert batch.labels.tolist() == labels
    for side, contexts in (
        (batch.student, [t.student_context for t in trajectories]),
        (batch.teacher[0], [t.teacher_context for t in trajectories]),
    ):
        tokens = side.tokens.flatten().tolist()
        positions = side.position_ids.flatten().tolist()
        predictors = iter(side.label_positions.tolist())
        for t, context in zip(trajectories, contexts, strict=True):
            sequence = [*context, *t.labels]
            for i in range(len(t.labels)):
                at = next(predictors)
                assert positions[at] == len(context) + i - 1
                start = at - positions[at]
                seen = tokens[start : at + 1]
                assert seen == sequence[: len(context) + i]  # exactly what comes before label i
        assert side.tokens.numel() == sum(side.lengths) and not sum(side.lengths) % alignment.pack
        assert all(length % alignment.segment == 0 for length in side.lengths)


def test_the_terminating_eos_is_a_label_and_one_token_answers_have_one() -> None:
    batch = make_micro_batch([trajectory(0, 3, 3, 1)])
    assert batch.labels.tolist() == [1000]
    assert batch.student.tokens.tolist() == [[1, 2, 3]]
    assert batch.student.label_positions.tolist() == [2]


def test_a_filler_has_no_labels_and_one_sequence() -> None:
    batch = make_micro_batch([], student=PackAlignment(1, 4))
    assert batch.labels.numel() == batch.student.label_positions.numel() == 0
    assert batch.student.tokens.shape == (1, 4)
    assert [pack.tokens.shape for pack in batch.teacher] == [(1, 1)]


@pytest.mark.parametrize(
    ("alignment", "length", "lengths"),
    [
        (UNALIGNED, 0, (6, 2)),
        (UNALIGNED, 20, (6, 2, 12)),
        (PackAlignment(1, 16), 0, (6, 2, 8)),  # no sequence is longer for it
        (PackAlignment(1, 16), 20, (6, 2, 24)),
        (PackAlignment(4, 4), 0, (8, 4)),
    ],
)
def test_a_pack_is_filled_up_by_a_segment_and_no_label_moves(
    alignment: PackAlignment, length: int, lengths: tuple[int, ...]
) -> None:
    trajectories = [trajectory(0, 3, 3, 4), trajectory(1, 1, 1, 2)]
    plain = make_micro_batch(trajectories).student
    filled = make_micro_batch(trajectories, student=alignment, student_length=length).student
    assert filled.lengths == lengths
    assert filled.cu_seqlens.tolist() == [0, *itertools.accumulate(lengths)]
    assert filled.cu_seqlens.dtype == torch.int32
    predictors = [side.tokens[0, side.label_positions].tolist() for side in (plain, filled)]
    assert predictors[0] == predictors[1]


BY_TOKENS = train_section("max_tokens_per_micro_batch=64")
BY_SIZE = train_section("max_tokens_per_micro_batch=null", "micro_batch_size=3")


@given(
    lengths=st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 30), st.integers(1, 80)), max_size=40
    ),
    unit=st.integers(1, 6),
    by_tokens=st.booleans(),
    by_student=st.booleans(),
)
def test_micro_batches_hold_every_trajectory_once_within_their_limits(
    lengths, unit: int, by_tokens: bool, by_student: bool
) -> None:
    trajectories = [trajectory(i, *sizes) for i, sizes in enumerate(lengths)]
    train = BY_TOKENS if by_tokens else BY_SIZE
    batches = fill(trajectories, train, unit, by_student=by_student)
    assert len(batches) % unit == 0 and len(batches) > 0
    placed = sorted(t.prompt_index for batch in batches for t in batch)
    assert placed == list(range(len(trajectories)))
    for batch in batches:
        if by_tokens:  # the longest have 88 of the student's
            assert len(batch) <= 1 or sum(sequence_lengths(t)[0] for t in batch) <= 64
        else:
            assert len(batch) <= 3
        micro_batch = make_micro_batch(batch, teacher_tokens=64)
        for pack in micro_batch.teacher:
            assert len(pack.lengths) == 1 or sum(pack.lengths) <= 64
        counts = [len(pack.label_positions) for pack in micro_batch.teacher]
        assert sum(counts) == len(micro_batch.labels) and all(counts) == bool(batch)


@pytest.mark.parametrize(
    ("recipe", "replicas"),
    [
        # Stages that interleave want one length for all; FP8 and TP 8 want multiples of 128.
        (
            [
                "experiment=trd_70b",
                "precision=fp8",
                "parallel.student.virtual_pipeline_model_parallel_size=2",
            ],
            2,
        ),
        (["experiment=trd_8b"], 4),
        pytest.param(["experiment=paper_qwen3_8b", "precision=fp8"], 4, marks=pytest.mark.slow),
        (["experiment=quickstart"], 4),
    ],
)
def test_heavy_tailed_lengths_leave_few_fillers_and_ranks_with_equal_work(
    recipe: list[str], replicas: int
) -> None:
    config = compose(recipe)
    trajectories = heavy_tailed(config, 1024)
    layout = config.parallel.student
    interleaved = layout.virtual_pipeline_model_parallel_size is not None
    cost = trajectory_flops(*shapes(config))
    step = plan(
        config,
        trajectories,
        data_parallel_size=replicas,
        cost=cost,
        multiple=layout.pipeline_model_parallel_size if interleaved else 1,
        same_length=interleaved,
    )
    shares = real_token_share(step)
    assert 0.98 <= min(shares.values()) <= max(shares.values()) <= 1, shares
    work = [sum(cost(t) for batch in rank for t in batch.trajectories) for rank in step]
    assert max(work) <= 1.03 * sum(work) / len(work)
    packs = [batch.student.tokens.numel() for rank in step for batch in rank]
    assert max(packs) <= config.train.max_tokens_per_micro_batch
    assert len(set(packs)) == 1 or not interleaved


def shapes(config: Config) -> tuple[Any, Any]:
    student, _ = read_model(config.model.student, "student")
    teacher, _ = read_model(config.teacher_source, "teacher")
    return student.hf, teacher.hf


def heavy_tailed(config: Config, count: int) -> list[Trajectory]:
    """Lengths as models answer: log-normal, and one of twelve near the limit or at it."""
    rng = random.Random(0)

    def drawn(median: float, limit: int) -> int:
        return max(1, min(limit, round(median * rng.lognormvariate(0, 0.8))))

    trajectories = []
    for index in range(count):
        x = drawn(150, config.data.max_prompt_tokens)
        limit = longest_answer(config)
        y_o = drawn(limit / 6, limit)
        if index % 12 == 0:
            y_o = rng.choice([limit, drawn(0.7 * limit, limit)])
        y_r = max(1, min(limit, round(y_o * rng.uniform(0.6, 1.3))))
        context = min(config.refinement.max_context_tokens, x + y_o + 300)
        trajectories.append(trajectory(index, x, context, y_r))
    return trajectories


def test_work_counts_the_square_of_lengths() -> None:
    """One sequence of 32k tokens costs more than 32 of 1k; sharing out by tokens would not see."""
    cost = trajectory_flops(*shapes(compose(["experiment=paper_qwen3_8b"])))
    whole, part = trajectory(0, 1, 1, 32_768), trajectory(0, 1, 1, 1024)
    assert 1.4 < cost(whole) / (32 * cost(part)) < 1.8
    batches = [[whole], *[[part] * 32] * 3, [part] * 16, []]
    loads = [sum(cost(t) for b in rank for t in b) for rank in balance(batches, 2, cost)]
    assert max(loads) <= 1.1 * sum(loads) / 2


def test_micro_batches_do_not_depend_on_the_order_of_trajectories() -> None:
    trajectories = [trajectory(i, 3, 3, 1 + i % 7) for i in range(20)]
    assert fill(trajectories[::-1], BY_TOKENS, 2) == fill(trajectories, BY_TOKENS, 2)


def test_alignment_covers_sequence_parallelism_context_parallelism_and_fp8() -> None:
    plain = Layout(tensor_model_parallel_size=4, pipeline_model_parallel_size=1)
    assert pack_alignment(plain, None, "tensorwise") == PackAlignment(1, 1)
    assert pack_alignment(plain, "hybrid", "tensorwise") == PackAlignment(1, 16)
    assert pack_alignment(plain, "hybrid", "mxfp8") == PackAlignment(1, 32)
    split = plain.model_copy(update={"sequence_parallel": True})
    assert pack_alignment(split, None, "mxfp8") == PackAlignment(1, 4)
    assert pack_alignment(split, "e4m3", "delayed") == PackAlignment(1, 64)
    cut = split.model_copy(update={"context_parallel_size": 3})
    assert pack_alignment(cut, None, "mxfp8") == PackAlignment(6, 12)
    assert pack_alignment(cut, "e4m3", "delayed") == PackAlignment(6, 192)
