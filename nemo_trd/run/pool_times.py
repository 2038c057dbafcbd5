"""Requests of a step to one pool of generators, and how long the pool worked on them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import perf_counter

from nemo_trd.data.types import Completion, GenerationRequest
from nemo_trd.generation.pending import Pending

Span = tuple[float, float]  # seconds since the sampling of the step began


class Asked:
    """Requests to one generator, made one by one. Needs a running event loop.

    Args:
        count: number of requests.
        begin: when the sampling of the step began, by time.perf_counter().
    """

    def __init__(self, count: int, begin: float) -> None:
        loop = asyncio.get_running_loop()
        self.requests: list[Pending] = [loop.create_future() for _ in range(count)]
        self._completions: list[asyncio.Future[Completion]] = [
            loop.create_future() for _ in range(count)
        ]
        self._begin = begin

    async def ask(self, position: int, request: GenerationRequest) -> tuple[Completion, Span]:
        """Make a request known. Returns its completion, and when it was under way."""
        first = perf_counter() - self._begin
        self.requests[position].set_result(request)
        completion = await self._completions[position]
        return completion, (first, perf_counter() - self._begin)

    def leave_out(self, position: int) -> None:
        """Make known that there is no request at this position."""
        self.requests[position].set_result(None)

    def done(self, position: int, completion: Completion) -> None:
        """Take the completion of a request from the generator."""
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
