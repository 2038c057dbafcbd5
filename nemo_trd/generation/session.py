"""A pool of servers that is open for requests, within one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import SecretStr
from tenacity import (
    AsyncRetrying,
    RetryError,
    retry_if_exception_type,
    stop_after_attempt,
    wait_random_exponential,
)
from tqdm import tqdm

from nemo_trd.config.schema import VllmClient
from nemo_trd.generation.api import GENERATE, AttemptFailed, Connection
from nemo_trd.generation.pool import Dispatcher, Member
from nemo_trd.generation.protocol import GenerationFailed

Result = TypeVar("Result")
Probe = Callable[[Connection, Member], Awaitable[None]]


class RequestFailed(GenerationFailed):
    """All attempts at one request failed. Names every server that was asked, and its cause."""


@dataclass(frozen=True)
class Job(Generic[Result]):
    """One request, and how to read the response: (result, how many tokens it is worth)."""

    name: str
    body: dict[str, Any]
    affinity: int | None
    read: Callable[[Any, str], tuple[Result, int]]


class Session:
    """Requests to the members of a pool, each with as many attempts as it takes."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        connection: Connection,
        settings: VllmClient,
        progress: Progress,
    ) -> None:
        self._dispatcher = dispatcher
        self._connection = connection
        self._settings = settings
        self._progress = progress

    async def ask(self, job: Job[Result]) -> Result:
        """The result of one request.

        Raises:
            Refused: a server refuses it.
            RequestFailed: `max_attempts` failed.
        """
        settings = self._settings
        failures: list[AttemptFailed] = []
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(AttemptFailed),
            stop=stop_after_attempt(settings.max_attempts),
            wait=wait_random_exponential(settings.backoff_seconds, settings.max_backoff_seconds),
        )
        try:
            async for attempt in retrying:
                with attempt:
                    avoid = {failure.url for failure in failures}
                    async with self._dispatcher.lease(job.affinity, avoid) as member:
                        try:
                            content = await self._connection.call(
                                "POST",
                                member.url,
                                GENERATE,
                                job.body,
                                settings.request_timeout_seconds,
                            )
                            result, tokens = job.read(content, member.url)
                        except AttemptFailed as failure:
                            failures.append(failure)
                            self._dispatcher.take_out(member, failure)
                            raise
                        member.failures = 0
                        self._progress.add(tokens)
                        return result
        except RetryError:
            pass
        raise RequestFailed(
            f"{job.name} failed {len(failures)} times (generation.vllm.client.max_attempts):"
            + "".join(f"\n  {failure}" for failure in failures)
        ) from None


@asynccontextmanager
async def open_session(
    members: Sequence[Member],
    settings: VllmClient,
    api_key: SecretStr | None,
    probe: Probe,
    stopping: Callable[[], bool],
    bar: tqdm,
) -> AsyncIterator[Session]:
    """Probe the members, and yield once one of them is in service.

    Raises:
        Refused: none is in service, and one refuses us.
        BaseExceptionGroup: around what went wrong inside; see `run_loop`.
    """
    limit = len(members) * (settings.max_concurrency + 1)
    secure = any(member.url.startswith("https:") for member in members)
    connection = Connection(api_key, limit, secure)
    dispatcher = Dispatcher(members, settings, lambda member: probe(connection, member), stopping)
    try:
        await dispatcher.check_all()
        with bar:
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(dispatcher.watch())
                async with dispatcher.lease(None, ()):
                    pass
                yield Session(dispatcher, connection, settings, Progress(bar))
                watch.cancel()
    finally:
        dispatcher.close()
        await connection.close()


class Progress:
    """Requests done, and tokens per second."""

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar
        self._tokens = 0

    def add(self, tokens: int) -> None:
        self._tokens += tokens
        if self._bar.disable:
            return
        seconds = self._bar.format_dict["elapsed"]
        if seconds > 0:
            self._bar.set_postfix_str(f"{self._tokens / seconds:,.0f} tok/s", refresh=False)
        self._bar.update()
