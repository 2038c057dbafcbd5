"""Requests to a vLLM server, and the form that its responses must have.

Tokens go in and out as ids through /inference/v1/generate (vLLM 0.32, --enable-scale-out), whose
responses say which weights sampled which tokens; vLLM's OpenAI endpoints do not. Log-probabilities
of many ids come as safetensors from servers that were started by `nemo_trd.serve`
(nemo_trd/serve/worker/nemo_trd_scores.py), in JSON from others.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import httpx
import numpy as np
from pydantic import BaseModel, Field, InstanceOf, SecretStr, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load

from nemo_trd.config.schema import Sampling
from nemo_trd.data.types import GenerationRequest, TokenIds, TokenScores
from nemo_trd.generation.protocol import GenerationFailed

GENERATE = "/inference/v1/generate"
ARRAYS = "application/vnd.nemo-trd.scores"  # as nemo_trd_scores.py has it
INITIAL_WEIGHTS = "default"  # how vLLM calls the weights that a server has loaded at its start
CHECK_SECONDS = 10.0  # a server that works answers a question about its state within this time
CONNECT_SECONDS = 10.0
RETRIED_STATUS = (408, 425, 429)  # besides 500 and above


class AttemptFailed(Exception):
    """One attempt at one server brought nothing. Another one may."""

    def __init__(self, url: str, cause: str) -> None:
        super().__init__(f"{url}: {cause}")
        self.url, self.cause = url, cause


class StaleWeights(AttemptFailed):
    """The response comes from other weights than the current ones."""


class Refused(GenerationFailed):
    """The server works and refuses the request: it would do so again."""


class Connection:
    """HTTP to the servers of one pool, within one event loop."""

    def __init__(self, api_key: SecretStr | None, max_connections: int, secure: bool) -> None:
        self._api_key = api_key
        headers = {"Authorization": f"Bearer {api_key.get_secret_value()}"} if api_key else {}
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=max_connections),
            trust_env=False,  # no proxy: servers are inside the cluster
            verify=secure,  # reading the certificates of this machine takes a while
        )

    async def call(
        self, method: str, url: str, path: str, body: Any = None, timeout: float = CHECK_SECONDS
    ) -> Any:
        """The JSON that the server answers within `timeout` seconds.

        Log-probabilities that came as arrays are in its field "scores", a `TokenScores`.

        Raises:
            AttemptFailed: no answer in time, a status of 500 and above, or no JSON.
            Refused: another status than 200.
        """
        arrays = body is not None and "scores" in body
        headers = {"Accept": f"{ARRAYS}, application/json"} if arrays else None
        try:
            async with asyncio.timeout(timeout):
                response = await self._client.request(
                    method, url + path, json=body, headers=headers
                )
        except TimeoutError:
            raise AttemptFailed(url, f"no answer within {timeout:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            what = f"{type(error).__name__}: {error}".rstrip(": ")
            raise AttemptFailed(url, self._without_key(what)) from None
        status = response.status_code
        if status == 200 and response.headers.get("Content-Type") == ARRAYS:
            return _unpacked(response.content, url)
        text = self._without_key(response.text[:300].strip())
        if status >= 500 or status in RETRIED_STATUS:
            raise AttemptFailed(url, f"status {status}: {text}")
        if status != 200:
            raise Refused(f"{url}{path} refuses with status {status}: {text}")
        try:
            return response.json()
        except ValueError:
            raise AttemptFailed(url, f"the answer is no JSON: {text[:80]!r}") from None

    def _without_key(self, text: str) -> str:
        return text.replace(self._api_key.get_secret_value(), "***") if self._api_key else text

    async def close(self) -> None:
        await self._client.aclose()


Place = Mapping[int, float]  # log-probabilities at the place of a label, by token id


class _Span(BaseModel):
    version: str
    start: int = 0  # its first token


class _TopLogprob(BaseModel):
    token_id: int
    logprob: float


class _Logprob(BaseModel):
    logprob: float
    top_logprobs: list[_TopLogprob] = []


class _Logprobs(BaseModel):
    content: list[_Logprob]


class _Choice(BaseModel):
    token_ids: list[Annotated[int, Field(ge=0, strict=True)]]
    finish_reason: Literal["stop", "length", "abort"]
    weight_versions: list[_Span] | None = None
    logprobs: _Logprobs | None = None


class _PromptLogprob(BaseModel):
    logprob: float


class _Drafts(BaseModel):
    num_draft_tokens: int
    num_accepted_draft_tokens: int


class _Metrics(BaseModel):
    speculative_decoding: _Drafts | None = None


class _Response(BaseModel):
    choices: Annotated[list[_Choice], Field(min_length=1, max_length=1)]
    prompt_logprobs: list[dict[int, _PromptLogprob] | None] | None = None
    scores: InstanceOf[TokenScores] | None = None
    metrics: _Metrics | None = None


@dataclass(frozen=True)
class SampledTokens:
    """A completion as a server gives it: whole, with the tokens that ended it."""

    token_ids: TokenIds
    finish_reason: Literal["stop", "length"]
    logprobs: tuple[float, ...] | None
    scores: TokenScores | None
    drafts: tuple[int, int] | None  # tokens drafted, and those of them that were accepted
    versions: tuple[tuple[str, int], ...]  # of the weights, each with its first token


@dataclass(frozen=True)
class Wanted:
    """What is asked for of each label: its `top_k` most likely ids, and their log-probabilities.

    Ids from `vocab_size` on are left out, and the others are given as much more of the probability;
    `spare` more ids are asked for, so that `top_k` remain.
    """

    top_k: int
    vocab_size: int | None = None
    spare: int = 0

    def body(self, start: int = 0) -> dict[str, Any]:
        """The request's field "scores". Labels of a prompt begin at `start`."""
        return {"start": start, "top_k": self.top_k, "vocab_size": self.vocab_size}


