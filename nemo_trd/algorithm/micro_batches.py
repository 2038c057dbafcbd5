"""From trajectories to micro-batches: fill them, share them out over ranks, make tensors.

Pure: every rank calls these with the same trajectories and gets the same plan.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from nemo_trd.algorithm.trajectories import sequence_lengths
from nemo_trd.config.schema import Config, Train
from nemo_trd.data.types import (
    ContextBatch,
    Microbatch,
    TokenIds,
    Trajectory,
)
from nemo_trd.models.family import UNALIGNED, PackAlignment, pack_alignment
from nemo_trd.models.flops import forward_flops

PAD_TOKEN = 0  # never attended to by a label position, never a label: any valid id will do

Cost = Callable[[Trajectory], float]
Pair = tuple[TokenIds, TokenIds]  # (context, labels)


def trajectory_flops(student: Any, teacher: Any | None) -> Cost:
    """What a trajectory costs in a step, in FLOPs: attention's grow with the square of lengths.

    Args:
        student, teacher: Hugging Face configs; no teacher where its states come from elsewhere.
    """

    def flops(trajectory: Trajectory) -> float:
        n, m = sequence_lengths(trajectory)
        trained = 3 * forward_flops(student, n, (n + 1) / 2, logits=len(trajectory.labels))
        return trained + (forward_flops(teacher, m, (m + 1) / 2, logits=0) if teacher else 0)

    return flops


def plan(
    config: Config,
    trajectories: Sequence[Trajectory],
    *,
    data_parallel_size: int,
    cost: Cost,
    multiple: int = 1,
    same_length: bool = False,
    count: int | None = None,
) -> list[list[Microbatch]]:
    """Lay out one step: `plan[data parallel rank][micro-batch]`, aligned as both models need.

    Args:
        cost: of a trajectory, in any unit; ranks get equal sums of it.
        multiple: of which every rank's number of micro-batches is one.
        same_length: fill the student's side of all micro-batches up to one length, and the
            teacher's where it is the student's own modules.
        count: number of micro-batches of every rank; those that are missing are fillers.
    """
    parallel, precision, train = config.parallel, config.precision, config.train
    unit = data_parallel_size * multiple
    filled = fill(trajectories, train, unit, by_student=same_length)
    parts = balance(filled, data_parallel_size, cost)
    if count is not None:
        assert all(len(rank) <= count for rank in parts), (count, [len(rank) for rank in parts])
        parts = [rank + [[]] * (count - len(rank)) for rank in parts]
    student = pack_alignment(parallel.student, precision.fp8, precision.fp8_recipe)
    teacher = pack_alignment(parallel.teacher, precision.teacher_fp8, precision.fp8_recipe)
    make = partial(
        make_micro_batch,
        student=student,
        teacher=teacher,
        teacher_tokens=train.max_tokens_per_micro_batch,
    )
    if same_length:
        all_parts = list(itertools.chain(*parts))
        longest = max(_length(_students(part), student.segment) for part in all_parts)
        make = partial(make, student_length=longest)
    if same_length and config.teacher_is_student:
        packs = [_cut(_teachers(part), train.max_tokens_per_micro_batch) for part in all_parts]
        longest = max(_length(pack, teacher.segment) for pack in itertools.chain(*packs))
        make = partial(make, teacher_length=longest)
    return [[make(part) for part in rank] for rank in parts]


def _students(trajectories: Sequence[Trajectory]) -> list[Pair]:
    return [(t.student_context, t.labels) for t in trajectories]


def _teachers(trajectories: Sequence[Trajectory]) -> list[Pair]:
    return [(t.teacher_context, t.labels) for t in trajectories]


def _length(sequences: Sequence[Pair], multiple: int) -> int:
    """Tokens of a pack, each sequence aligned."""
    return sum(_round_up(_inputs(pair), multiple) for pair in sequences)


def _inputs(pair: Pair) -> int:
    """Number of tokens that are read: the last label is predicted, and computed for nothing."""
    context, labels = pair
    return len(context) + len(labels) - 1


def fill(
    trajectories: Sequence[Trajectory], train: Train, unit: int, *, by_student: bool = False
) -> list[list[Trajectory]]:
    """Divide the trajectories of one step over micro-batches, a multiple of `unit` in number.

    Each has at most `train.micro_batch_size` of them, or `train.max_tokens_per_micro_batch` tokens
    of the student; a longer trajectory is alone in its own. Among these limits they are as few as
    the longer sequences of the trajectories fill, with `by_student` as the student's fill, and
    have about equally many tokens of the student: the longest first, each to where fewest are.
    Some are empty where there are too few trajectories. The loss does not depend on the division.
    """
    longest_first = sorted(
        trajectories, key=lambda t: (-sequence_lengths(t)[0], t.prompt_index, t.sample_index)
    )
    size, tokens = train.micro_batch_size, train.max_tokens_per_micro_batch
    if tokens is None:
        assert size is not None
        least = -(-len(trajectories) // size)
    else:
        of_each = (n if by_student else max(n, m) for n, m in map(sequence_lengths, trajectories))
        least = -(-sum(of_each) // tokens)
    count = _round_up(max(1, least), unit)
    while (batches := _spread(longest_first, count, size, tokens)) is None:
        count += unit
    return batches


def _spread(
    trajectories: Sequence[Trajectory], count: int, size: int | None, tokens: int | None
) -> list[list[Trajectory]] | None:
    """Give each trajectory to the micro-batch with fewest tokens; None where it has no room."""
    batches: list[list[Trajectory]] = [[] for _ in range(count)]
    fewest = [(0, number) for number in range(count)]  # a heap
    for trajectory in trajectories:
        held, number = heapq.heappop(fewest)
        held += sequence_lengths(trajectory)[0]
        batches[number].append(trajectory)
        if tokens is not None and held > tokens and len(batches[number]) > 1:
            return None
        if size is None or len(batches[number]) < size:
            heapq.heappush(fewest, (held, number))
    return batches


def balance(
    batches: Sequence[list[Trajectory]], ranks: int, cost: Cost
) -> list[list[list[Trajectory]]]:
    """Share micro-batches out: `[rank][position]`, equally many to each, of about equal cost.

    The most costly first, each to the rank that has least.
    """
    costs = [sum(map(cost, batch)) for batch in batches]
    shares: list[list[list[Trajectory]]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for number in sorted(range(len(batches)), key=lambda number: -costs[number]):
        open_ranks = [r for r in range(ranks) if len(shares[r]) < len(batches) // ranks]
        rank = min(open_ranks, key=lambda r: load[r])
        shares[rank].append(batches[number])
        load[rank] += costs[number]
    return shares


def real_token_share(plan: Sequence[Sequence[Microbatch]]) -> dict[str, float]:
    """Tokens of sequences over the tokens that each model computes; the others are fillers."""
    batches = [batch for rank in plan for batch in rank]
    lengths = [sequence_lengths(t) for batch in batches for t in batch.trajectories]
    computed = {
        "student": sum(batch.student.tokens.numel() for batch in batches),
        "teacher": sum(pack.tokens.numel() for batch in batches for pack in batch.teacher),
    }
    real = zip(computed.items(), (sum(n) for n in zip(*lengths, strict=True)), strict=True)
    return {f"{role}_real_token_share": tokens / total for (role, total), tokens in real}


def make_micro_batch(
    trajectories: Sequence[Trajectory],
    *,
    student: PackAlignment = UNALIGNED,
    teacher: PackAlignment = UNALIGNED,
    teacher_tokens: int | None = None,
    student_length: int = 0,
    teacher_length: int = 0,
) -> Microbatch:
    """Build the tensors of one micro-batch; without trajectories a filler without labels.

    They stay on the host: every rank holds the plan of all ranks, and runs a part of it.

    Args:
        student, teacher: alignments of the two models' packs.
        teacher_tokens: beyond which the teacher's side is cut into several packs.
        student_length, teacher_length: tokens to which packs are filled up.
    """
    labels = [token for t in trajectories for token in t.labels]
    owners = [i for i, t in enumerate(trajectories) for _ in t.labels]
    numbers = [number for t in trajectories for number in range(len(t.labels))]
    cut = _cut(_teachers(trajectories), teacher_tokens)
    return Microbatch(
        student=_packed(_students(trajectories), student, student_length),
        teacher=tuple(_packed(part, teacher, teacher_length) for part in cut),
        labels=torch.tensor(labels, dtype=torch.long),
        trajectory_index=torch.tensor(owners, dtype=torch.long),
        label_index=torch.tensor(numbers, dtype=torch.long),
        trajectories=tuple(trajectories),
    )


def _cut(sequences: Sequence[Pair], tokens: int | None) -> list[list[Pair]]:
    """Parts, in order, of no more than `tokens` tokens, or of one sequence."""
    parts: list[list[Pair]] = [[]]
    held = 0
    for pair in sequences:
        length = _inputs(pair)
        if tokens is not None and parts[-1] and held + length > tokens:
            parts.append([])
            held = 0
        parts[-1].append(pair)
        held += length
    return parts


def _packed(sequences: Sequence[Pair], alignment: PackAlignment, length: int = 0) -> ContextBatch:
    """Pack (context, labels) pairs; label i is predicted at the position before it."""
    # The last label is predicted, never read: its own position would be computed for nothing.
    inputs = [(*context, *labels[:-1]) for context, labels in sequences]
    lengths = [_round_up(len(ids), alignment.segment) for ids in inputs]
    held = sum(lengths)
    total = _round_up(max(held, length, 1), alignment.pack)
    if total > held:  # a segment of its own: no sequence gets longer by it
        lengths.append(total - held)
    borders = [0, *itertools.accumulate(lengths)]
    tokens = torch.full((total,), PAD_TOKEN, dtype=torch.long)
    label_positions = [torch.empty(0, dtype=torch.long)]
    for start, ids, (context, labels) in zip(borders, inputs, sequences, strict=False):
        tokens[start : start + len(ids)] = torch.tensor(ids, dtype=torch.long)
        first = start + len(context) - 1
        label_positions.append(torch.arange(first, first + len(labels)))
    return ContextBatch(
        tokens=tokens[None],
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        label_positions=torch.cat(label_positions),
        lengths=tuple(lengths),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
    )


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
