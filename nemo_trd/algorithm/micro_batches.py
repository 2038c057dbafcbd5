"""From refinements to micro-batches: pair the contexts, fill batches, balance them over ranks.

Pure: every rank calls these with the same trajectories and gets the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from nemo_trd.algorithm.trajectories import trajectory_length
from nemo_trd.config.schema import Config, Train
from nemo_trd.data.types import (
    ContextBatch,
    Microbatch,
    TokenIds,
    Trajectory,
)
from nemo_trd.models.family import sequence_alignment

PAD_TOKEN = 0  # never attended to by a label position, never a label: any valid id will do


def plan(
    config: Config,
    trajectories: Sequence[Trajectory],
    *,
    data_parallel_size: int,
    packed: bool,
    multiple: int = 1,
    same_shape: bool = False,
    count: int | None = None,
) -> list[list[Microbatch]]:
    """Lay out one step: `plan[data parallel rank][micro-batch]`, aligned as both models need.

    Args:
        packed: one sequence after the other (THD) instead of one in a row.
        multiple: of which every rank's number of micro-batches is one.
        same_shape: pad the student's side of all micro-batches to one shape.
        count: number of micro-batches of every rank; those that are missing are fillers.
    """
    parallel, precision = config.parallel, config.precision
    parts = partition(
        trajectories,
        config.train,
        data_parallel_size=data_parallel_size,
        multiple=multiple,
        packed=packed,
    )
    if count is not None:
        assert all(len(rank) <= count for rank in parts), (count, [len(rank) for rank in parts])
        parts = [rank + [[]] * (count - len(rank)) for rank in parts]
    make = partial(
        make_micro_batch,
        student_alignment=sequence_alignment(parallel.student, precision.fp8, precision.fp8_recipe),
        teacher_alignment=sequence_alignment(
            parallel.teacher, precision.teacher_fp8, precision.fp8_recipe
        ),
        packed=packed,
    )
    batches = [[make(part) for part in rank] for rank in parts]
    if same_shape:
        shape = _common_shape(batches)
        batches = [[make(part, student_shape=shape) for part in rank] for rank in parts]
    return batches


def _common_shape(micro_batches: Sequence[Sequence[Microbatch]]) -> tuple[int, int]:
    """(rows, length) that holds the student's side of every micro-batch."""
    shapes = [batch.student.tokens.shape for rank in micro_batches for batch in rank]
    return max(s[0] for s in shapes), max(s[1] for s in shapes)


