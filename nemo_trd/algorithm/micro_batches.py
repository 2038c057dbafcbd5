"""From refinements to micro-batches: pair the contexts, fill batches, balance them over ranks.

Pure: every rank calls these with the same trajectories and gets the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate

import torch

from nemo_trd.algorithm.trajectories import trajectory_length
from nemo_trd.config.schema import Config, Train
from nemo_trd.data.types import (
    ContextBatch,
    Microbatch,
    TokenIds,
    Trajectory,
)
from nemo_trd.models.family import UNALIGNED, PackAlignment, pack_alignment

PAD_TOKEN = 0  # never attended to by a label position, never a label: any valid id will do


def plan(
    config: Config,
    trajectories: Sequence[Trajectory],
    *,
    data_parallel_size: int,
    multiple: int = 1,
    same_length: bool = False,
    count: int | None = None,
) -> list[list[Microbatch]]:
    """Lay out one step: `plan[data parallel rank][micro-batch]`, aligned as both models need.

    Args:
        multiple: of which every rank's number of micro-batches is one.
        same_length: fill the student's side of all micro-batches up to one length.
        count: number of micro-batches of every rank; those that are missing are fillers.
    """
    parallel, precision = config.parallel, config.precision
    parts = partition(
        trajectories, config.train, data_parallel_size=data_parallel_size, multiple=multiple
    )
    if count is not None:
        assert all(len(rank) <= count for rank in parts), (count, [len(rank) for rank in parts])
        parts = [rank + [[]] * (count - len(rank)) for rank in parts]
    make = partial(
        make_micro_batch,
        student=pack_alignment(parallel.student, precision.fp8, precision.fp8_recipe),
        teacher=pack_alignment(parallel.teacher, precision.teacher_fp8, precision.fp8_recipe),
    )
    batches = [[make(part) for part in rank] for rank in parts]
    if same_length:
        longest = max(batch.student.tokens.numel() for rank in batches for batch in rank)
        batches = [[make(part, student_length=longest) for part in rank] for rank in parts]
    return batches


def partition(
    trajectories: Sequence[Trajectory],
    train: Train,
    *,
    data_parallel_size: int,
    multiple: int = 1,
) -> list[list[list[Trajectory]]]:
    """Divide the trajectories of one step: `parts[data parallel rank][micro-batch]`.

    Filled to `train.micro_batch_size` sequences or
    `train.max_tokens_per_micro_batch` tokens; every rank gets equally many micro-batches, a
    multiple of `multiple`, of about equal cost. Where there are too few trajectories for that,
    some micro-batches are empty. The loss does not depend on the division.
    """
    longest_first = sorted(
        trajectories, key=lambda t: (-trajectory_length(t), t.prompt_index, t.sample_index)
    )
    batches: list[list[Trajectory]] = []
    for trajectory in longest_first:
        if batches and _has_room(batches[-1], trajectory, train):
            batches[-1].append(trajectory)
        else:
            batches.append([trajectory])
    unit = data_parallel_size * multiple
    count = max(1, -(-len(batches) // unit)) * unit
    while len(batches) < count:
        biggest = max(batches, key=lambda b: (len(b) > 1, _cost(b)), default=[])
        if len(biggest) < 2:
            batches.append([])
        else:
            batches.remove(biggest)
            batches += [biggest[: len(biggest) // 2], biggest[len(biggest) // 2 :]]
    return _balance(batches, data_parallel_size)


def _has_room(batch: list[Trajectory], extra: Trajectory, train: Train) -> bool:
    if train.micro_batch_size is not None:
        return len(batch) < train.micro_batch_size
    assert train.max_tokens_per_micro_batch is not None
    return _cost([*batch, extra]) <= train.max_tokens_per_micro_batch


def _cost(batch: Sequence[Trajectory]) -> int:
    """Tokens that a micro-batch makes the models compute."""
    return sum(trajectory_length(t) for t in batch)


def _balance(batches: list[list[Trajectory]], ranks: int) -> list[list[list[Trajectory]]]:
    """Longest processing time first, with the same number of micro-batches for every rank."""
    per_rank = len(batches) // ranks
    plan: list[list[list[Trajectory]]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for batch in sorted(batches, key=lambda b: -_cost(b)):
        rank = min((r for r in range(ranks) if len(plan[r]) < per_rank), key=lambda r: load[r])
        plan[rank].append(batch)
        load[rank] += _cost(batch)
    return plan


def make_micro_batch(
    trajectories: Sequence[Trajectory],
    *,
    student: PackAlignment = UNALIGNED,
    teacher: PackAlignment = UNALIGNED,
    student_length: int = 0,
) -> Microbatch:
    """Build the tensors of one micro-batch; without trajectories a filler without labels.

    They stay on the host: every rank holds the plan of all ranks, and runs a part of it.

    Args:
        student, teacher: alignments of the two packs.
        student_length: tokens to which the student's is filled up.
    """
    labels = [token for t in trajectories for token in t.labels]
    owners = [i for i, t in enumerate(trajectories) for _ in t.labels]
    numbers = [number for t in trajectories for number in range(len(t.labels))]
    students = [(t.student_context, t.labels) for t in trajectories]
    teachers = [(t.teacher_context, t.labels) for t in trajectories]
    return Microbatch(
        student=_packed(students, student, student_length),
        teacher=_packed(teachers, teacher),
        labels=torch.tensor(labels, dtype=torch.long),
        trajectory_index=torch.tensor(owners, dtype=torch.long),
        label_index=torch.tensor(numbers, dtype=torch.long),
        trajectories=tuple(trajectories),
    )


def _packed(
    sequences: Sequence[tuple[TokenIds, TokenIds]], alignment: PackAlignment, length: int = 0
) -> ContextBatch:
    """Pack (context, labels) pairs; label i is predicted at the position before it."""
    # The last label is predicted, never read: its own position would be computed for nothing.
    inputs = [(*context, *labels[:-1]) for context, labels in sequences]
    lengths = [_round_up(len(ids), alignment.segment) for ids in inputs]
    total = _round_up(max(sum(lengths), length, 1), alignment.pack)
    if total > sum(lengths):  # a segment of its own: no sequence gets longer by it
        inputs, lengths = [*inputs, ()], [*lengths, total - sum(lengths)]
    borders = [0, *accumulate(lengths)]
    starts = borders[:-1]
    padded = [[*ids, *[PAD_TOKEN] * (n - len(ids))] for ids, n in zip(inputs, lengths, strict=True)]
    positions = [
        start + len(context) - 1 + i
        for start, (context, labels) in zip(starts, sequences, strict=False)
        for i in range(len(labels))
    ]
    return ContextBatch(
        tokens=torch.tensor([[token for ids in padded for token in ids]], dtype=torch.long),
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        label_positions=torch.tensor(positions, dtype=torch.long),
        lengths=tuple(lengths),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
    )


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
