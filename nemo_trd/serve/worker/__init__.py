"""Code that runs inside vLLM's own processes, and the arguments that make a server load it.

Only this directory goes on the PYTHONPATH of a server: its environment has none of our other
dependencies, and nemo_trd/generation holds a module named `vllm`, which would hide the real one.
"""

from __future__ import annotations

import json
from pathlib import Path

WORKER_DIRECTORY = Path(__file__).parent


def worker_arguments() -> list[str]:
    """Arguments of a server that takes weights, whichever way they come."""
    return [
        "--worker-extension-cls",
        "nemo_trd_worker.WorkerExtension",
        "--weight-transfer-config",
        json.dumps({"backend": "nemo_trd"}),
    ]


def worker_environment(environment: dict[str, str]) -> dict[str, str]:
    """The environment of such a server: our directory first on its path, the RL endpoints on."""
    path = [str(WORKER_DIRECTORY), environment.get("PYTHONPATH", "")]
    return environment | {
        "PYTHONPATH": ":".join(filter(None, path)),
        "VLLM_SERVER_DEV_MODE": "1",
    }
