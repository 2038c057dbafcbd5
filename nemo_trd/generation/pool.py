"""Which replica works on which request: load, prefix caches, replicas that fail and come back."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from nemo_trd.config.schema import VllmClient
from nemo_trd.generation.api import AttemptFailed, Refused
from nemo_trd.generation.protocol import GenerationFailed

log = logging.getLogger(__name__)

# A request goes past the replica that has its prefix in the cache when that one has more than
# so many times the average load (consistent hashing with bounded loads, arXiv 1608.01350).
LOAD_BOUND = 1.25
STOPPING_SECONDS = 1.0  # between looks at whether we are to stop
# So long is waited for a server even then: one that is between two weights is soon back.
STOPPING_GRACE_SECONDS = 5.0


class AllReplicasDown(GenerationFailed):
    """No replica of a pool can be used. Names each with the cause."""


@dataclass
class Member:
    """One server of a pool, as one client sees it."""

    url: str
    load: int = 0  # our requests that it works on
    in_service: bool = True
    failures: int = 0  # in a row
    cause: str = "it was never asked"  # of the last failure
    max_model_len: int | None = None  # tokens of prompt and completion together, when known


def choose(
    members: Sequence[Member], affinity: int | None, avoid: Collection[str], max_load: int
) -> Member | None:
    """The member for a request, or None when it must wait.

    Requests of equal `affinity` share a prefix and go to the same member (rendezvous hashing: when
    one leaves, only its own requests move), unless that would overload it; others go where the
    load is least. URLs in `avoid` come into question only when there is no other in service.
    """
    usable = [member for member in members if member.in_service]
    usable = [member for member in usable if member.url not in avoid] or usable
    free = [member for member in usable if member.load < max_load]
    if not free:
        return None
    if affinity is not None:
        bound = math.ceil(LOAD_BOUND * (1 + sum(member.load for member in usable)) / len(usable))
        below = [member for member in free if member.load < bound]
        if below:
            return max(below, key=lambda member: _weight(affinity, member.url))
    return min(free, key=lambda member: member.load)


def _weight(affinity: int, url: str) -> bytes:
    return hashlib.blake2b(f"{affinity} {url}".encode(), digest_size=8).digest()


class Dispatcher:
    """Hands out members within one call of a generator, first come, first served.

    A member that fails is out of service. In the background it is probed, at growing intervals,
    until `probe` returns: then it gets work again.
    """

    def __init__(
        self,
        members: Sequence[Member],
        settings: VllmClient,
        probe: Callable[[Member], Awaitable[None]],
        stopping: Callable[[], bool],
    ) -> None:
        self._members = members
        self._settings = settings
        self._probe = probe
        self._stopping = stopping
        self._waiting: deque[tuple[asyncio.Future[Member], int | None, Collection[str]]] = deque()
        self._probes: set[asyncio.Task[None]] = set()
        self._in_service = asyncio.Event()  # at least one member is
        self._out_of_service = asyncio.Event()  # none is
        for member in members:
            member.load = 0

    async def check_all(self) -> None:
        """Probe every member before it gets work.

        Raises:
            Refused: none is in service, and one refuses us.
        """
        refusals: list[Refused] = []

        async def check(member: Member) -> None:
            try:
                await self._probe(member)
                self._put_back(member)
            except (AttemptFailed, Refused) as error:
                if isinstance(error, Refused):
                    refusals.append(error)
                member.in_service = True  # until it is taken out, in the next line
                self.take_out(member, error)

        await asyncio.gather(*(check(member) for member in self._members))
        if refusals and not any(member.in_service for member in self._members):
            raise refusals[0]

    @asynccontextmanager
    async def lease(self, affinity: int | None, avoid: Collection[str]) -> AsyncIterator[Member]:
        """Wait for a member and count a request of ours there."""
        future: asyncio.Future[Member] = asyncio.get_running_loop().create_future()
        self._waiting.append((future, affinity, avoid))
        self._dispatch()
        member = await future
        try:
            yield member
        finally:
            member.load -= 1
            self._dispatch()

    def take_out(self, member: Member, error: AttemptFailed | Refused) -> None:
        member.failures += 1
        member.cause = error.cause if isinstance(error, AttemptFailed) else str(error)
        if not member.in_service:
            return
        member.in_service = False
        log.warning("%s is out of service: %s", member.url, member.cause)
        if not any(other.in_service for other in self._members):
            self._in_service.clear()
            self._out_of_service.set()
        task = asyncio.create_task(self._bring_back(member))
        self._probes.add(task)
        task.add_done_callback(self._probes.discard)

    async def watch(self) -> None:
        """Runs until no member has been in service for `recovery_timeout_seconds`, or, when we are
        `stopping`, for STOPPING_GRACE_SECONDS.

        Raises:
            AllReplicasDown: then.
        """
        limit = self._settings.recovery_timeout_seconds
        while True:
            await self._out_of_service.wait()
            since = time.monotonic()
            while not self._in_service.is_set():
                waited = time.monotonic() - since
                if waited >= limit or (waited >= STOPPING_GRACE_SECONDS and self._stopping()):
                    raise AllReplicasDown(self._all_down(waited))
                with suppress(TimeoutError):
                    pause = min(STOPPING_SECONDS, limit - waited)
                    await asyncio.wait_for(self._in_service.wait(), pause)

    def _all_down(self, seconds: float) -> str:
        causes = "".join(f"\n  {member.url}: {member.cause}" for member in self._members)
        return f"none of {len(self._members)} servers could be used for {seconds:.1f} s:{causes}"

    def close(self) -> None:
        for task in self._probes:
            task.cancel()

    def _dispatch(self) -> None:
        while self._waiting:
            future, affinity, avoid = self._waiting[0]
            if not future.done():  # else its request was given up
                limit = self._settings.max_concurrency
                member = choose(self._members, affinity, avoid, limit)
                if member is None:
                    return
                member.load += 1
                future.set_result(member)
            self._waiting.popleft()

    def _put_back(self, member: Member) -> None:
        member.in_service = True
        self._out_of_service.clear()
        self._in_service.set()
        self._dispatch()

    async def _bring_back(self, member: Member) -> None:
        settings = self._settings
        while not member.in_service:
            exponent = min(member.failures - 1, 30)
            pause = min(settings.backoff_seconds * 2**exponent, settings.max_backoff_seconds)
            await asyncio.sleep(pause * random.uniform(0.5, 1))
            try:
                await self._probe(member)
            except (AttemptFailed, Refused) as error:
                self.take_out(member, error)
            else:
                log.info("%s is back in service", member.url)
                self._put_back(member)
