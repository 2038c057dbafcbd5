"""Requests of a step to one pool of generators, and how long the pool worked on them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter

from nemo_trd.data.types import Completion, GenerationRequest
from nemo_trd.generation.pending import Pending
from nemo_trd.generation.protocol import Generator
from nemo_trd.records.under_way import UnderWay

Span = tuple[float, float]  # seconds since the sampling of the step began


class Asked:
    """Requests to one generator, made one by one. Needs a running event loop.

    Args:
        generator: whose weights complete them.
        count: number of requests.
        begin: when the sampling of the step began, by time.perf_counter().
        under_way: where completions are kept, and found if they were there before.
    """

    def __init__(
        self, generator: Generator, count: int, begin: float, under_way: UnderWay | None
    ) -> None:
        loop = asyncio.get_running_loop()
        self.requests: list[Pending] = [loop.create_future() for _ in range(count)]
        self._completions: list[asyncio.Future[Completion]] = [
            loop.create_future() for _ in range(count)
        ]
        self._version = generator.weight_version
        self._begin = begin
        self._under_way = under_way

    async def ask(self, position: int, request: GenerationRequest) -> tuple[Completion, Span]:
        """Make a request known. Returns its completion, and when it was under way."""
        first = perf_counter() - self._begin
        if self._under_way is not None:
            kept = self._under_way.find(request, self._version)
            if kept is not None:
                self.leave_out(position)
                return kept, (first, first)
        self.requests[position].set_result(request)
        completion = await self._completions[position]
        return completion, (first, perf_counter() - self._begin)

    def leave_out(self, position: int) -> None:
        """Make known that there is no request at this position."""
        self.requests[position].set_result(None)

    def done(self, position: int, completion: Completion) -> None:
        """Take the completion of a request from the generator."""
        request = self.requests[position].result()
        if self._under_way is not None and request is not None:
            self._under_way.add(request, replace(completion, scores=None))
        self._completions[position].set_result(completion)


def sampling_seconds(
    rollouts: Sequence[Span], rewrites: Sequence[Span], whole: float
) -> dict[str, float]:
    """Seconds of a step's sampling; "rollout" and "refinement" are the whole.

    Args:
        rollouts, rewrites: when each was under way, on any rank.
        whole: seconds of all of it.

    Returns:
        "rollout": until the last rollout has ended, "refinement": from then on; "student_pool",
        "teacher_pool": in which the pool had a request.
    """
    last = min(whole, max((end for _, end in rollouts), default=0.0))
    return {
        "rollout": last,
        "refinement": whole - last,
        "student_pool": busy_seconds(rollouts),
        "teacher_pool": busy_seconds(rewrites),
    }


def busy_seconds(spans: Sequence[Span]) -> float:
    """Length of the union of spans."""
    busy, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    return busy
