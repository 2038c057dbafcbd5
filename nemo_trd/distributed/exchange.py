"""What ranks give each other: shares of work, results, failures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch.distributed as dist

from nemo_trd.config.errors import ConfigError
from nemo_trd.generation.protocol import GenerationFailed


def fail_together(
    make_share: Callable[[], list[Item]], group: dist.ProcessGroup | None = None
) -> list[Item]:
    """What this rank makes, once all ranks have made theirs. Collective.

    Raises:
        GenerationFailed: on all ranks, when it is raised on some.
    """
    share: list[Item] = []
    failure: str | None = None
    try:
        share = make_share()
    except GenerationFailed as error:
        failure = str(error)
    failures = {text for text in merge_shares([failure], group) if text}
    if failures:
        raise GenerationFailed("\n".join(sorted(failures)))
    return share


Item = TypeVar("Item")


Result = TypeVar("Result")


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