def partition(
    trajectories: Sequence[Trajectory],
    train: Train,
    *,
    data_parallel_size: int,
    multiple: int = 1,
    packed: bool = False,
) -> list[list[list[Trajectory]]]:
    """Divide the trajectories of one step: `parts[data parallel rank][micro-batch]`.

    Sorted by length, so that little is padded; filled to `train.micro_batch_size` sequences or
    `train.max_tokens_per_micro_batch` tokens; every rank gets equally many micro-batches, a
    multiple of `multiple`, of about equal cost. Where there are too few trajectories for that,
    some micro-batches are empty. The loss does not depend on the division.
    """
    longest_first = sorted(
        trajectories, key=lambda t: (-trajectory_length(t), t.prompt_index, t.sample_index)
    )
    batches: list[list[Trajectory]] = []
    for trajectory in longest_first:
        if batches and _has_room(batches[-1], trajectory, train, packed):
            batches[-1].append(trajectory)
        else:
            batches.append([trajectory])
    unit = data_parallel_size * multiple
    count = max(1, -(-len(batches) // unit)) * unit
    while len(batches) < count:
        biggest = max(batches, key=lambda b: (len(b) > 1, _cost(b, packed)), default=[])
        if len(biggest) < 2:
            batches.append([])
        else:
            batches.remove(biggest)
            batches += [biggest[: len(biggest) // 2], biggest[len(biggest) // 2 :]]
    return _balance(batches, data_parallel_size, packed)


def _has_room(batch: list[Trajectory], extra: Trajectory, train: Train, packed: bool) -> bool:
    if train.micro_batch_size is not None:
        return len(batch) < train.micro_batch_size
    assert train.max_tokens_per_micro_batch is not None
    return _cost([*batch, extra], packed) <= train.max_tokens_per_micro_batch


def _cost(batch: Sequence[Trajectory], packed: bool) -> int:
    """Tokens that a micro-batch makes the models compute, padding included."""
    lengths = [trajectory_length(t) for t in batch]
    return sum(lengths) if packed else max(lengths, default=0) * len(lengths)


def _balance(
    batches: list[list[Trajectory]], ranks: int, packed: bool
) -> list[list[list[Trajectory]]]:
    """Longest processing time first, with the same number of micro-batches for every rank."""
    per_rank = len(batches) // ranks
    plan: list[list[list[Trajectory]]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for batch in sorted(batches, key=lambda b: -_cost(b, packed)):
        rank = min((r for r in range(ranks) if len(plan[r]) < per_rank), key=lambda r: load[r])
        plan[rank].append(batch)
        load[rank] += _cost(batch, packed)
    return plan


def make_micro_batch(
    trajectories: Sequence[Trajectory],
    *,
    student_alignment: int = 1,
    teacher_alignment: int = 1,
    packed: bool = False,
    student_shape: tuple[int, int] | None = None,
) -> Microbatch:
    """Build the tensors of one micro-batch; without trajectories a filler without labels.

    `student_shape`, (rows, length), pads the student's side to a shape that is given.
    They stay on the host: every rank holds the plan of all ranks, and runs a part of it.
    """
    labels = [token for t in trajectories for token in t.labels]
    owners = [i for i, t in enumerate(trajectories) for _ in t.labels]
    students = [(t.student_context, t.labels) for t in trajectories]
    teachers = [(t.teacher_context, t.labels) for t in trajectories]
    return Microbatch(
        student=_context_batch(students, student_alignment, packed, student_shape),
        teacher=_context_batch(teachers, teacher_alignment, packed),
        labels=torch.tensor(labels, dtype=torch.long),
        trajectory_index=torch.tensor(owners, dtype=torch.long),
        trajectories=tuple(trajectories),
    )


def _context_batch(
    sequences: Sequence[tuple[TokenIds, TokenIds]],
    alignment: int,
    packed: bool,
    shape: tuple[int, int] | None = None,
) -> ContextBatch:
    """Lay out (context, labels) pairs; label i is predicted at the position before it."""
    # The last label is predicted, never read: its own position would be computed for nothing.
    inputs = [(*context, *labels[:-1]) for context, labels in sequences] or [(PAD_TOKEN,)]
    lengths = [-(-len(ids) // alignment) * alignment for ids in inputs]
    rows, length = shape or (len(inputs), 0)
    if packed and sum(lengths) < length:
        inputs, lengths = [*inputs, (PAD_TOKEN,)], [*lengths, length - sum(lengths)]
    elif not packed:
        inputs = [*inputs, *[(PAD_TOKEN,)] * (rows - len(inputs))]
        lengths = [max(*lengths, length)] * len(inputs)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    padded = [[*ids, *[PAD_TOKEN] * (n - len(ids))] for ids, n in zip(inputs, lengths, strict=True)]
    positions = [
        start + len(context) - 1 + i
        for start, (context, labels) in zip(starts, sequences, strict=False)
        for i in range(len(labels))
    ]
    tokens = torch.tensor([token for row in padded for token in row], dtype=torch.long)
    position_ids = torch.cat([torch.arange(n) for n in lengths])
    view = (1, -1) if packed else (len(inputs), -1)
    borders = torch.tensor([*starts, sum(lengths)], dtype=torch.int32)
    return ContextBatch(
        tokens=tokens.view(view),
        position_ids=position_ids.view(view),
        label_positions=torch.tensor(positions, dtype=torch.long),
        cu_seqlens=borders if packed else None,
        longest=max(lengths),
    )
