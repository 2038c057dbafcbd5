"""Process groups of one model, and the few exchanges that the loop needs between ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from nemo_trd.config import Layout

Item = TypeVar("Item")


def process_groups(layout: Layout) -> ProcessGroupCollection:
    """The groups of one model over all ranks, in Megatron's rank order tp, cp, dp, pp.

    Student and teacher each have their own: nothing here is global. Collective: every rank
    calls it with the same layouts in the same order.
    """
    ts = range(layout.tensor_model_parallel_size)
    cs = range(layout.context_parallel_size)
    ps = range(layout.pipeline_model_parallel_size)
    ds = range(dist.get_world_size() // layout.model_parallel_size)

    def rank(t: int, c: int, d: int, p: int) -> int:
        return t + len(ts) * (c + len(cs) * (d + len(ds) * p))

    groups = ProcessGroupCollection()
    groups.tp = _own_group([rank(t, c, d, p) for t in ts] for p in ps for d in ds for c in cs)
    groups.cp = _own_group([rank(t, c, d, p) for c in cs] for p in ps for d in ds for t in ts)
    groups.dp = _own_group([rank(t, c, d, p) for d in ds] for p in ps for c in cs for t in ts)
    groups.pp = _own_group([rank(t, c, d, p) for p in ps] for d in ds for c in cs for t in ts)
    groups.dp_cp = _own_group([rank(t, c, d, p) for d in ds for c in cs] for p in ps for t in ts)
    groups.tp_cp = _own_group([rank(t, c, d, p) for c in cs for t in ts] for p in ps for d in ds)
    groups.mp = _own_group([rank(t, c, d, p) for p in ps for t in ts] for d in ds for c in cs)
    groups.tp_dp_cp = _own_group([rank(t, c, d, p) for d in ds for c in cs for t in ts] for p in ps)
    # Tied embeddings exist on the first and the last stage; their gradients are summed there.
    ends = sorted({ps[0], ps[-1]})
    groups.embd = _own_group([rank(t, c, d, p) for p in ends] for d in ds for c in cs for t in ts)
    groups.pos_embd = _own_group([rank(t, c, d, 0)] for d in ds for c in cs for t in ts)
    # megatron-core asks for these too. There are no experts, and one optimizer instance.
    groups.ep = _own_group([r] for r in range(dist.get_world_size()))
    groups.expt_tp = groups.tp_ep = groups.tp
    groups.tp_ep_pp = groups.mp
    groups.expt_dp = groups.intra_expt_dp = groups.dp
    groups.intra_dp_cp = groups.dp_cp
    groups.intra_dist_opt = _own_group([list(range(dist.get_world_size()))])
    return groups


def _own_group(members: Iterable[list[int]]) -> dist.ProcessGroup | None:
    """Create every group of `members`, return the one that this rank belongs to, if any."""
    own = None
    for ranks in members:
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            own = group
    return own


def own_share(items: Sequence[Item]) -> list[Item]:
    """What this rank takes of work that all ranks know: every world-size-th item."""
    return list(items[dist.get_rank() :: dist.get_world_size()])


def merge_shares(share: Sequence[Item]) -> list[Item]:
    """Undo `own_share`: all ranks get all items in their first order. Collective."""
    shares: list[list[Item]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(shares, list(share))
    merged: list[Item] = []
    for position in range(max(len(s) for s in shares)):
        merged += [s[position] for s in shares if position < len(s)]
    return merged
