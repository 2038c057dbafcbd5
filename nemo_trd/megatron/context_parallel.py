"""Context parallelism: which part of a pack a rank holds, and what ranks exchange of theirs.

Each sequence is cut into 2 CP equal parts, and rank r holds the parts r and 2 CP - 1 - r: all ranks
then attend to equally many keys. It is the order of TransformerEngine's
thd_get_partitioned_indices. A rank computes the loss at the labels that its own positions predict;
sums over labels are added up over the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_trd.data.types import ContextBatch, Microbatch
from nemo_trd.distributed.process import to_device


def places_of_rank(lengths: tuple[int, ...], size: int, rank: int) -> Tensor:
    """Places in a pack that one of `size` ranks holds, int64 [t / size], in its own order.

    Args:
        lengths: tokens of each sequence in the pack; with several ranks multiples of 2 `size`.
    """
    if size == 1:
        return torch.arange(sum(lengths))
    places = []
    for end, length in zip(accumulate(lengths), lengths, strict=True):
        part, rest = divmod(length, 2 * size)
        assert rest == 0, (lengths, size)
        for number in (rank, 2 * size - 1 - rank):
            start = end - length + number * part
            places.append(torch.arange(start, start + part))
    return torch.cat(places)


def label_holders(packs: Sequence[ContextBatch], size: int) -> tuple[Tensor, Tensor]:
    """Rank that predicts each of the n labels of these packs, and the label's number on that rank.

    Both int64 [n], on the host.
    """
    holders = []
    for pack in packs:
        holder = torch.empty(sum(pack.lengths), dtype=torch.long)
        for rank in range(size):
            holder[places_of_rank(pack.lengths, size, rank)] = rank
        holders.append(holder[pack.label_positions])
    ranks = torch.cat(holders)
    numbers = torch.empty_like(ranks)
    for rank in range(size):
        own = ranks == rank
        numbers[own] = torch.arange(int(own.sum()))
    return ranks, numbers


def own_context(batch: ContextBatch, size: int, rank: int) -> ContextBatch:
    """Part of a pack that one of `size` ranks computes, with the labels that it predicts."""
    if size == 1:
        return batch
    places = places_of_rank(batch.lengths, size, rank)
    here = torch.full((sum(batch.lengths),), -1)
    here[places] = torch.arange(len(places))
    label_positions = here[batch.label_positions]
    return replace(
        batch,
        tokens=batch.tokens[:, places],
        position_ids=batch.position_ids[:, places],
        label_positions=label_positions[label_positions >= 0],
        places=places,
    )


def own_part(micro_batch: Microbatch, group: dist.ProcessGroup) -> Microbatch:
    """Part of a micro-batch for the student on this rank of its context parallel group.

    The teacher's side is left out of it: it is split in a way of its own.
    """
    if group.size() == 1:
        return micro_batch
    own = label_holders([micro_batch.student], group.size())[0] == group.rank()
    return replace(
        micro_batch,
        student=own_context(micro_batch.student, group.size(), group.rank()),
        labels=micro_batch.labels[own],
        trajectory_index=micro_batch.trajectory_index[own],
        label_index=micro_batch.label_index[own],
    )


def at_all_labels(values: Tensor, part: Microbatch, group: dist.ProcessGroup) -> Tensor:
    """Values [..., n] at all labels of a micro-batch, from those [..., m] at the labels of a part.

    Collective over the context parallel group.
    """
    if group.size() == 1:
        return values
    counts = [len(trajectory.labels) for trajectory in part.trajectories]
    starts = torch.tensor([0, *accumulate(counts)])
    index = to_device(starts[part.trajectory_index] + part.label_index)
    whole = values.new_zeros(*values.shape[:-1], sum(counts)).index_copy_(-1, index, values)
    dist.all_reduce(whole, group=group)
    return whole


class GatherTokens(torch.autograd.Function):
    """Tokens of all ranks of a context parallel group, [t / size, ...] -> [t, ...] as packed.

    Each rank uses all of them, so the gradient of a rank's own is summed over the ranks.

    Args of `apply`: the tokens; `places`, int64 [t], places in the pack of what rank 0 holds, what
    rank 1 holds, and so on; `order`, its inverse; the group.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, places: Tensor, order: Tensor, group: Any) -> Tensor:
        ctx.places, ctx.group = places, group
        of_all = own.new_empty(group.size() * len(own), *own.shape[1:])
        dist.all_gather_into_tensor(of_all, own.contiguous(), group=group)
        return of_all.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        by_rank = gradient.index_select(0, ctx.places)
        own = by_rank.new_empty(len(by_rank) // ctx.group.size(), *by_rank.shape[1:])
        dist.reduce_scatter_tensor(own, by_rank, group=ctx.group)
        return own, None, None, None
