"""Requests that become known while others are under way, and the event loop for that."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeAlias, TypeVar

from nemo_trd.data.types import GenerationRequest

Result = TypeVar("Result")
Pending: TypeAlias = "asyncio.Future[GenerationRequest | None]"  # None: there will be no request


def known(request: GenerationRequest | None) -> Pending:
    """What is known already of a request. Needs a running event loop."""
    future: Pending = asyncio.get_running_loop().create_future()
    future.set_result(request)
    return future


async def any_request(requests: Sequence[Pending]) -> bool:
    """Wait for the first request that is one; False when none of them is."""
    for request in asyncio.as_completed(requests):
        if await request is not None:
            return True
    return False


def run_loop(work: Coroutine[Any, Any, Result]) -> Result:
    """Run in an event loop of its own. Of a group of exceptions the first one is raised.

    It has cancelled the rest; what else failed meanwhile adds nothing.
    """
    try:
        return asyncio.run(work)
    except BaseExceptionGroup as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None
