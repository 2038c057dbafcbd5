"""Rules on the machine: run directory, devices, sandbox, optional packages."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

from packaging.version import Version

from nemo_trd.config.errors import ConfigError, rule_broken
from nemo_trd.config.schema import Config, Precision
from nemo_trd.config.server_rules import visible_devices
from nemo_trd.records.checkpoint_dir import wanted_checkpoints
from nemo_trd.verifiers.sandbox import check_sandbox

# Compute capability from which on TransformerEngine has a recipe.
FP8_NEEDS = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
MIXED_PRODUCTS = (2, 10)  # the oldest PyTorch whose CUDA adds products of bf16 to fp32


def machine_problems(config: Config) -> Iterator[ConfigError]:
    """Yield the rules that this machine breaks: run directory, devices, packages, sandbox."""
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
    wanted = wanted_checkpoints(config.checkpoint, config.run_dir / "checkpoints")
    if resume not in ("auto", "never") and not wanted[0].is_dir():
        yield rule_broken(
            "checkpoint.resume",
            resume,
            "it is auto, never, or the directory of one checkpoint; there is no such directory",
            "name a checkpoint below run.dir of an earlier run, or set auto",
        )
    gpus = gpu_count()
    if gpus and config.precision.dtype == "bf16":
        yield from _torch_without_mixed_products()
    yield from _transformer_engine_settings(config)
    yield from _fp8_of_another_gpu(config.precision)
    yield from _attention_variables()
    if gpus:
        yield from _servers_on_wrong_gpus(config)
    if config.data.verifier == "code":
        try:
            check_sandbox("data.verifier", config.sandbox)
        except ConfigError as error:
            yield error
    for field, tracker, package in (
        ("logging.wandb", config.logging.wandb, "wandb"),
        ("logging.mlflow", config.logging.mlflow, "mlflow"),
    ):
        if tracker is not None and not importable(package):
            yield rule_broken(
                field,
                tracker.model_dump(),
                f"the package {package} is not installed",
                f"pip install 'nemo_trd[{package}]', or set {field}=null",
            )


def _torch_without_mixed_products() -> Iterator[ConfigError]:
    """Yield the rule that the loss's products of bf16 factors, summed in fp32, are there.

    `torch.mm(..., out_dtype=)` came with PyTorch 2.8; that `torch.addmm` adds to fp32 with 2.10.
    """
    import torch

    if Version(torch.__version__).release < MIXED_PRODUCTS:
        yield rule_broken(
            "torch",
            torch.__version__,
            "the loss of bf16 models on a GPU needs PyTorch "
            f"{'.'.join(map(str, MIXED_PRODUCTS))} or newer",
            "install a newer PyTorch or take a newer image, or set precision.dtype=fp32",
        )


def _attention_variables() -> Iterator[ConfigError]:
    """Yield variables of TransformerEngine at which megatron-core's models end in an assertion."""
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        value = os.environ.get(name)
        if value not in (None, "1"):
            yield rule_broken(
                name,
                value,
                "megatron-core lets TransformerEngine choose among its kernels for attention, and "
                "allows no other value than 1",
                f"unset {name}",
            )


def _servers_on_wrong_gpus(config: Config) -> Iterator[ConfigError]:
    """Yield the pools of the run's own servers that would take the GPUs of the ranks, or none."""
    vllm = config.generation.vllm
    if config.generation.backend != "vllm" or vllm is None:
        return
    for role, pool in (("student", vllm.student), ("teacher", vllm.teacher)):
        if pool.replicas and not pool.devices:
            yield rule_broken(
                f"generation.vllm.{role}.devices",
                pool.devices,
                "the run starts these servers beside its ranks, and without a list they take "
                "memory of the ranks' GPUs",
                "name GPUs that no rank uses, or the ranks' own if they are to be shared",
            )
        elif pool.replicas:
            try:
                visible_devices(pool.devices, f"generation.vllm.{role}.devices")
            except ConfigError as error:
                yield error


def _transformer_engine_settings(config: Config) -> Iterator[ConfigError]:
    """Yield the settings that only TransformerEngine honours, on a machine without it."""
    values = {
        "precision.fp8": config.precision.fp8,
        "precision.teacher_fp8": config.precision.teacher_fp8,
    }
    for field, value in values.items():
        if value is None:
            continue
        try:
            check_transformer_engine(field, value)
        except ConfigError as error:
            yield error


def _fp8_of_another_gpu(precision: Precision) -> Iterator[ConfigError]:
    """Yield an FP8 recipe that this machine's GPUs do not compute."""
    if not gpu_count() or {precision.fp8, precision.teacher_fp8} == {None}:
        return
    needed, found = FP8_NEEDS[precision.fp8_recipe], compute_capability()
    if found < needed:
        yield rule_broken(
            "precision.fp8_recipe",
            precision.fp8_recipe,
            f"it needs GPUs of compute capability {needed[0]}.{needed[1]}, and those here have "
            f"{found[0]}.{found[1]}",
            "set precision.fp8_recipe=tensorwise (H100: 9.0), or precision.fp8 and "
            "precision.teacher_fp8 to null",
        )


def check_transformer_engine(field: str, value: object) -> None:
    """Refuse a setting that only TransformerEngine's layers honour, where they cannot be built.

    megatron-core would ignore fp8 in silence.

    Raises:
        ConfigError
    """
    missing = " and no ".join(missing_for_transformer_engine())
    if missing:
        raise rule_broken(
            field,
            value,
            f"it needs TransformerEngine on a CUDA device, and there is no {missing}",
            f"run where both are, or set {field}=null",
        )


def missing_for_transformer_engine() -> list[str]:
    """Parts that TransformerEngine's layers need and this process lacks; empty if it has all."""
    missing = [] if gpu_count() else ["CUDA device"]
    return missing if importable("transformer_engine") else [*missing, "TransformerEngine"]


def compute_capability() -> tuple[int, int]:
    """Compute capability of this process's GPU; only where there is one."""
    import torch

    return torch.cuda.get_device_capability()


def importable(package: str) -> bool:
    """Whether a package is installed; it is not imported."""
    return importlib.util.find_spec(package) is not None


def gpu_count() -> int:
    """Number of CUDA devices that this process sees."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
