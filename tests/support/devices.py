"""Ranks on the CUDA devices of this machine, and on its CPU beside them.

With NEMO_TRD_EMULATED_GPU=1, where there is no device, ranks "on devices" are on the CPU with
TransformerEngine's Python over `te_stand_in`: so the tests of tests/gpu are tested.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from launch import launch, run_ranks

from nemo_trd.config.errors import ConfigError
from nemo_trd.preflight.machine import importable
from nemo_trd.serve.environment import find_vllm

EMULATED = os.environ.get("NEMO_TRD_EMULATED_GPU") == "1" and not torch.cuda.is_available()
HAS_TRANSFORMER_ENGINE = EMULATED or importable("transformer_engine")
# As NVIDIA's images set it, products of fp32 matrices would have ten bits.
EXACT = {"NVIDIA_TF32_OVERRIDE": "0"}


def missing_devices() -> str | None:
    """Why tests on CUDA devices cannot run; None where they can."""
    return None if torch.cuda.is_available() else "needs a CUDA device"


def skip_without_vllm() -> None:
    """Skip a test on devices where no vLLM can serve on them."""
    try:
        _, is_cpu = find_vllm(None)
    except ConfigError as error:
        pytest.skip(f"no vLLM: {error}")
    if is_cpu and not EMULATED:
        pytest.skip("the vLLM here is a build for CPUs")


def device_count() -> int:
    return 2 if EMULATED else torch.cuda.device_count()


def on_devices(
    ranks: int,
    function: Callable[..., None],
    *arguments: Any,
    environment: dict[str, str] | None = None,
    timeout: float = 300,
) -> None:
    """Call a function of a test file on ranks that have a device each; see `launch`."""
    settings = EXACT | (environment or {})
    if EMULATED:
        options: dict[str, Any] = {"timeout": timeout, "transformer_engine": True}
        launch(ranks, function, *arguments, environment=settings, **options)
        return
    _start(ranks, function, *arguments, environment=settings, timeout=timeout)


def on_cpu(function: Callable[..., None], *arguments: Any, timeout: float = 300) -> None:
    """Call a function of a test file on one rank that sees no device."""
    if EMULATED:
        launch(1, function, *arguments, timeout=timeout)
        return
    _start(1, function, *arguments, environment={"CUDA_VISIBLE_DEVICES": ""}, timeout=timeout)


def _start(ranks: int, function: Callable[..., None], *arguments: Any, **options: Any) -> None:
    # In interpreters of their own: CUDA does not survive a fork.
    returncode, output = run_ranks(ranks, function, *arguments, launcher="torchrun", **options)
    assert returncode == 0, f"{function.__name__} failed ({returncode}):\n{output[-8000:]}"
