"""Generation on vLLM servers: tokens in, tokens out, over HTTP, from a pool of equal replicas."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr
from tqdm import tqdm

from nemo_trd.config.errors import rule_broken
from nemo_trd.config.schema import Sampling, VllmClient
from nemo_trd.data.types import (
    Completion,
    FinishReason,
    GenerationRequest,
    TokenIds,
    TokenScores,
)
from nemo_trd.generation.api import (
    AttemptFailed,
    Connection,
    SampledTokens,
    StaleWeights,
    Wanted,
    field_of,
    generation_body,
    read_completion,
    read_scores,
    scoring_body,
    version_number,
)
from nemo_trd.generation.pending import Pending, any_request, known, run_loop
from nemo_trd.generation.pool import Member
from nemo_trd.generation.protocol import Done
from nemo_trd.generation.session import Job, Session, open_session
from nemo_trd.generation.stop_strings import Decode, StopStrings

if TYPE_CHECKING:
    import torch

    from nemo_trd.generation.weight_sync import WeightSync
    from nemo_trd.models.vocabulary import Vocabulary

log = logging.getLogger(__name__)


class VllmGenerator:
    """Samples on the servers at `urls`, which serve one model. Implements `Generator`.

    `sync` brings new weights to the servers; without it they keep those they have loaded
    themselves. These are version `initial_version`; None where the model never had them, so that a
    server which starts again gets no work before `sync` has reached it. `served_model` is the name
    of an adapter on them; `frozen` says that they are given such an adapter by somebody else, and
    asked for their base. With `logprobs`, completions carry those of their tokens, and with
    `wanted` scores. Servers with `drafts` take no biases. `decode` is needed where `Sampling.stop`
    is used.

    A request is idempotent, by its seed: one that fails goes to another replica. A replica that
    fails is asked again when it is healthy, unpaused and has the current weights.
    """

    def __init__(
        self,
        urls: Sequence[str],
        vocabulary: Vocabulary,
        settings: VllmClient,
        *,
        api_key: SecretStr | None = None,
        sync: WeightSync | None = None,
        initial_version: int | None = 0,
        served_model: str | None = None,
        frozen: bool = False,
        logprobs: bool = False,
        wanted: Wanted | None = None,
        drafts: bool = False,
        progress: bool = False,
        stopping: Callable[[], bool] = lambda: False,
        decode: Decode | None = None,
    ) -> None:
        self.weight_version = 0
        self._stopping = stopping
        self._members = [Member(url) for url in urls]
        self.vocabulary = vocabulary
        self._eos_token_ids = frozenset(vocabulary.ends)
        self._never = frozenset(vocabulary.never)
        self._settings = settings
        self._api_key = api_key
        self._sync = sync
        self._number = partial(version_number, initial=initial_version)
        self._frozen = frozen
        self._model = {} if served_model is None else {"model": served_model}
        self._logprobs = logprobs
        self._wanted = wanted
        self._drafts = drafts
        self._progress = progress
        self._decode = decode
        self._lock = threading.Lock()  # of the members' loads: one batch at a time

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        description: str,
        done: Done | None = None,
    ) -> list[Completion]:
        """Completions in the order of `requests`; see `Generator`.

        Raises:
            ConfigError: a prompt with `sampling.max_tokens` exceeds what the servers take.
            Refused: the servers refuse a request, or all of ours.
            RequestFailed: `max_attempts` at one request failed.
            AllReplicasDown: no server was usable for `recovery_timeout_seconds`, or none is and
                we are `stopping`.
        """
        completions: dict[int, Completion] = {}

        def keep(position: int, completion: Completion) -> None:
            completions[position] = completion
            if done:
                done(position, completion)

        async def stream() -> None:
            await self.stream([known(request) for request in requests], sampling, description, keep)

        run_loop(stream())
        return [completions[position] for position in range(len(requests))]

    async def stream(
        self,
        requests: Sequence[Pending],
        sampling: Sampling,
        description: str,
        done: Done,
    ) -> None:
        """Complete each request as soon as it is known; see `Generator`. Raises as `generate`.

        No server is asked for anything before there is a request.
        """
        if not await any_request(requests):
            return
        with self._lock:
            async with self._open(len(requests), description) as session:
                there = [request.result() for request in requests if request.done()]
                self._check([r for r in there if r is not None], sampling, description)

                async def answer(position: int) -> None:
                    # Whoever makes it known may do so after another one has failed.
                    request = await asyncio.shield(requests[position])
                    if request is None:
                        return
                    self._check([request], sampling, description)
                    name = f"{description} {position}"
                    done(position, await session.ask(self._job(name, request, sampling)))

                async with asyncio.TaskGroup() as group:
                    for position in range(len(requests)):
                        group.create_task(answer(position))

    def _job(self, name: str, request: GenerationRequest, sampling: Sampling) -> Job[Completion]:
        wanted, logprobs, redrawn = self._wanted, 0 if self._logprobs else None, 0
        if wanted:  # one more: in JSON the sampled token may take the last one's place
            logprobs = min(wanted.top_k + wanted.spare + 1, self.vocabulary.columns)

        def read(content: Any, url: str) -> tuple[Completion, int]:
            nonlocal redrawn
            sampled = read_completion(
                content, url, sampling, self._eos_token_ids, self._logprobs, wanted
            )
            if wanted and "scores" not in content:
                _tell_of_json(url)
            self._check_ids(sampled.token_ids, url)
            labels = tuple(label for label, _ in sampled.versions)
            try:
                version = self._accept(labels, url, request.oldest_version)
            except StaleWeights:
                redrawn += 1
                raise
            prompt = request.prompt_token_ids
            completion = self._completion(sampled, version, prompt, sampling, url)
            return replace(completion, redrawn=redrawn), len(sampled.token_ids)

        body = generation_body(request, sampling, self._eos_token_ids, logprobs)
        if wanted:
            body["scores"] = wanted.body()
        body |= self._model
        body["sampling_params"] |= self.vocabulary.constraint(biases=not self._drafts)
        return Job(name, body, request.affinity, read)

    def _check(
        self, requests: Sequence[GenerationRequest], sampling: Sampling, description: str
    ) -> None:
        lengths = [len(request.prompt_token_ids) for request in requests]
        if 0 in lengths:
            number = lengths.index(0)
            raise ValueError(f"{description}: the prompt of request {number} is empty")
        self._check_lengths(lengths, sampling.max_tokens, description)

    def _completion(
        self, sampled: SampledTokens, version: int, prompt: TokenIds, sampling: Sampling, url: str
    ) -> Completion:
        """Cut as in this process, so that both ways of generating agree on every token; with the
        end that it is given.

        Raises:
            AttemptFailed: it ended with neither an EOS token nor a text of `sampling.stop`.
        """
        ids, tail = sampled.token_ids, ""
        reason: FinishReason = sampled.finish_reason
        labels = self.vocabulary.ended(ids)
        ended = reason == "stop" and ids[-1:] and ids[-1] in self._eos_token_ids
        if sampling.stop:
            assert self._decode is not None, "stop needs a tokenizer: give the generator `decode`"
            stops = StopStrings(sampling.stop, self._decode)
            cut = stops.cut(prompt, ids[:-1] if ended else ids)
            if cut is not None:
                labels, reason, tail = cut.token_ids, "stop_string", cut.tail
            elif reason == "stop" and not ended:
                raise AttemptFailed(url, f"it ended a completion at none of {sampling.stop}")
        count, logprobs, scores = len(labels), sampled.logprobs, sampled.scores
        if scores is not None:  # none is known of an end that takes the place of the sampled one
            scores = scores.first(count) if labels == ids[:count] else None
        kept = None if logprobs is None else logprobs[:count]
        spans = [(self._number(label), start) for label, start in sampled.versions]
        spans = [] if self._frozen else spans  # of what is not asked for
        versions = tuple((n, start) for n, start in spans if n is not None and start < count)
        several = versions if len(versions) > 1 else ()
        return Completion(labels, reason, version, kept, tail, scores, sampled.drafts, several)

    def score(
        self, sequences: Sequence[tuple[TokenIds, int]], wanted: Wanted, description: str
    ) -> list[TokenScores]:
        """Log-probabilities of the tokens from `label_start` on, each after all before it.

        `sequences` are (token ids, label_start) with label_start of 1 or more; one token of the
        servers' context must be left. Raises as `generate`.
        """
        jobs = []
        for number, (token_ids, label_start) in enumerate(sequences):
            if not 1 <= label_start <= len(token_ids):
                raise ValueError(
                    f"{description}: labels of sequence {number} start at {label_start}, "
                    f"it has {len(token_ids)} tokens and the first one has no distribution"
                )

            def read(
                content: Any, url: str, ids: TokenIds = token_ids, start: int = label_start
            ) -> tuple[TokenScores, int]:
                scores, versions = read_scores(content, url, ids, start, wanted)
                self._accept(versions, url)
                if "scores" not in content:
                    _tell_of_json(url)
                return scores, len(scores.label_logprobs)

            name = f"{description} {number}"
            body = scoring_body(token_ids, label_start, wanted) | self._model
            jobs.append(Job(name, body, None, read))
        if not jobs:
            return []
        return run_loop(self._score(jobs, max(len(ids) for ids, _ in sequences), description))

    async def _score(
        self, jobs: Sequence[Job[TokenScores]], longest: int, description: str
    ) -> list[TokenScores]:
        with self._lock:
            async with self._open(len(jobs), description) as session:
                self._check_lengths([longest], 1, description)
                async with asyncio.TaskGroup() as group:
                    scores = [group.create_task(session.ask(job)) for job in jobs]
            return [task.result() for task in scores]

    def _check_ids(self, token_ids: TokenIds, url: str) -> None:
        """Raises AttemptFailed: it holds an id that no server of this model may sample."""
        outside = self._never.intersection(token_ids)
        if outside:
            raise AttemptFailed(
                url,
                f"it sampled id {min(outside)}, which has no token and was forbidden: it ignores "
                "logit_bias and allowed_token_ids, or serves another model",
            )

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Bring these weights to all replicas; see `WeightSync.load_weights`. Collective."""
        assert self._sync is not None, "these servers keep the weights that they have loaded"
        self._sync.load_weights(tensors, version)
        self.weight_version = version

    def _open(self, total: int, description: str) -> AbstractAsyncContextManager[Session]:
        hide = not self._progress
        bar = tqdm(total=total, desc=description, unit="seq", leave=False, disable=hide)
        return open_session(
            self._members, self._settings, self._api_key, self._probe, self._stopping, bar
        )

    async def _probe(self, connection: Connection, member: Member) -> None:
        """Return when the replica can be given work.

        Raises:
            AttemptFailed: it does not answer, is paused, or has other weights than the current.
            Refused: it has not the endpoints that we need, or refuses our key.
        """
        url = member.url
        label = await self._version_label(connection, url)
        accepted = self._settings.stale_weights == "keep"
        if self._sync is not None and self._number(label) != self.weight_version:
            # A server may have the weights of a sync that has yet to end on this rank.
            accepted |= await asyncio.to_thread(self._sync.update_replica, url)
            label = await self._version_label(connection, url)
        if not self._frozen and not (accepted and self._number(label) is not None):
            self._check_version((label,), url)
        if field_of(await connection.call("GET", url, "/is_paused"), "is_paused", url):
            raise AttemptFailed(url, "it is paused")
        models = field_of(await connection.call("GET", url, "/v1/models"), "data", url)
        member.max_model_len = models[0].get("max_model_len") if models else None

    async def _version_label(self, connection: Connection, url: str) -> str:
        content = await connection.call("GET", url, "/weight_info")
        return str(field_of(content, "weight_version", url))

    def _accept(self, labels: tuple[str, ...], url: str, oldest: int | None = None) -> int:
        """The oldest version of a completion, if `oldest` or else `stale_weights` lets it pass.

        Raises:
            StaleWeights: another attempt is to be made.
            RuntimeError: `stale_weights` is "error".
        """
        if self._frozen:
            return self.weight_version
        policy = self._settings.stale_weights
        try:
            if oldest is None:
                self._check_version(labels, url)
        except StaleWeights as stale:
            if policy == "retry":
                raise
            if policy == "error":
                raise RuntimeError(
                    f"{stale} (generation.vllm.client.stale_weights=error)"
                ) from None
        versions = [self._number(label) for label in labels]
        known = [version for version in versions if version is not None]
        if len(known) < len(versions):
            raise AttemptFailed(url, f"its weights {labels} are none of ours")
        if oldest is not None and min(known) < oldest:
            raise StaleWeights(
                url, f"its weights are {', '.join(labels)}, and may not be older than {oldest}"
            )
        return min(known)

    def _check_version(self, labels: tuple[str, ...], url: str) -> None:
        if any(self._number(label) != self.weight_version for label in labels):
            raise StaleWeights(
                url, f"its weights are {', '.join(labels)}, current is {self.weight_version}"
            )

    def _check_lengths(self, lengths: list[int], max_tokens: int, description: str) -> None:
        """Servers shorten completions in silence where the context ends; we do not let them."""
        known = [m.max_model_len for m in self._members if m.in_service and m.max_model_len]
        limit, longest = min(known, default=None), max(lengths)
        if limit is not None and longest + max_tokens > limit:
            raise rule_broken(
                f"max_tokens of {description}",
                max_tokens,
                f"with a prompt of {longest} tokens it exceeds max_model_len = {limit} of "
                f"{', '.join(member.url for member in self._members)}",
                f"set it to {limit - longest} or less, or shorten the prompts"
                if longest < limit
                else "shorten the prompts",
            )


@cache
def _tell_of_json(url: str) -> None:
    """Say that a server sends scores the long way: once, whoever asks it."""
    log.warning(
        "%s sends log-probabilities as JSON, several times as many bytes as in binary: it was "
        "started without nemo_trd_scores.AnswerInArrays (docs/servers.md)",
        url,
    )
