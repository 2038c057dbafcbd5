"""Real vLLM servers of tests: their settings, and a student and a teacher for whole runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from tiny_models import make_model

from nemo_trd.config.schema import VllmServer
from nemo_trd.serve.server import Server, start_all, stop_all

# Each worker of a server on a CPU has 1 GiB without it; these models need at most 16 MB.
SMALL_CACHE = ["--kv-cache-memory-bytes", str(2**27)]
SERVER = VllmServer(
    python=None,
    dtype="fp32",
    tensor_parallel_size=1,
    max_model_len=512,
    max_num_seqs=16,
    arguments=SMALL_CACHE,
    start_timeout_seconds=600,
    stop_timeout_seconds=10,
)


KEY = "key-of-the-tests-on-servers"
ENVIRONMENT = {"NEMO_TRD_API_KEY": KEY}
# Ids of the byte tokenizer and no others: servers give such others a share, a run none.
VOCABULARY, HIDDEN = 261, 64
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tokenizer": True,
}


def make_inputs(root: Path, **shape: Any) -> Path:
    """A student, a teacher and eight problems in data.jsonl. `shape` as of `make_model`."""
    for seed, role in enumerate(("student", "teacher")):
        make_model(root / role, "qwen3", seed=seed, **SHAPE | shape)
    rows = [{"question": f"{n}+1?", "answer": f"so #### {n + 1}"} for n in range(8)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@contextmanager
def served(inputs: Path) -> Iterator[dict[str, str]]:
    """Serve the student, which takes new weights from files, and the teacher: their URLs.

    Their logs stand beside them, as ROLE.log.
    """
    servers = replicas(inputs)
    start_all(list(servers.values()))
    try:
        yield {role: server.url for role, server in servers.items()}
    finally:
        stop_all(list(servers.values()))


def replicas(inputs: Path, log_suffix: str = "") -> dict[str, Server]:
    """A server of the student and one of the teacher, by role. They are not started yet."""
    return {
        role: Server(
            str(inputs / role),
            SERVER,
            inputs / f"{role}{log_suffix}.log",
            api_key=SecretStr(KEY),
            weight_backend=backend,
        )
        for role, backend in (("student", "file"), ("teacher", None))
    }


def settings_on(inputs: Path, urls: dict[str, str], run_dir: Path) -> list[str]:
    """Settings of a run of these models on these servers; without any, on servers of its own."""
    return [
        *("model=local", "data=gsm8k", "data.max_prompt_tokens=64", "data.verifier=exact"),
        *(f"model.{role}.path={inputs / role}" for role in ("student", "teacher")),
        *(f"data.train.path={inputs / 'data.jsonl'}", f"run.dir={run_dir}"),
        *("refinement.templates.opd='{problem} {rollout}'", "refinement.max_context_tokens=200"),
        *("refinement.on_failure=rollout", "precision.dtype=fp32", "generation=vllm"),
        *("train.prompts_per_step=4", "logging.progress=false"),
        *(f"generation.{which}.max_tokens=12" for which in ("rollout", "refinement")),
        *("generation.vllm.weight_sync.backend=file", "generation.vllm.server.max_model_len=512"),
        "generation.vllm.client.recovery_timeout_seconds=60",
        f"generation.vllm.server.arguments={SMALL_CACHE}",
        *(f"generation.vllm.{role}.urls=['{url}']" for role, url in urls.items()),
        *(f"generation.vllm.{role}.replicas=0" for role in urls),
    ]
