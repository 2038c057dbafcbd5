"""Requests to a vLLM server, and the form that its responses must have.

Tokens go in and out as ids through /inference/v1/generate (vLLM 0.32, --enable-scale-out), whose
responses say which weights sampled which tokens; vLLM's OpenAI endpoints do not.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, Literal

import httpx
import numpy as np
from pydantic import BaseModel, Field, SecretStr, ValidationError

from nemo_trd.config.schema import Sampling
from nemo_trd.data.types import GenerationRequest, TokenIds
from nemo_trd.generation.protocol import GenerationFailed

GENERATE = "/inference/v1/generate"
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

        Raises:
            AttemptFailed: no answer in time, a status of 500 and above, or no JSON.
            Refused: another status than 200.
        """
        try:
            async with asyncio.timeout(timeout):
                response = await self._client.request(method, url + path, json=body)
        except TimeoutError:
            raise AttemptFailed(url, f"no answer within {timeout:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            what = f"{type(error).__name__}: {error}".rstrip(": ")
            raise AttemptFailed(url, self._without_key(what)) from None
        status = response.status_code
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


class _Span(BaseModel):
    version: str


class _Logprob(BaseModel):
    logprob: float


class _Logprobs(BaseModel):
    content: list[_Logprob]


class _Choice(BaseModel):
    token_ids: list[Annotated[int, Field(ge=0, strict=True)]]
    finish_reason: Literal["stop", "length", "abort"]
    weight_versions: list[_Span] | None = None
    logprobs: _Logprobs | None = None


class _PromptLogprob(BaseModel):
    logprob: float


class _Response(BaseModel):
    choices: Annotated[list[_Choice], Field(min_length=1, max_length=1)]
    prompt_logprobs: list[dict[int, _PromptLogprob] | None] | None = None


@dataclass(frozen=True)
class SampledTokens:
    """A completion as a server gives it: whole, with the tokens that ended it."""

    token_ids: TokenIds
    finish_reason: Literal["stop", "length"]
    logprobs: tuple[float, ...] | None
    weight_versions: tuple[str, ...]  # distinct ones, in the order of the tokens


@dataclass(frozen=True)
class TokenScores:
    """Natural log-probabilities that a model gives the n label tokens of one sequence.

    They are those of its distribution at temperature 1, over its whole vocabulary.
    """

    top_ids: np.ndarray  # int64 [n, k], the k most probable tokens at the place of each label
    top_logprobs: np.ndarray  # float32 [n, k], descending
    label_logprobs: np.ndarray  # float32 [n], of the label itself


def generation_body(
    request: GenerationRequest, sampling: Sampling, eos_token_ids: frozenset[int], logprobs: bool
) -> dict[str, Any]:
    """The request; everything that changes a sample is said, so that no default joins in."""
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
    if logprobs:
        params["logprobs"] = 0  # of the sampled token only
    return {"token_ids": list(request.prompt_token_ids), "sampling_params": params}


def scoring_body(token_ids: TokenIds, top_k: int) -> dict[str, Any]:
    """Asks for log-probabilities of the prompt; one token must be generated with it."""
    params = {
        "temperature": 0,
        "max_tokens": 1,
        "prompt_logprobs": top_k,
        "ignore_eos": True,
        "detokenize": False,
    }
    return {"token_ids": list(token_ids), "sampling_params": params}


def read_completion(
    content: Any, url: str, sampling: Sampling, eos_token_ids: frozenset[int], logprobs: bool
) -> SampledTokens:
    """Check a server's response to `generation_body`.

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
        if choice.logprobs is None or len(choice.logprobs.content) != len(ids):
            raise AttemptFailed(url, "the answer lacks the log-probabilities of its tokens")
        sampled = tuple(entry.logprob for entry in choice.logprobs.content)
    return SampledTokens(tuple(ids), choice.finish_reason, sampled, _versions(choice, url))


def read_scores(
    content: Any,
    url: str,
    token_ids: TokenIds,
    label_start: int,
    top_k: int,
    vocab_size: int | None = None,
) -> tuple[TokenScores, tuple[str, ...]]:
    """Check a server's response to `scoring_body`: (TokenScores, weight versions).

    Without the ids from `vocab_size` on: the log-probabilities are those of the others, given
    that it is none of these.

    Raises:
        AttemptFailed: a label or one of its `top_k` tokens is missing.
    """
    response = _validated(content, url)
    places = response.prompt_logprobs
    if places is None or len(places) != len(token_ids):
        raise AttemptFailed(url, "the answer lacks the log-probabilities of the prompt")
    top_ids, top_logprobs, label_logprobs = [], [], []
    for label, place in zip(token_ids[label_start:], places[label_start:], strict=True):
        real = {i: entry.logprob for i, entry in (place or {}).items() if _is_real(i, vocab_size)}
        if place is None or label not in real or len(real) < top_k:
            raise AttemptFailed(url, f"the answer lacks log-probabilities around token {label}")
        # Exact for the ids that are in the response; those further down weigh next to nothing.
        left_out = sum(math.exp(e.logprob) for i, e in place.items() if i not in real)
        rest = math.log1p(-left_out) if left_out < 1 else math.nan
        best = sorted(real.items(), key=lambda item: (-item[1], item[0]))[:top_k]
        top_ids.append([token for token, _ in best])
        top_logprobs.append([logprob - rest for _, logprob in best])
        label_logprobs.append(real[label] - rest)
    if not np.isfinite([*chain(*top_logprobs), *label_logprobs]).all():
        raise AttemptFailed(url, "the answer has log-probabilities that are not finite")
    shape = (len(label_logprobs), top_k)
    scores = TokenScores(
        np.array(top_ids, np.int64).reshape(shape),
        np.array(top_logprobs, np.float32).reshape(shape),
        np.array(label_logprobs, np.float32),
    )
    return scores, _versions(response.choices[0], url)


def _is_real(token_id: int, vocab_size: int | None) -> bool:
    return vocab_size is None or token_id < vocab_size


def version_number(label: str) -> int | None:
    """The number in a label that we gave to weights; None for a foreign label."""
    if label == INITIAL_WEIGHTS:
        return 0
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


def _versions(choice: _Choice, url: str) -> tuple[str, ...]:
    if not choice.weight_versions:
        raise AttemptFailed(url, "the answer does not say which weights it comes from")
    return tuple(dict.fromkeys(span.version for span in choice.weight_versions))
