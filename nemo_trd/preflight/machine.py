"""The machine: run directory, devices, optional packages."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from nemo_trd.config.errors import ConfigError, rule_broken
from nemo_trd.config.schema import Config
from nemo_trd.preflight.batch import _layouts
from nemo_trd.records import latest
from nemo_trd.verifiers.sandbox import check_sandbox


def _machine_problems(config: Config) -> Iterator[ConfigError]:
    """The run directory, the devices and the optional packages."""
    run_dir = config.run_dir.absolute()
    existing = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield rule_broken(
            "run.dir",
            config.run.dir,
            f"the run writes below it, and {existing} is not a writable directory",
            "choose another directory, or change its permissions",
        )
    resume = config.checkpoint.resume
    if resume not in ("auto", "never") and not latest.follow(Path(resume)).is_dir():
        yield rule_broken(
            "checkpoint.resume",
            resume,
            "it is auto, never, or the directory of one checkpoint; there is no such directory",
            "name a checkpoint below run.dir of an earlier run, or set auto",
        )
    gpus = gpu_count()
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    ranks_here = max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), local_rank + 1)
    if gpus and ranks_here > gpus:
        yield rule_broken(
            "ranks on this machine",
            ranks_here,
            f"each rank has a GPU of its own and {gpus} are visible",
            "start fewer ranks a machine, or make more GPUs visible (CUDA_VISIBLE_DEVICES)",
        )
    yield from _transformer_engine_problems(config, gpus)
    if config.data.verifier == "code":
        try:
            check_sandbox("data.verifier", config.sandbox)
        except ConfigError as error:
            yield error
    for field, wanted, package in (
        ("logging.wandb", config.logging.wandb, "wandb"),
        ("logging.mlflow", config.logging.mlflow, "mlflow"),
    ):
        if wanted is not None and not importable(package):
            yield rule_broken(
                field,
                wanted.model_dump(),
                f"the package {package} is not installed",
                f"pip install 'nemo_trd[{package}]', or set {field}=null",
            )


def _transformer_engine_problems(config: Config, gpus: int) -> Iterator[ConfigError]:
    """Without TransformerEngine megatron-core ignores fp8 in silence."""
    wants: dict[str, tuple[object, object]] = {  # field -> value, what switches it off
        "precision.fp8": (config.precision.fp8, "null"),
        "precision.teacher_fp8": (config.precision.teacher_fp8, "null"),
    }
    for role, layout in _layouts(config):
        size = layout.context_parallel_size
        wants[f"parallel.{role}.context_parallel_size"] = (size if size > 1 else None, 1)
    for field, (value, off) in wants.items():
        if value is None:
            continue
        if not gpus:
            yield rule_broken(
                field, value, "it needs a CUDA device and there is none", f"set {field}={off}"
            )
        if not importable("transformer_engine"):
            yield rule_broken(
                field,
                value,
                "it needs TransformerEngine, which is not installed",
                f"run in an image that has it, or set {field}={off}",
            )
        elif field.endswith("context_parallel_size"):
            yield rule_broken(
                field, value, "sequences are not split over ranks", f"set {field}={off}"
            )


def importable(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