def generation_body(
    request: GenerationRequest,
    sampling: Sampling,
    eos_token_ids: frozenset[int],
    logprobs: int | None,
) -> dict[str, Any]:
    """The request; everything that changes a sample is said, so that no default joins in.

    Args:
        logprobs: ask for the log-probability of each token, and of so many most likely ones.
    """
    params: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,  # 0 is off, as in our settings
        "max_tokens": sampling.max_tokens,
        "stop_token_ids": sorted(eos_token_ids),
        "ignore_eos": True,  # the server's own idea of EOS; the line above is ours
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "detokenize": bool(sampling.stop),
    }
    if sampling.stop:
        params |= {"stop": sampling.stop, "skip_special_tokens": False}
        params |= {"spaces_between_special_tokens": True}  # as `decode` of transformers does
    if sampling.temperature > 0:
        params["seed"] = request.seed
    if logprobs is not None:
        params["logprobs"] = logprobs
    return {"token_ids": list(request.prompt_token_ids), "sampling_params": params}


def scoring_body(token_ids: TokenIds, label_start: int, wanted: Wanted) -> dict[str, Any]:
    """Asks for log-probabilities of the prompt; one token must be generated with it."""
    params = {
        "temperature": 0,
        "max_tokens": 1,
        "prompt_logprobs": wanted.top_k + wanted.spare,
        "ignore_eos": True,
        "detokenize": False,
    }
    return {
        "token_ids": list(token_ids),
        "sampling_params": params,
        "scores": wanted.body(label_start),
    }


def read_completion(
    content: Any,
    url: str,
    sampling: Sampling,
    eos_token_ids: frozenset[int],
    logprobs: bool,
    wanted: Wanted | None = None,
) -> SampledTokens:
    """Check a server's response to `generation_body`, with the scores that are `wanted`.

    A completion that a text of `sampling.stop` has ended still has all its tokens, and no EOS.

    Raises:
        AttemptFailed: it is not a whole completion: another shape, one that breaks off, aborted.
    """
    response = _validated(content, url)
    choice = response.choices[0]
    ids = choice.token_ids
    if choice.finish_reason == "abort":
        raise AttemptFailed(url, f"it aborted the request after {len(ids)} tokens")
    ended = bool(ids) and ids[-1] in eos_token_ids
    if len(ids) > sampling.max_tokens or (
        not (ended or sampling.stop)
        if choice.finish_reason == "stop"
        else len(ids) < sampling.max_tokens
    ):
        raise AttemptFailed(
            url,
            f"it ended with {choice.finish_reason!r} after {len(ids)} of at most "
            f"{sampling.max_tokens} tokens, {'an' if ended else 'no'} EOS token last",
        )
    sampled = None
    if logprobs:
        sampled = tuple(entry.logprob for entry in _logprobs_of(choice, url))
    scores = _scores_of_completion(response, wanted, url) if wanted else None
    told = response.metrics and response.metrics.speculative_decoding
    drafts = (told.num_draft_tokens, told.num_accepted_draft_tokens) if told else None
    versions = _versions(choice, url)
    return SampledTokens(tuple(ids), choice.finish_reason, sampled, scores, drafts, versions)


def _logprobs_of(choice: _Choice, url: str) -> list[_Logprob]:
    """Raises AttemptFailed: not every token has its log-probability."""
    if choice.logprobs is None or len(choice.logprobs.content) != len(choice.token_ids):
        raise AttemptFailed(url, "the answer lacks the log-probabilities of its tokens")
    return choice.logprobs.content


def _scores_of_completion(response: _Response, wanted: Wanted, url: str) -> TokenScores:
    """Scores of the tokens that were sampled.

    Raises:
        AttemptFailed: a token or one of its `top_k` is missing.
    """
    choice, scores = response.choices[0], response.scores
    if scores is None:
        places: list[Place] = [
            {top.token_id: top.logprob for top in entry.top_logprobs} | {token: entry.logprob}
            for token, entry in zip(choice.token_ids, _logprobs_of(choice, url), strict=True)
        ]
        scores = _scores_of_json(places, choice.token_ids, wanted, url)
    _check_scores(scores, len(choice.token_ids), wanted, url)
    return scores


