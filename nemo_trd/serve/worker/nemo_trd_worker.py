"""Imported in every worker process of a vLLM server; see `worker_arguments` in __init__.py.

Registers the weight transfer backend `host`, which needs no GPU, and adds methods to every worker
that are reached through /collective_rpc. Written for vLLM 0.32. Imports nothing but torch,
safetensors and vllm.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from vllm.config import set_current_vllm_config
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


@dataclass
class HostInitInfo(WeightTransferInitInfo):
    """How to join the trainer, rank 0, in a group with all workers of this server."""

    master_address: str  # of the trainer's store
    master_port: int
    world_size: int
    timeout_seconds: float  # of one broadcast


@dataclass
class HostUpdateInfo(WeightTransferUpdateInfo):
    """Tensors to take next: those in files, or those that the trainer is about to broadcast."""

    paths: list[str] = field(default_factory=list)  # safetensors, as this machine sees them
    names: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)


class HostEngine(WeightTransferEngine):
    """Takes full Hugging Face tensors through host memory, one at a time.

    Its errors are kept for `weight_update_state`. Were they raised, vLLM would leave the answers
    of all workers but the first in their queues, and take them for those to the next call.
    """

    init_info_cls = HostInitInfo
    update_info_cls = HostUpdateInfo
    failure: str | None = None
    _group: Any = None  # a ProcessGroupGloo when it is connected; files need none
    _missing: Set[str] = frozenset()

    def init_transfer_engine(self, init_info: HostInitInfo) -> None:
        self._group = None
        try:
            self._group = self._join(init_info)
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"

    def _join(self, init_info: HostInitInfo) -> Any:
        parallel = self.parallel_config
        rank = 1 + parallel.data_parallel_index * parallel.world_size + parallel.rank
        timeout = timedelta(seconds=init_info.timeout_seconds)
        store = dist.TCPStore(
            init_info.master_address,
            init_info.master_port,
            init_info.world_size,
            is_master=False,
            timeout=timeout,
        )
        return dist.ProcessGroupGloo(store, rank, init_info.world_size, timeout)

    def start_weight_update(self) -> None:
        self.failure = None
        self._missing = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # Unlike in the base class, there is no accelerator to wait for.
        if self.failure is not None:
            return
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            self._group = None  # closes the connections: the trainer stops sending

    def receive_weights(self, update_info: HostUpdateInfo) -> None:
        for path in update_info.paths:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118
                    self._load(name, file.get_tensor(name))
        for name, dtype, shape in zip(
            update_info.names, update_info.dtypes, update_info.shapes, strict=True
        ):
            self._load(name, self._receive(shape, getattr(torch, dtype)))

    def _receive(self, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        if self._group is None:
            raise RuntimeError("not connected with the trainer")
        tensor = torch.empty(shape, dtype=dtype)
        self._group.broadcast(tensor, 0).wait()
        return tensor

    def _load(self, name: str, tensor: torch.Tensor) -> None:
        self._missing -= set(self.model.load_weights([(name, tensor)]))

    def missing(self) -> list[str]:
        """Parameters for which not all tensors have come."""
        return sorted(self._missing) or _partly_loaded(self.model)

    def finish_weight_update(self) -> None:
        if self.failure or self.missing():
            raise RuntimeError(f"nothing to finish: {self.failure or self.missing()}")
        finalize_layerwise_reload(self.model, self.model_config)
        _repack_tied(self.model)

    def shutdown(self) -> None:
        self._group = None


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


if "host" not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine("host", HostEngine)


class WorkerExtension:
    """Methods that vLLM adds to its worker class."""

    vllm_config: Any
    weight_transfer_engine: Any

    def weight_update_state(self) -> dict[str, Any]:
        """The failure on this worker, if any, and the first tensors that have not come."""
        engine = self.weight_transfer_engine
        if not isinstance(engine, HostEngine):  # vLLM's own: it raises
            return {"failure": None, "missing": []}
        return {"failure": engine.failure, "missing": engine.missing()[:5]}

    def abandon_weight_update(self) -> None:
        """Make a worker ready for a new update, wherever the last one stopped.

        vLLM itself goes on with the half-loaded layers of an update that failed, and would take
        tensors of both for one layer. Afterwards the weights are a mixture of layers: the server
        may not generate before an update has finished.
        """
        engine = self.weight_transfer_engine
        for layer in engine.model.modules():
            half_loaded = get_layerwise_info(layer)
            half_loaded.loaded_weights = []
            half_loaded.load_numel = 0  # then its old parameters are put back
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(engine.model, engine.model_config)
        engine.reset_weight_update_target()
        self._weight_update_active = False
