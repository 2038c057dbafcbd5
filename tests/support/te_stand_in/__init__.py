"""Puts TransformerEngine's Python on a machine without CUDA, before anything imports it.

The package comes from PyPI without its binaries (`make env`); the compiled extension is
`transformer_engine_torch.py` beside this file. The rest here answers what the package asks of the
machine: its modules get a `torch` of their own, in which there is a GPU and "cuda" means the CPU.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
PACKAGES = HERE.parent.parent.parent / ".venv" / "transformer-engine"
_CPU = torch.device("cpu")
_FACTORIES = "arange as_tensor empty empty_like empty_strided eye full full_like linspace ones "
_FACTORIES += "ones_like rand randn tensor zeros zeros_like"
_ABSENT = ("triton", "triton.language", "triton.language.core", "triton.language.standard")
_ABSENT += ("onnxscript", "onnxscript.values", "onnx", "onnx.defs")


def install() -> None:
    """Make `transformer_engine` importable, and this project believe in a GPU. Once in a process.

    Raises:
        FileNotFoundError: the package has not been installed.
    """
    if str(PACKAGES) in sys.path:
        return
    if not (PACKAGES / "transformer_engine").is_dir():
        raise FileNotFoundError(f"no TransformerEngine in {PACKAGES}: run `make env`")
    sys.path[:0] = [str(HERE), str(PACKAGES)]
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # it does not look for its shared libraries
    os.environ["NVTE_TORCH_COMPILE"] = "0"
    _import_transformer_engine()
    _give_modules_their_torch()
    _patch_attention()
    _patch_tensors()
    from nemo_trd.preflight import machine

    machine.gpu_count = lambda: 8
    machine.compute_capability = lambda: (Gpu.major, Gpu.minor)


def _import_transformer_engine() -> None:
    """Import it with placeholders for what it names at import and the models never call."""
    importlib.import_module("torch._dynamo").config.disable = True  # it looks for triton too
    missing = [name for name in _ABSENT if importlib.util.find_spec(name.split(".")[0]) is None]
    sys.modules.update((name, _Placeholder(name)) for name in missing)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        common = importlib.import_module("transformer_engine.common")
        common.load_framework_extension = lambda framework: None
        pytorch = importlib.import_module("transformer_engine.pytorch")
    sys.modules["transformer_engine"].pytorch = pytorch  # type: ignore[attr-defined]
    for name in missing:  # megatron-core looks for triton itself
        del sys.modules[name]


class _Placeholder(types.ModuleType):
    """A module whose functions decorate and make classes, and whose kernels cannot be started."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(f"{self.__name__}.{name}")


class _Nothing:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(f"{self._name}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __getitem__(self, key: Any) -> Any:  # kernel[grid](...)
        raise NotImplementedError(f"{self._name} is a placeholder")


class Gpu:
    """What TransformerEngine reads of a device: an H100. A Blackwell (mxfp8) has `major` 10."""

    multi_processor_count = 132
    major, minor = 9, 0


class _Cuda(types.ModuleType):
    """torch.cuda in which there is a device."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        self.is_available = lambda: True
        self.current_device = lambda: _CPU
        self.get_device_properties = lambda *args: Gpu
        self.get_device_capability = lambda *args: (Gpu.major, Gpu.minor)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _Torch(types.ModuleType):
    """torch in which "cuda" is the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _Cuda()
        self.version = types.SimpleNamespace(cuda="13.0")
        for name in _FACTORIES.split():
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return create


def _give_modules_their_torch() -> None:
    own = _Torch()
    for name, module in list(sys.modules.items()):
        if name.startswith("transformer_engine.") and getattr(module, "torch", None) is torch:
            module.torch = own  # type: ignore[attr-defined]
    from transformer_engine.pytorch import distributed

    # Recomputing saves and restores the random state.
    distributed._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _patch_attention() -> None:
    """Let fused attention compute in fp32, for exact tests, and wait twice for an exchange.

    cuDNN has it in half precision alone: here fp32 takes the place of fp16. In its backward pass a
    ring of context parallel ranks waits twice, and the second time gloo would wait for ever.
    """
    attention = "transformer_engine.pytorch.attention.dot_product_attention"
    for name in ("backends", "utils"):
        own = _Torch()
        own.float16 = torch.float32
        importlib.import_module(f"{attention}.{name}").torch = own
    ring = importlib.import_module(f"{attention}.context_parallel")
    exchange = ring.flash_attn_p2p_communicate
    ring.flash_attn_p2p_communicate = lambda *args: [_Once(work) for work in exchange(*args)]


class _Once:
    """An exchange under way."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()
        self._work = None


def _patch_tensors() -> None:
    """TransformerEngine checks that tensors are on a GPU, and moves some there."""

    def is_cuda(tensor: torch.Tensor) -> bool:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return caller.startswith("transformer_engine.")

    torch.Tensor.is_cuda = property(is_cuda)  # type: ignore[assignment, method-assign]
    original = torch.Tensor.to

    @functools.wraps(original)
    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = _CPU
        return original(tensor, *args, **kwargs)

    torch.Tensor.to = to  # type: ignore[assignment, method-assign]
