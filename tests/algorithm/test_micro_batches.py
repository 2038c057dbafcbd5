"""Pairing, planning and laying out micro-batches."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_trd.algorithm.micro_batches import make_micro_batch, partition
from nemo_trd.algorithm.trajectories import trajectory_length
from nemo_trd.config.load import compose
from nemo_trd.config.schema import Layout
from nemo_trd.data.types import Trajectory
from nemo_trd.models.family import UNALIGNED, PackAlignment, pack_alignment


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
        (batch.teacher, [t.teacher_context for t in trajectories]),
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
    assert batch.teacher.tokens.shape == (1, 1)


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


@given(
    lengths=st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 20)), max_size=40
    ),
    ranks=st.integers(1, 4),
    multiple=st.integers(1, 3),
    by_tokens=st.booleans(),
)
def test_a_plan_holds_every_trajectory_once_within_its_limits(
    lengths, ranks: int, multiple: int, by_tokens: bool
) -> None:
    train = BY_TOKENS if by_tokens else BY_SIZE
    trajectories = [trajectory(i, *sizes) for i, sizes in enumerate(lengths)]
    plan = partition(trajectories, train, data_parallel_size=ranks, multiple=multiple)
    assert len(plan) == ranks
    counts = {len(batches) for batches in plan}
    assert len(counts) == 1 and counts.pop() % multiple == 0
    batches = list(itertools.chain.from_iterable(plan))
    placed = sorted(t.prompt_index for batch in batches for t in batch)
    assert placed == list(range(len(trajectories)))
    for batch in batches:
        sizes = [trajectory_length(t) for t in batch]
        if by_tokens:
            assert sum(sizes) <= 64
        else:
            assert len(batch) <= 3


BY_TOKENS = train_section("max_tokens_per_micro_batch=64")
BY_SIZE = train_section("max_tokens_per_micro_batch=null", "micro_batch_size=3")


def test_ranks_get_about_equal_work() -> None:
    trajectories = [trajectory(i, 4, 4, 1 + (37 * i) % 50) for i in range(64)]
    plan = partition(trajectories, BY_TOKENS, data_parallel_size=4)
    load = [sum(trajectory_length(t) for batch in rank for t in batch) for rank in plan]
    assert max(load) <= 1.1 * min(load)


def test_a_plan_does_not_depend_on_the_order_of_trajectories() -> None:
    trajectories = [trajectory(i, 3, 3, 1 + i % 7) for i in range(20)]
    first = partition(trajectories, BY_TOKENS, data_parallel_size=2)
    assert partition(trajectories[::-1], BY_TOKENS, data_parallel_size=2) == first


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
