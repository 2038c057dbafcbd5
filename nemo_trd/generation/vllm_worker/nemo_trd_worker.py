"""Imported in every worker process of a vLLM server; see `worker_arguments` in __init__.py.

Registers the weight transfer backends `file` and `gloo`, which need no GPU, and adds to every
worker `abandon_weight_update`, reached through /collective_rpc. Written for vLLM 0.32. Imports
nothing but torch, safetensors and vllm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

NamedTensors = Iterator[tuple[str, torch.Tensor]]


class _LayerwiseEngine(WeightTransferEngine):
    """Loads Hugging Face tensors layer by layer, and refuses to finish without all of them."""

    def start_weight_update(self) -> None:
        self._missing = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # Overridden: the base class also waits for an accelerator, and a CPU worker has none.
        self.receive_weights(self.parse_update_info(update_info))

    def load(self, tensors: NamedTensors) -> None:
        for name, tensor in tensors:
            self._missing -= set(self.model.load_weights([(name, tensor)]))

    def finish_weight_update(self) -> None:
        if self._missing:
            raise RuntimeError(f"no tensor came for {sorted(self._missing)[:5]}")
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    pass


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    paths: list[str]  # safetensors, as this machine sees them


class FileEngine(_LayerwiseEngine):
    """Reads safetensors from a path that trainer and servers share. Needs no init."""

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        pass

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        for path in update_info.paths:
            with safe_open(path, framework="pt", device="cpu") as file:
                self.load((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    master_address: str  # of the trainer's store
    master_port: int
    world_size: int  # the trainer, rank 0, and all workers of this server
    timeout_seconds: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]


class GlooEngine(_LayerwiseEngine):
    """Takes part in broadcasts from the trainer, one full tensor at a time."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    group: Any = None  # a ProcessGroupGloo when connected

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        parallel = self.parallel_config
        rank = 1 + parallel.data_parallel_index * parallel.world_size + parallel.rank
        timeout = timedelta(seconds=init_info.timeout_seconds)
        self.group = None
        store = dist.TCPStore(
            init_info.master_address,
            init_info.master_port,
            init_info.world_size,
            is_master=False,
            timeout=timeout,
        )
        self.group = dist.ProcessGroupGloo(store, rank, init_info.world_size, timeout)

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        try:
            self.load(self._receive(update_info))
        except BaseException:
            self.group = None  # closes the connections: the trainer stops sending
            raise

    def _receive(self, update_info: GlooUpdateInfo) -> NamedTensors:
        if self.group is None:
            raise RuntimeError("not connected with the trainer")
        for name, dtype, shape in zip(
            update_info.names, update_info.dtypes, update_info.shapes, strict=True
        ):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            self.group.broadcast(tensor, 0).wait()
            yield name, tensor

    def shutdown(self) -> None:
        self.group = None


for _name, _engine in (("file", FileEngine), ("gloo", GlooEngine)):
    if _name not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(_name, _engine)


class WorkerExtension:
    """Methods that vLLM adds to its worker class."""

    vllm_config: Any
    weight_transfer_engine: Any

    def abandon_weight_update(self) -> None:
        """Make a worker ready for a new update, wherever the last one stopped.

        vLLM itself goes on with the half-loaded layers of an update that failed, and would take
        old and new tensors for one layer. Afterwards the weights are a mixture, or not even
        initialised: the server may not generate before an update has finished.
        """
        engine = self.weight_transfer_engine
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(engine.model, engine.model_config)
        engine.reset_weight_update_target()
        self._weight_update_active = False
