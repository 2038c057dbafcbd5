"""Code that runs inside vLLM's own processes, and the arguments that make a server load it.

Only this directory goes on the PYTHONPATH of a server: its environment has none of our other
dependencies, and nemo_trd/generation holds a module named `vllm`, which would hide the real one.
"""

from __future__ import annotations

import json
from pathlib import Path

WORKER_DIRECTORY = Path(__file__).parent


def worker_arguments(backend: str) -> list[str]:
    """Arguments of a server whose weights come through `backend`.

    That is nccl, gloo or file. The last two are one to the server.
    """
    transfer = "nccl" if backend == "nccl" else "host"
    return [
        "--worker-extension-cls",
        "nemo_trd_worker.WorkerExtension",
        "--weight-transfer-config",
        json.dumps({"backend": transfer}),
    ]


def worker_environment(environment: dict[str, str]) -> dict[str, str]:
    """The environment of such a server: our directory first on its path, the RL endpoints on."""
    path = [str(WORKER_DIRECTORY), environment.get("PYTHONPATH", "")]
    return environment | {
        "PYTHONPATH": ":".join(filter(None, path)),
        "VLLM_SERVER_DEV_MODE": "1",
    }
