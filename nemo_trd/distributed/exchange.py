"""Exchanges between ranks: shares of work, results, failures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist

from nemo_trd.config.errors import ConfigError
from nemo_trd.generation.protocol import GenerationFailed

Item = TypeVar("Item")
Result = TypeVar("Result")


def fail_together(
    make_share: Callable[[], list[Item]], group: dist.ProcessGroup | None = None
) -> list[Item]:
    """Make this rank's share of work; return it once all ranks have made theirs. Collective.

    Raises:
        ConfigError, GenerationFailed: on all ranks, when it is raised on some.
    """
    share: list[Item] = []
    failure: tuple[bool, str] | None = None
    try:
        share = make_share()
    except (ConfigError, GenerationFailed) as error:
        failure = isinstance(error, ConfigError), str(error)
    failures = sorted({one for one in merge_shares([failure], group) if one})
    if refused := [text for of_settings, text in failures if of_settings]:
        raise ConfigError("\n".join(refused))
    if failures:
        raise GenerationFailed("\n".join(text for _, text in failures))
    return share


def own_share(items: Sequence[Item], group: dist.ProcessGroup | None = None) -> list[Item]:
    """Share of this rank in work that all ranks (of `group`) know: every size-th item."""
    return list(items[dist.get_rank(group) :: dist.get_world_size(group)])


def merge_shares(share: Sequence[Item], group: dist.ProcessGroup | None = None) -> list[Item]:
    """Undo `own_share`: all ranks (of `group`) get all items in their first order. Collective.

    A thread that runs beside others needs a group of its own.
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
    """Run `make` on rank 0 and send its result to all ranks. Collective.

    Raises:
        ConfigError: on all ranks, the one that `make` raised.
    """
    outcome: list[Any] = [None, None]  # result, error message
    if dist.get_rank() == 0:
        try:
            outcome[0] = make()
        except ConfigError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise ConfigError(outcome[1])
    return cast(Result, outcome[0])


def all_come(occasion: str, seconds: float) -> bool:
    """Whether every rank calls this. None waits for the others longer than `seconds`.

    Args:
        occasion: one that a process has once.
    """
    # What torch offers in public cannot wait with a limit while a rank is missing.
    store = dist.distributed_c10d._get_default_store()
    try:
        if store.add(f"nemo_trd/{occasion}", 1) == dist.get_world_size():
            store.set(f"nemo_trd/{occasion}/all", "")
        store.wait([f"nemo_trd/{occasion}/all"], timedelta(seconds=seconds))
    except RuntimeError:  # also where the store has gone with rank 0
        return False
    return True