def read_scores(
    content: Any, url: str, token_ids: TokenIds, label_start: int, wanted: Wanted
) -> tuple[TokenScores, tuple[str, ...]]:
    """Check a server's response to `scoring_body`: (TokenScores, weight versions).

    Raises:
        AttemptFailed: a label or one of its `top_k` tokens is missing.
    """
    response = _validated(content, url)
    labels, scores = token_ids[label_start:], response.scores
    if scores is None:
        of_prompt = response.prompt_logprobs
        if of_prompt is None or len(of_prompt) != len(token_ids):
            raise AttemptFailed(url, "the answer lacks the log-probabilities of the prompt")
        places: list[Place] = [
            {i: entry.logprob for i, entry in (place or {}).items()}
            for place in of_prompt[label_start:]
        ]
        scores = _scores_of_json(places, labels, wanted, url)
    _check_scores(scores, len(labels), wanted, url)
    return scores, tuple(label for label, _ in _versions(response.choices[0], url))


def _scores_of_json(
    places: Sequence[Place], labels: Sequence[int], wanted: Wanted, url: str
) -> TokenScores:
    """Scores of labels of which each has its place: log-probabilities by token id.

    Raises:
        AttemptFailed: a label or one of its `top_k` tokens is missing.
    """
    top_ids, top_logprobs, label_logprobs = [], [], []
    for label, place in zip(labels, places, strict=True):
        real = {i: logprob for i, logprob in place.items() if _is_real(i, wanted.vocab_size)}
        if label not in real or len(real) < wanted.top_k:
            raise AttemptFailed(url, f"the answer lacks log-probabilities around token {label}")
        # Exact for the ids that are in the response; those further down weigh next to nothing.
        left_out = sum(math.exp(logprob) for i, logprob in place.items() if i not in real)
        rest = math.log1p(-left_out) if left_out < 1 else math.nan
        best = sorted(real.items(), key=lambda item: (-item[1], item[0]))[: wanted.top_k]
        top_ids.append([token for token, _ in best])
        top_logprobs.append([logprob - rest for _, logprob in best])
        label_logprobs.append(real[label] - rest)
    shape = (len(label_logprobs), wanted.top_k)
    return TokenScores(
        np.array(top_ids, np.int64).reshape(shape),
        np.array(top_logprobs, np.float32).reshape(shape),
        np.array(label_logprobs, np.float32),
    )


def _unpacked(content: bytes, url: str) -> dict[str, Any]:
    """The JSON of a response with arrays, with its scores in the field "scores".

    Raises:
        AttemptFailed: it is malformed.
    """
    try:
        tensors = load(content)
        size = int.from_bytes(content[:8], "little")
        answer = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["answer"])
        answer["choices"][0]["token_ids"] = tensors["token_ids"].tolist()
        top_ids = tensors["top_ids"].astype(np.int64)
        scores = TokenScores(top_ids, tensors["top_logprobs"], tensors["label_logprobs"])
    except (SafetensorError, ValueError, LookupError, TypeError) as error:
        raise AttemptFailed(url, f"its arrays are malformed: {error!r}") from None
    return {**answer, "scores": scores}


def _check_scores(scores: TokenScores, labels: int, wanted: Wanted, url: str) -> None:
    """Raises AttemptFailed: there are not `top_k` of each label, or one is not finite."""
    shape = scores.top_ids.shape, scores.top_logprobs.shape, scores.label_logprobs.shape
    if shape != ((labels, wanted.top_k), (labels, wanted.top_k), (labels,)):
        raise AttemptFailed(url, f"its arrays are of other shapes than asked for: {shape}")
    if not (np.isfinite(scores.top_logprobs).all() and np.isfinite(scores.label_logprobs).all()):
        raise AttemptFailed(url, "the answer has log-probabilities that are not finite")


def _is_real(token_id: int, vocab_size: int | None) -> bool:
    return vocab_size is None or token_id < vocab_size


def version_number(label: str, initial: int | None) -> int | None:
    """The number in a label that we gave to weights; None for a foreign label.

    `initial` is that of the weights that a server has loaded at its start.
    """
    if label == INITIAL_WEIGHTS:
        return initial
    return int(label) if label.isdecimal() else None


def field_of(content: Any, name: str, url: str) -> Any:
    """One field of a JSON object.

    Raises:
        AttemptFailed: there is no such field.
    """
    if not isinstance(content, Mapping) or name not in content:
        raise AttemptFailed(url, f"the answer lacks {name!r}: {str(content)[:80]!r}")
    return content[name]


def _validated(content: Any, url: str) -> _Response:
    try:
        return _Response.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise AttemptFailed(url, f"the answer is malformed: {place}: {first['msg']}") from None


def _versions(choice: _Choice, url: str) -> tuple[tuple[str, int], ...]:
    """Labels of weights with the first token of each, in their order."""
    if not choice.weight_versions:
        raise AttemptFailed(url, "the answer does not say which weights it comes from")
    return tuple((span.version, span.start) for span in choice.weight_versions)
