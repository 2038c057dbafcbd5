"""New weights from a student on one CUDA device to a vLLM server on another, over NCCL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from devices import EMULATED, device_count, on_devices, skip_without_vllm
from pydantic import SecretStr
from servers import SERVER, SHAPE
from tiny_models import make_model

pytestmark = pytest.mark.gpu(emulated=True)

KEY = SecretStr("key-of-the-test")
PROMPT = [(7 * i) % 250 + 5 for i in range(60)]
# Of log-probabilities in fp32. vLLM and transformers add up in other orders on a GPU.
TOLERANCE = 1e-2
LIMITS = {"pause_timeout_seconds": 30.0, "call_timeout_seconds": 60.0, "timeout_seconds": 120.0}


def sync_to_server(directory: str, backend: str, devices: list[int], results: str) -> None:
    """On one rank: the server starts with the teacher's weights, and is sent the student's."""
    from nemo_trd.config.load import compose
    from nemo_trd.config.schema import WeightSync as Settings
    from nemo_trd.distributed.process import init_distributed
    from nemo_trd.generation.weight_sync import WeightSync
    from nemo_trd.megatron.student import Student
    from nemo_trd.serve.server import Server

    watch = init_distributed(timeout_minutes=10)
    paths = [f"model.{role}.path={directory}/{role}" for role in ("student", "teacher")]
    student = Student(compose(["model=local", "precision.dtype=fp32", *paths]))
    common = {"backend": backend, "in_flight": "finish", "bucket_bytes": 50_000, **LIMITS}
    settings = Settings.model_validate({**common, "directory": f"{directory}/sync"})
    log = Path(directory, "server.log")
    options: dict[str, Any] = {"api_key": KEY, "weight_backend": backend, "devices": devices}
    with Server(f"{directory}/teacher", SERVER, log, **options) as server:
        before = log_probs(server.url)
        sync = WeightSync([server.url], settings, KEY)
        for version in (1, 2):
            sync.load_weights(student.export_hf_weights(), version)
            assert sync.is_current(server.url), sync.failures
        after = log_probs(server.url)
        sync.close()
    Path(results).write_text(json.dumps([before, after]))
    watch.close()


def log_probs(url: str) -> list[float]:
    """Of the prompt's tokens but the first."""
    body = {"model": "nemo_trd", "prompt": PROMPT, "max_tokens": 1, "prompt_logprobs": 0}
    headers = {"Authorization": f"Bearer {KEY.get_secret_value()}"}
    answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    scores = answer.json()["choices"][0]["prompt_logprobs"][1:]
    return [score[str(token)]["logprob"] for score, token in zip(scores, PROMPT[1:], strict=True)]


def test_a_server_answers_with_weights_that_came_over_nccl(tmp_path: Path) -> None:
    import torch
    from model_checks import reference_logits

    skip_without_vllm()
    if device_count() < 2:
        pytest.skip("NCCL wants a device for each side: needs two CUDA devices")
    for seed, role in enumerate(("student", "teacher")):
        make_model(tmp_path / role, "qwen3", seed=seed, **SHAPE)
    backend, devices = ("gloo", []) if EMULATED else ("nccl", [1])
    results = tmp_path / "results.json"
    on_devices(1, sync_to_server, str(tmp_path), backend, devices, str(results), timeout=500)
    before, after = json.loads(results.read_text())
    logits = reference_logits(tmp_path / "student", torch.tensor([PROMPT]))[0, :-1]
    expected = logits.log_softmax(-1)[range(len(PROMPT) - 1), PROMPT[1:]].tolist()
    assert after == pytest.approx(expected, abs=TOLERANCE)
    assert before != pytest.approx(expected, abs=TOLERANCE)
