"""Where vLLM runs: the interpreter that has it, and the environment of a server's processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence

from pydantic import SecretStr

from nemo_trd.config.errors import rule_broken
from nemo_trd.config.load import conf_dir
from nemo_trd.config.schema import Speculation
from nemo_trd.config.server_rules import visible_devices
from nemo_trd.serve.worker import worker_environment

PYTHON_VARIABLE = "NEMO_TRD_VLLM_PYTHON"
CPU_ENVIRONMENT = {  # unless the caller's environment says otherwise
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    # Drafts are looked up with numba, which gives OpenMP as many threads as itself: where cores are
    # few, every layer then waits for a thread that does not run.
    "NUMBA_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",
}
GPU_ENVIRONMENT = {  # unless the caller's environment says otherwise
    # Its second model runner ends the server at a request that allows more than 1024 ids by name.
    # Where there are drafts, that is how ids without a token are forbidden (Vocabulary.constraint).
    "VLLM_USE_V2_MODEL_RUNNER": "0",
}
# Of the trainer's rank, its rendezvous, its Python, its use of CUDA: they would mislead a server.
NOT_INHERITED = (
    *("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "RANK", "LOCAL_RANK", "WORLD_SIZE"),
    *("LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
)
_PROBE = """
import importlib.metadata, json
versions = {d.name.lower(): d.version for d in importlib.metadata.distributions() if d.name}
print(json.dumps([versions.get("vllm") or versions.get("vllm-cpu"), "vllm-cpu" in versions]))
"""


def server_environment(
    is_cpu: bool, api_key: SecretStr | None, devices: Sequence[int]
) -> dict[str, str]:
    """The variables of this process, without those that would mislead a server, with its key.

    Raises:
        ConfigError: `devices` that this process does not see.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in NOT_INHERITED and not name.startswith("TORCHELASTIC_")
    }
    environment.pop("VLLM_API_KEY", None)
    if api_key is not None:
        environment["VLLM_API_KEY"] = api_key.get_secret_value()
    if devices and not is_cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible_devices(devices, "devices"))
    if is_cpu:
        environment = {**CPU_ENVIRONMENT, **environment, "CUDA_VISIBLE_DEVICES": ""}
    else:
        environment = {**GPU_ENVIRONMENT, **environment}
    # Nothing is looked up or reported on the network.
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    environment |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    return worker_environment(environment)


def check_draft_package(speculation: Speculation, python: str, field: str) -> None:
    """Raises ConfigError: the interpreter `python` lacks what makes the drafts."""
    if speculation.method != "suffix":
        return
    probe = "import importlib.metadata; importlib.metadata.version('arctic-inference')"
    if subprocess.run([python, "-I", "-c", probe], capture_output=True, timeout=60).returncode:
        raise rule_broken(
            f"{field}.method",
            speculation.method,
            f"{python} lacks the package arctic-inference, which makes these drafts",
            "install it there, or set method to ngram",
        )


def find_vllm(
    configured: str | None, field: str = "generation.vllm.server.python"
) -> tuple[str, bool]:
    """The interpreter to run vLLM with, and whether its vLLM is a build for CPUs.

    `configured`, by the setting `field`, else $NEMO_TRD_VLLM_PYTHON, else .venv-vllm of the
    checkout, else this one.

    Raises:
        ConfigError: there is no such interpreter, or no vLLM in it.
    """
    checkout = conf_dir().parent / ".venv-vllm" / "bin" / "python"
    python = configured or os.environ.get(PYTHON_VARIABLE)
    if python is None:
        python = str(checkout) if checkout.exists() else sys.executable
    fix = f"`make vllm-env`, or name an interpreter that has vLLM here or in {PYTHON_VARIABLE}"
    try:
        probe = subprocess.run([python, "-I", "-c", _PROBE], capture_output=True, timeout=60)
        version, is_cpu = json.loads(probe.stdout)
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        raise rule_broken(field, python, f"it does not run: {error}", fix) from error
    if version is None:
        raise rule_broken(field, python, "it has no vLLM", fix)
    return python, is_cpu or "cpu" in version
