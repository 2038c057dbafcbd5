"""Code that runs inside vLLM's own processes, and the arguments that make a server load it.

Only this directory goes on the PYTHONPATH of a server: its environment has none of our other
dependencies, and nemo_trd/generation holds a module named `vllm`, which would hide the real one.
"""

from __future__ import annotations

import json
from pathlib import Path

from nemo_trd.config.schema import SERVED_RANKS, Speculation

WORKER_DIRECTORY = Path(__file__).parent
ADAPTER_NAME = "adapter"  # the model that a request names to be answered with the adapter
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def worker_arguments(adapter_rank: int | None) -> list[str]:
    """Arguments of a server that takes weights, whichever way they come.

    With an `adapter_rank` it keeps the model that it loads, and takes LoRA adapters of that rank;
    a request is answered with the adapter if it names `ADAPTER_NAME` as its model.
    """
    backend, module = "nemo_trd", "nemo_trd_worker"
    if adapter_rank is not None:
        backend = module = "nemo_trd_adapter"
    arguments = ["--worker-extension-cls", f"{module}.WorkerExtension"]
    arguments += ["--weight-transfer-config", json.dumps({"backend": backend})]
    if adapter_rank is not None:
        held = next(rank for rank in SERVED_RANKS if rank >= adapter_rank)
        arguments += ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(held)]
        arguments += ["--lora-target-modules", *LINEAR_LAYERS]
        arguments += ["--lora-modules", f"{ADAPTER_NAME}=trained"]  # see `_load_trained`
    return arguments


def draft_arguments(speculation: Speculation, is_cpu: bool) -> list[str]:
    """Arguments of a server that checks drafts, and tells with each answer how many it accepted."""
    drafts: dict[str, str | int] = {"method": speculation.method}
    drafts["num_speculative_tokens"] = speculation.tokens
    if speculation.method == "ngram":
        longest = speculation.lookup_max
        assert longest is not None  # else the settings were refused
        drafts |= {"prompt_lookup_max": longest}
        drafts |= {"prompt_lookup_min": speculation.lookup_min or longest}
    arguments = ["--speculative-config", json.dumps(drafts)]
    arguments += ["--per-request-spec-decode-metrics", "summary"]
    if is_cpu:
        arguments += ["--worker-extension-cls", "nemo_trd_drafts.WorkerExtension"]
    return arguments


def worker_environment(environment: dict[str, str]) -> dict[str, str]:
    """The environment of such a server: our directory first on its path, the RL endpoints on."""
    path = [str(WORKER_DIRECTORY), environment.get("PYTHONPATH", "")]
    return environment | {
        "PYTHONPATH": ":".join(filter(None, path)),
        "VLLM_SERVER_DEV_MODE": "1",
    }
