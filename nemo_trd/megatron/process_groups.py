"""Process groups of one model."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from nemo_trd.config.schema import Layout


def process_groups(layout: Layout) -> ProcessGroupCollection:
    """Process groups of one model over all ranks, in Megatron's rank order tp, cp, dp, pp.

    Student and teacher each have their own, unless their layouts are equal: then they share them,
    since they never compute at the same time. Collective: every rank calls it with the same
    layouts in the same order.
    """
    return _process_groups(
        dist.group.WORLD,
        layout.tensor_model_parallel_size,
        layout.context_parallel_size,
        layout.pipeline_model_parallel_size,
    )


@cache
def _process_groups(world: dist.ProcessGroup, tp: int, cp: int, pp: int) -> ProcessGroupCollection:
    ts, cs, ps = range(tp), range(cp), range(pp)
    ds = range(dist.get_world_size(world) // (tp * cp * pp))

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
    groups.expt_dp = groups.intra_expt_dp = groups.intra_dp_cp = groups.dp_cp
    groups.intra_dist_opt = _own_group([list(range(dist.get_world_size()))])
    return groups


def _own_group(members: Iterable[list[int]]) -> dist.ProcessGroup | None:
    """Create a group for each of `members`; return the one that this rank belongs to, if any."""
    own = None
    for ranks in members:
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            own = group
    return own
