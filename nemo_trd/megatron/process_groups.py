"""Process groups of one model."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from nemo_trd.config.schema import Layout
from nemo_trd.distributed.process import new_group


def process_groups(layout: Layout) -> ProcessGroupCollection:
    """Process groups of one model over all ranks, in Megatron's rank order tp, cp, dp, pp.

    The ranks of a stage are divided a second time for its experts: those that split an expert,
    those that share out the experts of a layer, those that hold the same ones.

    Student and teacher each have their own, unless their layouts are equal: then they share them,
    since they never compute at the same time. Collective: every rank calls it with the same
    layouts in the same order.
    """
    return _process_groups(
        dist.group.WORLD,
        layout.tensor_model_parallel_size,
        layout.context_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.expert_tensor_parallel_size,
        layout.expert_model_parallel_size,
    )


@cache
def _process_groups(
    world: dist.ProcessGroup, tp: int, cp: int, pp: int, etp: int, ep: int
) -> ProcessGroupCollection:
    ts, cs, ps = range(tp), range(cp), range(pp)
    ds = range(dist.get_world_size(world) // (tp * cp * pp))

    def rank(t: int, c: int, d: int, p: int) -> int:
        return t + len(ts) * (c + len(cs) * (d + len(ds) * p))

    def own(members: Iterable[list[int]]) -> dist.ProcessGroup | None:
        """Group of those `members` to which this rank belongs, if any."""
        groups = [_group(world, tuple(ranks)) for ranks in members]
        return next((group for group in groups if isinstance(group, dist.ProcessGroup)), None)

    groups = ProcessGroupCollection()
    groups.tp = own([rank(t, c, d, p) for t in ts] for p in ps for d in ds for c in cs)
    groups.cp = own([rank(t, c, d, p) for c in cs] for p in ps for d in ds for t in ts)
    groups.dp = own([rank(t, c, d, p) for d in ds] for p in ps for c in cs for t in ts)
    groups.pp = own([rank(t, c, d, p) for p in ps] for d in ds for c in cs for t in ts)
    groups.dp_cp = own([rank(t, c, d, p) for d in ds for c in cs] for p in ps for t in ts)
    groups.tp_cp = own([rank(t, c, d, p) for c in cs for t in ts] for p in ps for d in ds)
    groups.mp = own([rank(t, c, d, p) for p in ps for t in ts] for d in ds for c in cs)
    groups.tp_dp_cp = own([rank(t, c, d, p) for d in ds for c in cs for t in ts] for p in ps)
    # Tied embeddings exist on the first and the last stage; their gradients are summed there.
    ends = sorted({ps[0], ps[-1]})
    groups.embd = own([rank(t, c, d, p) for p in ends] for d in ds for c in cs for t in ts)
    groups.pos_embd = own([rank(t, c, d, 0)] for d in ds for c in cs for t in ts)
    ets, es = range(etp), range(ep)
    eds = range(dist.get_world_size(world) // (etp * ep * pp))

    def holder(t: int, e: int, d: int, p: int) -> int:
        return t + len(ets) * (e + len(es) * (d + len(eds) * p))

    groups.expt_tp = own([holder(t, e, d, p) for t in ets] for p in ps for d in eds for e in es)
    groups.ep = own([holder(t, e, d, p) for e in es] for p in ps for d in eds for t in ets)
    groups.expt_dp = own([holder(t, e, d, p) for d in eds] for p in ps for e in es for t in ets)
    groups.tp_ep = own([holder(t, e, d, p) for e in es for t in ets] for p in ps for d in eds)
    groups.tp_ep_pp = own([holder(t, e, d, p) for p in ps for e in es for t in ets] for d in eds)
    groups.intra_expt_dp, groups.intra_dp_cp = groups.expt_dp, groups.dp_cp
    # megatron-core asks for it too; there is one optimizer instance.
    groups.intra_dist_opt = world
    return groups


@cache
def _group(world: dist.ProcessGroup, ranks: tuple[int, ...]) -> object:
    """Group of `ranks`, no `ProcessGroup` elsewhere. One for all purposes: each connects anew.

    Every rank calls this for the same ranks in the same order.
    """
    if len(ranks) == dist.get_world_size(world):
        return world
    # A rank makes a group of itself without the others.
    return new_group(list(ranks), use_local_synchronization=len(ranks) == 1)
