"""Contents of one interpreter: torch, CUDA, GPUs, TransformerEngine, and failed imports.

Run as a file by `nemo_trd.doctor`, maybe with an interpreter that has vLLM and not this package.
The last line that it prints is JSON.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from glob import glob
from typing import Any


def probe(modules: list[str]) -> dict[str, Any]:
    """`modules` are imported too; "import_errors" has those that fail, and why."""
    versions = {d.name.lower(): d.version for d in importlib.metadata.distributions() if d.name}
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "versions": versions,
        "torch_cuda": None,
        "gpus": [],
        "gpu_files": len(glob("/dev/nvidia[0-9]*")),
        "nccl": None,  # its version, where torch has it
        "transformer_engine": importlib.util.find_spec("transformer_engine") is not None,
        "import_errors": {},
    }
    if "torch" in versions:
        # Counts GPUs without a CUDA context on each, which would take memory from a run.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        _try("torch", facts["import_errors"])
    if "torch" in sys.modules:
        facts.update(_torch(sys.modules["torch"]))
    if facts["gpus"] and facts["transformer_engine"]:
        _try("transformer_engine.pytorch", facts["import_errors"])
    for module in modules:
        _try(module, facts["import_errors"])
    return facts


def _torch(torch: Any) -> dict[str, Any]:
    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    properties = [torch.cuda.get_device_properties(index) for index in devices]
    return {
        "torch_cuda": torch.version.cuda,
        "nccl": _nccl_version(torch),
        "gpus": [
            {
                "name": device.name,
                "compute_capability": [device.major, device.minor],
                "memory_gib": round(device.total_memory / 2**30, 1),
            }
            for device in properties
        ],
    }


def _nccl_version(torch: Any) -> str | None:
    if not (torch.distributed.is_available() and torch.distributed.is_nccl_available()):
        return None
    return ".".join(map(str, torch.cuda.nccl.version()[:3]))


def _try(module: str, errors: dict[str, str]) -> None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken installation raises anything, OSError for libraries
        message = str(error).strip().splitlines() or [""]
        errors[module] = f"{type(error).__name__}: {message[0]}"


if __name__ == "__main__":
    answer = probe(sys.argv[1:])
    print(json.dumps(answer), flush=True)
    os._exit(0)  # an answer is complete: no destructor of a library may spoil the exit code
