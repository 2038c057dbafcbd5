"""Process groups of one model, and the few exchanges that the loop needs between ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, TypeVar, cast

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from nemo_trd.config import ConfigError, Layout

Item = TypeVar("Item")
Result = TypeVar("Result")


def process_groups(layout: Layout) -> ProcessGroupCollection:
    """The groups of one model over all ranks, in Megatron's rank order tp, cp, dp, pp.

    Student and teacher each have their own, unless they are split alike: then they share them,
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


def own_share(items: Sequence[Item], group: dist.ProcessGroup | None = None) -> list[Item]:
    """What this rank takes of work that all ranks (of `group`) know: every size-th item."""
    return list(items[dist.get_rank(group) :: dist.get_world_size(group)])


def merge_shares(share: Sequence[Item], group: dist.ProcessGroup | None = None) -> list[Item]:
    """Undo `own_share`: all ranks (of `group`) get all items in their first order. Collective.

    A thread that runs beside others brings a group of its own.
    """
    shares: list[list[Item]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(shares, list(share), group)
    merged: list[Item] = []
    for position in range(max(len(s) for s in shares)):
        merged += [s[position] for s in shares if position < len(s)]
    return merged


def raise_together(check: Callable[[], Result]) -> Result:
    """Run a check on every rank; when it fails on some, raise on all. Collective.

    Raises:
        ConfigError: the messages of all ranks, equal ones once, with the ranks they came from.
    """
    message, result = None, None
    try:
        result = check()
    except ConfigError as error:
        message = str(error)
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    ranks: dict[str, list[int]] = {}
    for rank, text in enumerate(messages):
        if text is not None:
            ranks.setdefault(text, []).append(rank)
    if not ranks:
        return cast(Result, result)
    everywhere = [list(range(dist.get_world_size()))]
    raise ConfigError(
        "\n".join(
            text if [where] == everywhere else f"on ranks {where}: {text}"
            for text, where in ranks.items()
        )
    )


def from_first_rank(make: Callable[[], Result]) -> Result:
    """What rank 0 makes; the others get a copy of it. Collective.

    Raises:
        ConfigError: on all ranks, what `make` raised.
    """
    made: list[Any] = [None, None]  # what, and the message of a refusal
    if dist.get_rank() == 0:
        try:
            made[0] = make()
        except ConfigError as error:
            made[1] = str(error)
    dist.broadcast_object_list(made, src=0)
    if made[1] is not None:
        raise ConfigError(made[1])
    return cast(Result, made[0])
