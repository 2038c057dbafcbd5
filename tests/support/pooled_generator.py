"""A generator over `fake_vllm.FakeVllm`, its requests, and the completions that they must get."""

from __future__ import annotations

from typing import Any

from fake_vllm import EOS, KEY, FakeVllm, tokens_for
from pydantic import SecretStr

from nemo_trd.config.schema import Sampling, VllmClient
from nemo_trd.data.types import Completion, GenerationRequest
from nemo_trd.generation.vllm import VllmGenerator
from nemo_trd.models.vocabulary import Vocabulary

SAMPLING = Sampling(temperature=0.7, top_p=0.9, top_k=5, max_tokens=8)
CLIENT = VllmClient(
    max_concurrency=4,
    request_timeout_seconds=10,
    max_attempts=4,
    backoff_seconds=0.01,
    max_backoff_seconds=0.05,
    recovery_timeout_seconds=20,
    stale_weights="retry",
)
WHOLE = Vocabulary(columns=10**6, never=(), ends={EOS: EOS})


def generator(*servers: FakeVllm | str, **options: Any) -> VllmGenerator:
    settings = CLIENT.model_copy(update=options.pop("client", {}))
    urls = [server if isinstance(server, str) else server.url for server in servers]
    options = {"api_key": SecretStr(KEY)} | options
    return VllmGenerator(urls, options.pop("vocabulary", WHOLE), settings, **options)


def requests(count: int) -> list[GenerationRequest]:
    return [GenerationRequest((5, 6, i), seed=100 + i, affinity=i // 4) for i in range(count)]


def expected(asked: list[GenerationRequest], version: int = 0) -> list[Completion]:
    return [
        Completion(
            tuple(tokens_for(list(r.prompt_token_ids), r.seed, SAMPLING.max_tokens)),
            "stop",
            version,
        )
        for r in asked
    ]
