"""Middleware of our vLLM servers: log-probabilities in binary, where a request asks for them so.

vLLM's own answer to /inference/v1/generate names each log-probability in JSON, those of the
context too: kilobytes a label. A request that accepts `MEDIA_TYPE` gets the `top_k` most likely
ids of its labels alone, as safetensors. All other requests go on to vLLM. Written for vLLM 0.32;
imports nothing but safetensors and what vLLM brings.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from pydantic import BaseModel, Field
from safetensors.numpy import save
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.utils.api_utils import with_cancellation
from vllm.exceptions import GenerationError
from vllm.inputs import TokensPrompt
from vllm.logprobs import FlatLogprobs
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind

MEDIA_TYPE = "application/vnd.nemo-trd.scores"
PATH = "/inference/v1/generate"
LEAST = -9999.0  # what vLLM's JSON says of a probability of 0

Message = dict[str, Any]


class Wanted(BaseModel):
    """What the client wants to know of each label."""

    start: int = Field(ge=0)  # first label, where the labels are of the prompt
    top_k: int = Field(ge=1)  # ids
    vocab_size: int | None  # ids from there on are left out; None: none are


class ScoresRequest(GenerateRequest):
    """A request of vLLM's, with what is wanted of its log-probabilities.

    The labels are those of the prompt with `prompt_logprobs`, else the tokens that are sampled.
    """

    scores: Wanted


class AnswerInArrays:
    """ASGI middleware; see the docstring of the module."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        if not _asks_for_arrays(scope):
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        response = await _answer(await request.body(), request)
        if response is not None:  # else the client has hung up
            await response(scope, receive, send)


def _asks_for_arrays(scope: Message) -> bool:
    if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] != PATH:
        return False
    accepted = [value for name, value in scope["headers"] if name == b"accept"]
    return any(MEDIA_TYPE.encode() in value for value in accepted)


@with_cancellation
async def _answer(body: bytes, request: Request) -> Response:
    try:
        asked = ScoresRequest.model_validate(json.loads(body))
        params = asked.sampling_params
        params.flat_logprobs = True
        params.output_kind = RequestOutputKind.FINAL_ONLY
        prompt = TokensPrompt(prompt_token_ids=asked.token_ids)
        state, final = request.app.state, None
        adapter = state.serving_tokens._maybe_get_adapters(asked)  # that it names as its model
        outputs = state.engine_client.generate(
            prompt, params, f"scores-{asked.request_id}", lora_request=adapter
        )
        async for output in outputs:
            final = output
        assert final is not None
        completion = final.outputs[0]
        if completion.finish_reason == "error":
            raise GenerationError("Internal server error")
        of_prompt = params.prompt_logprobs is not None
        rows = final.prompt_logprobs[asked.scores.start :] if of_prompt else completion.logprobs
        content = await asyncio.to_thread(_packed, completion, rows, asked.scores)
    except Exception as error:
        refusal = create_error_response(error)
        return JSONResponse(refusal.model_dump(), status_code=refusal.error.code)
    return Response(content, media_type=MEDIA_TYPE)


def _packed(completion: CompletionOutput, rows: FlatLogprobs, wanted: Wanted) -> bytes:
    ids, logprobs, labels = most_likely(
        *_table(rows), top_k=wanted.top_k, vocab_size=wanted.vocab_size
    )
    versions, drafts = completion.weight_versions or (), completion.spec_decode_metrics
    answer = {
        "choices": [
            {
                "finish_reason": completion.finish_reason or "stop",
                "weight_versions": [
                    {"version": span.version, "start": span.start} for span in versions
                ],
            }
        ],
        "metrics": {"speculative_decoding": drafts and drafts.to_dict()},
    }
    tensors = {
        "token_ids": np.array(completion.token_ids, np.int32),
        "top_ids": ids.astype(np.int32),
        "top_logprobs": logprobs.astype(np.float32),
        "label_logprobs": labels.astype(np.float32),
    }
    return save(tensors, {"answer": json.dumps(answer)})


def _table(rows: FlatLogprobs) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities [n, m + 1]: of the label, then of the m most likely ids."""
    if not len(rows):
        return np.empty((0, 1), np.int64), np.empty((0, 1))
    width = rows.end_indices[0] - rows.start_indices[0]
    ids = np.array(rows.token_ids, np.int64).reshape(-1, width)
    return ids, np.array(rows.logprobs, np.float64).reshape(-1, width)


def most_likely(
    ids: np.ndarray, logprobs: np.ndarray, *, top_k: int, vocab_size: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k most likely of the ids in each row, equal ones by id, and the label, in column 0.

    Without the ids from `vocab_size` on: the log-probabilities are those of the others, given that
    it is none of these. What a row lacks is -inf or nan.

    Returns: ids [n, k], their log-probabilities [n, k], those of the labels [n].
    """
    logprobs = np.where(np.isneginf(logprobs), LEAST, logprobs)
    again = np.zeros(ids.shape, bool)  # the label among the most likely ids
    again[:, 1:] = ids[:, 1:] == ids[:, :1]
    foreign = ids >= (np.iinfo(np.int64).max if vocab_size is None else vocab_size)
    left_out = np.where(foreign & ~again, np.exp(logprobs), 0).sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        known = np.where(foreign | again, -np.inf, logprobs) - np.log1p(-left_out)
    order = np.lexsort((ids, -known))[:, :top_k]
    labels = np.where(foreign[:, 0], np.nan, known[:, 0])
    return np.take_along_axis(ids, order, -1), np.take_along_axis(known, order, -1), labels
