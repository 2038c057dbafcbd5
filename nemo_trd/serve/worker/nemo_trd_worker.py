"""Imported in every worker process of a vLLM server; see `worker_arguments` in __init__.py.

Registers the weight transfer backend `nemo_trd`, for files, gloo and NCCL, and adds methods to
every worker that are reached through /collective_rpc. Written for vLLM 0.32. Imports nothing but
torch, safetensors and vllm.
"""

from __future__ import annotations

import base64
import time
from abc import abstractmethod
from collections.abc import Set
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from vllm.config import set_current_vllm_config
from vllm.distributed.device_communicators.pynccl_wrapper import (
    NCCLLibrary,
    buffer_type,
    cudaStream_t,
    ncclDataTypeEnum,
)
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.utils.nccl import unpinned_nccl_env


@dataclass
class InitInfo(WeightTransferInitInfo):
    """How to join the trainer, rank 0, in a group with all workers of this server."""

    world_size: int
    timeout_seconds: float  # of one broadcast
    master_address: str = ""  # of the trainer's store, for a group of gloo
    master_port: int = 0
    nccl_unique_id: str = ""  # in base64, for a group of NCCL


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Tensors to take next: those in files, or those that the trainer is about to broadcast."""

    paths: list[str] = field(default_factory=list)  # safetensors, as this machine sees them
    names: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)


class GlooGroup:
    """Takes tensors through host memory."""

    def __init__(self, init_info: InitInfo, rank: int) -> None:
        timeout = timedelta(seconds=init_info.timeout_seconds)
        store = dist.TCPStore(
            init_info.master_address,
            init_info.master_port,
            init_info.world_size,
            is_master=False,
            timeout=timeout,
        )
        self._group: Any = dist.ProcessGroupGloo(store, rank, init_info.world_size, timeout)

    def receive(self, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        self._group.broadcast(tensor, 0).wait()
        return tensor

    def close(self) -> None:
        self._group = None  # closes the connections: the trainer stops sending


class NcclGroup:
    """Takes tensors from GPU to GPU, as bytes, through the libnccl that vLLM uses.

    Joining waits for the trainer without a limit: NCCL gives no handle to abort before.
    """

    def __init__(self, init_info: InitInfo, rank: int, device: torch.device) -> None:
        self._device, self._timeout = device, init_info.timeout_seconds
        self._nccl = NCCLLibrary()
        unique_id = self._nccl.unique_id_from_bytes(base64.b64decode(init_info.nccl_unique_id))
        # What vLLM sets of NCCL for its own groups, the trainer does not: it would not fit.
        with unpinned_nccl_env():
            self._group = self._nccl.ncclCommInitRank(init_info.world_size, unique_id, rank)

    def receive(self, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        address = buffer_type(tensor.data_ptr())
        # A stand-in of NCCL on a CPU has no streams, and is done when it returns.
        stream = torch.cuda.current_stream() if self._device.type == "cuda" else None
        handle = cudaStream_t(stream.cuda_stream if stream else 0)
        place = (address, address, tensor.nbytes, ncclDataTypeEnum.ncclUint8, 0)
        self._nccl.ncclBroadcast(*place, self._group, handle)
        deadline = time.monotonic() + self._timeout
        while stream is not None and not stream.query():
            if time.monotonic() > deadline:
                raise TimeoutError(f"a broadcast did not end within {self._timeout:g} s")
            time.sleep(0.0005)
        return tensor

    def close(self) -> None:
        self._nccl.ncclCommAbort(self._group)


class Receiver(WeightTransferEngine):
    """Takes tensors one at a time, however they come.

    Its errors are kept for `weight_update_state`. Were they raised, vLLM would leave the answers
    of all workers but the first in their queues, and take them for those to the next call.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    failure: str | None = None
    _group: GlooGroup | NcclGroup | None = None  # files need none

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        try:
            self.shutdown()
            parallel = self.parallel_config
            rank = 1 + parallel.data_parallel_index * parallel.world_size + parallel.rank
            if init_info.nccl_unique_id:
                self._group = NcclGroup(init_info, rank, self.device)
            else:
                self._group = GlooGroup(init_info, rank)
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"

    def start_weight_update(self) -> None:
        self.failure = None
        self._start()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # Unlike in the base class, there is no accelerator to wait for.
        if self.failure is not None:
            return
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            self.shutdown()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        for path in update_info.paths:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118
                    self._take(name, file.get_tensor(name))
        for name, dtype, shape in zip(
            update_info.names, update_info.dtypes, update_info.shapes, strict=True
        ):
            if self._group is None:
                raise RuntimeError("not connected with the trainer")
            self._take(name, self._group.receive(shape, getattr(torch, dtype)))

    def finish_weight_update(self) -> None:
        if self.failure or self.missing():
            raise RuntimeError(f"nothing to finish: {self.failure or self.missing()}")
        self._finish()

    def shutdown(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.close()

    @abstractmethod
    def _start(self) -> None:
        """Forget what came before."""

    @abstractmethod
    def _take(self, name: str, tensor: torch.Tensor) -> None: ...

    @abstractmethod
    def missing(self) -> list[str]:
        """What not all tensors, or wrong ones, have come for."""

    @abstractmethod
    def _finish(self) -> None:
        """Put what has come in use."""

    @abstractmethod
    def abandon(self) -> None:
        """Be ready for `start_weight_update`, wherever the last update stopped."""


class ModelReceiver(Receiver):
    """Takes all tensors of a model under their Hugging Face names, and knows which have not come.

    They go into the model as they come.
    """

    _missing: Set[str] = frozenset()

    def _start(self) -> None:
        self._missing = {name for name, _ in self.model.named_parameters()}
        if self.device.type == "cpu":
            _forget_kernels_of_experts(self.model)
        initialize_layerwise_reload(self.model)

    def _take(self, name: str, tensor: torch.Tensor) -> None:
        if ".lora_" in name:
            raise ValueError(
                f"{name} is of an adapter, and this server takes whole weights. Fix: start it with "
                "the run's weight_sync.what=adapter (nemo_trd.serve: --adapter-rank)"
            )
        self._missing -= set(self.model.load_weights([(name, tensor)]))

    def missing(self) -> list[str]:
        return sorted(self._missing) or _partly_loaded(self.model)

    def _finish(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        _repack_tied(self.model)

    def abandon(self) -> None:
        """Put parameters in their places again: the weights are a mixture of layers then.

        vLLM itself goes on with the half-loaded layers of an update that failed, and would take
        tensors of both for one layer. The server may not generate before an update has finished.
        """
        for layer in self.model.modules():
            half_loaded = get_layerwise_info(layer)
            half_loaded.loaded_weights = []
            half_loaded.load_numel = 0  # then its old parameters are put back
        finalize_layerwise_reload(self.model, self.model_config)


def _forget_kernels_of_experts(model: torch.nn.Module) -> None:
    """Have experts' kernels made anew from the weights that come.

    On a CPU a kernel works with packed weights. vLLM packs them where it makes the kernel, and
    would put others into their place as they are.
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _partly_loaded(model: torch.nn.Module) -> list[str]:
    """Layers made of several tensors of which some did not come.

    Embeddings are left out: they have more rows than their tensor.
    """
    names = []
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        partly = info.can_load() and 0 < info.load_numel < info.load_numel_total
        if partly and not isinstance(layer, VocabParallelEmbedding):
            names.append(name)
    return names


def _repack_tied(model: torch.nn.Module) -> None:
    """Let modules that share a parameter derive again what they keep of it.

    On a CPU an output layer works with a packed copy of its weight. When that is tied to the
    embedding, no tensor comes under the output layer's own name, and vLLM leaves the copy alone.
    """
    owners: dict[int, list[Any]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    for sharing in owners.values():
        if len(sharing) > 1:
            for module in sharing:
                module.quant_method.process_weights_after_loading(module)


if "nemo_trd" not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine("nemo_trd", ModelReceiver)


class WorkerExtension:
    """Methods that vLLM adds to its worker class."""

    vllm_config: Any
    weight_transfer_engine: Any

    def weight_update_state(self) -> dict[str, Any]:
        """The failure on this worker, if any, and the first tensors that have not come."""
        engine = self.weight_transfer_engine
        return {"failure": engine.failure, "missing": engine.missing()[:5]}

    def nccl_version(self) -> dict[str, Any]:
        """Version code of the NCCL that this worker would use, as 22907, or why there is none."""
        try:
            return {"version": NCCLLibrary().ncclGetRawVersion(), "failure": None}
        except Exception as error:
            return {"version": None, "failure": f"{type(error).__name__}: {error}"}

    def abandon_weight_update(self) -> None:
        """Make a worker ready for a new update, wherever the last one stopped."""
        engine = self.weight_transfer_engine
        with set_current_vllm_config(self.vllm_config):
            engine.abandon()
        engine.reset_weight_update_target()
        self._weight_update_active = False
