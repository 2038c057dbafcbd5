"""Patches with which megatron-core runs on a CPU with gloo.

megatron-core names "cuda" as the device in many places, asks torch.cuda for streams and random
states, and checks the types of parameters by their CUDA names. Each patch below answers one of
those. `install` does nothing where CUDA is available.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

_CPU = torch.device("cpu")
# Modules of megatron-core with the literal device="cuda"; the functions of torch that they call.
_MODULES = (
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.strategies.state_dict_saver",
    "optimizer.clip_grads",
    "optimizer.grad_scaler",
    "optimizer.optimizer",
    "pipeline_parallel.schedules",
    "transformer.utils",
    "utils",
)
_FACTORIES = ("empty", "empty_like", "ones", "tensor", "zeros")
_installed = False


def install() -> None:
    """Make megatron-core importable and usable without CUDA. Call it before importing megatron."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    # It warns, module by module, that CUDA packages are not there.
    warnings.filterwarnings("ignore", module=r"megatron\.core\.")
    _patch_cuda_runtime()
    _stub_paged_stash()
    _patch_devices()
    _patch_random_state()
    _patch_dispatch()


class _NoStream:
    """Stand-in for streams and events: on a CPU every call has finished when it returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., _NoStream]:
        return lambda *args, **kwargs: self


class _TorchOnCpu(ModuleType):
    """Torch module in which some functions take device="cuda" to mean the CPU.

    Each module of `_MODULES` gets it as its own `torch`. Patching torch itself would break
    `with torch.device(...)`, by which transformers loads models: it knows functions by identity.
    """

    def __init__(self) -> None:
        super().__init__("torch")
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return create


def _patch_devices() -> None:
    torch_on_cpu = _TorchOnCpu()
    for name in _MODULES:
        importlib.import_module(f"megatron.core.{name}").torch = torch_on_cpu  # type: ignore[attr-defined]
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor  # type: ignore[assignment, method-assign]
    # The optimizers sort parameters by `param.type()` and know only the names of CUDA types.
    torch.Tensor.type = _cuda_type_for_megatron(torch.Tensor.type)  # type: ignore[assignment, method-assign]


def _cuda_type_for_megatron(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def tensor_type(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(tensor, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(result, str) and caller.startswith("megatron."):
            return result.replace("torch.", "torch.cuda.")
        return result

    return tensor_type


def _patch_cuda_runtime() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU  # megatron-core allocates on what this returns
    # Without a device these raise or, like Stream, cannot even be constructed.
    cuda.synchronize = lambda *args: None
    cuda.empty_cache = lambda: None
    cuda.Stream = cuda.Event = _NoStream
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _NoStream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.is_current_stream_capturing = lambda: False
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args: None


def _stub_paged_stash() -> None:
    """Stub a module that imports triton unguarded (megatron-core 0.19); only experts use it."""
    if importlib.util.find_spec("triton") is not None:
        return
    stub = ModuleType("megatron.core.transformer.moe.ops.paged_stash")
    stub.__getattr__ = _nothing  # type: ignore[method-assign]
    sys.modules[stub.__name__] = stub


def _nothing(name: str) -> None:
    if name.startswith("__"):
        raise AttributeError(name)


def _patch_random_state() -> None:
    # Recomputing activations saves and restores the CUDA generator: take the CPU's instead.
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()  # type: ignore[assignment]
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    from megatron.core.tensor_parallel import random

    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _patch_dispatch() -> None:
    """Give the exchange of tokens between experts' ranks its counts as numbers of the host.

    megatron-core turns them into such where it copies them from a device, and torch wants them.
    """
    dispatcher: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    move = dispatcher.maybe_move_tensor_to_cpu

    def moved(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        tensor = move(tensor, as_numpy, record_stream)
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    dispatcher.maybe_move_tensor_to_cpu = moved
    _patch_uneven_shares()


def _patch_uneven_shares() -> None:
    """Let ranks that split an expert gather and reduce different numbers of tokens.

    Gloo wants one size: shares are filled up to the largest with zeros.
    """
    mappings: Any = importlib.import_module("megatron.core.tensor_parallel.mappings")
    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def filled(tensor: torch.Tensor, size: int) -> torch.Tensor:
        return torch.cat([tensor, tensor.new_zeros(size - len(tensor), *tensor.shape[1:])])

    def gathered(
        own: torch.Tensor, group: Any, sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if sizes is None or len(set(sizes)) == 1:
            return gather(own, group, sizes, use_global_buffer)
        whole = gather(filled(own, max(sizes)), group, None, use_global_buffer)
        parts = zip(whole.chunk(len(sizes)), sizes, strict=True)
        return torch.cat([part[:size] for part, size in parts])

    def scattered(
        whole: torch.Tensor, group: Any, sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if sizes is None or len(set(sizes)) == 1:
            return scatter(whole, group, sizes, use_global_buffer)
        even = torch.cat([filled(part, max(sizes)) for part in whole.split(sizes)])
        return scatter(even, group, None, use_global_buffer)[: sizes[group.rank()]]

    mappings._gather_along_first_dim = gathered
    mappings._reduce_scatter_along_first_dim = scattered
