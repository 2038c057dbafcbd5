"""What tests of weight sync to real vLLM servers share: settings, questions, and what is wrong."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from pydantic import SecretStr
from servers import SERVER as OF_RUNS

from nemo_trd.config.schema import WeightSync as Settings
from nemo_trd.serve.server import SERVED_NAME

KEY = SecretStr("weight-sync-test-key")
HEADERS = {"Authorization": f"Bearer {KEY.get_secret_value()}"}
TOLERANCE = 1e-4
PROMPT = [(7 * i) % 250 + 5 for i in range(300)]  # two blocks of the prefix cache, and more
SERVER = OF_RUNS.model_copy(
    update={"max_model_len": 2048, "max_num_seqs": 8, "stop_timeout_seconds": 5.0}
)


def settings(directory: Path, backend: str, in_flight: str = "finish") -> Settings:
    return Settings.model_validate(
        {
            "backend": backend,
            "in_flight": in_flight,
            "directory": str(directory / "sync"),
            "bucket_bytes": 50_000,
            "pause_timeout_seconds": 200.0,  # a long request may have to finish
            "call_timeout_seconds": 20.0,
            "timeout_seconds": 240.0,
        }
    )


def complete(url: str, prompt: Sequence[int], **asked: Any) -> dict[str, Any]:
    body = {"model": SERVED_NAME, "prompt": list(prompt), "temperature": 0, "max_tokens": 1}
    body |= {"return_token_ids": True, "return_tokens_as_token_ids": True} | asked
    answer = httpx.post(f"{url}/v1/completions", json=body, headers=HEADERS, timeout=300)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def prompt_error(url: str, expected: torch.Tensor, **asked: Any) -> float:
    """Largest difference of the log-probabilities of the prompt's tokens."""
    scored = complete(url, PROMPT, prompt_logprobs=0, **asked)["prompt_logprobs"][1:]
    actual = [scored[i][str(token)]["logprob"] for i, token in enumerate(PROMPT[1:])]
    wanted = expected[torch.arange(len(PROMPT) - 1), PROMPT[1:]]
    return (torch.tensor(actual) - wanted).abs().max().item()


def next_token_error(url: str, expected: torch.Tensor, **asked: Any) -> float:
    """Largest difference for the token after the prompt. Uses the prefix cache, unlike scoring."""
    top = complete(url, PROMPT, logprobs=20, **asked)["logprobs"]["top_logprobs"][0]
    ids = [int(name.removeprefix("token_id:")) for name in top]
    actual = torch.tensor(list(top.values()))
    return (actual - expected[-1, ids]).abs().max().item()


def errors(url: str, expected: torch.Tensor, **asked: Any) -> float:
    # Scoring computes the prompt anew and leaves that in the cache: it comes last.
    from_cache = next_token_error(url, expected, **asked)
    return max(from_cache, prompt_error(url, expected, **asked))


def state(url: str) -> tuple[str, bool]:
    """(version, whether it is paused)"""
    with httpx.Client(base_url=url, headers=HEADERS, timeout=60) as client:
        version = client.get("/weight_info").json()["weight_version"]
        return version, client.get("/is_paused").json()["is_paused"]


def sampled_tokens(url: str) -> int:
    """How many tokens the server has sampled since it started, by its own count."""
    lines = httpx.get(f"{url}/metrics", headers=HEADERS, timeout=60).text.splitlines()
    counts = [line for line in lines if line.startswith("vllm:generation_tokens_total")]
    return int(sum(float(line.split()[-1]) for line in counts))


def wait_until_sampled(url: str, count: int) -> None:
    """Return when the server has sampled `count` tokens since it started."""
    deadline = time.monotonic() + 120
    while sampled_tokens(url) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
