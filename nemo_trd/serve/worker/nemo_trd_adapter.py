"""Imported in every worker process of a vLLM server of adapters; see `worker_arguments`.

Registers the weight transfer backend `nemo_trd_adapter`, which takes a LoRA adapter of the model
that the server has loaded, and has vLLM load that where it would load one from files. On a CPU it
also takes the place of vLLM's products with A and B. Written for vLLM 0.32. Imports nothing but
torch and vllm.
"""

from __future__ import annotations

from typing import Any

import torch
from nemo_trd_worker import Receiver, WorkerExtension
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.request import LoRARequest
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.lora.worker_manager import WorkerLoRAManager

__all__ = ["WorkerExtension"]

ADAPTER_PATH = "trained"  # as `worker_arguments` has it


class AdapterReceiver(Receiver):
    """Takes A and B of a LoRA adapter under their names in PEFT; B has been scaled.

    Until all have come the model computes with those before. vLLM forgets adapters when it likes
    (`reset_lora_state` after every update, and when another one needs the place) and loads them for
    the next request: `_load_trained` gives it these.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._received: dict[str, torch.Tensor] = {}

    def _start(self) -> None:
        self._received = {}

    def _take(self, name: str, tensor: torch.Tensor) -> None:
        if not name.endswith((".lora_A.weight", ".lora_B.weight")):
            raise ValueError(
                f"{name} is of no adapter, and this server takes nothing else. Fix: start it with "
                "the run's weight_sync.what=merged (nemo_trd.serve: no --adapter-rank)"
            )
        self._received[name] = tensor.cpu()

    def missing(self) -> list[str]:
        manager = self.model.lora_manager
        given = _pairs(self._received, self.model)
        wrong = [] if given else ["the adapter"]
        for name, layer in manager.modules.items():
            for part, shape in _parts(manager, name, layer.base_layer):
                pair = given.pop(part, None)
                if pair and not _fits(pair, shape, manager.lora_config.max_lora_rank):
                    wrong.append(f"{part} [{shape[0]}, {shape[1]}]")
        if self.parallel_config.pipeline_parallel_size == 1:  # else a layer may be elsewhere
            wrong += [f"{name}, which this model has not" for name in given]
        return wrong

    def _finish(self) -> None:
        self.model.trained_adapter, self._received = self._received, {}

    def abandon(self) -> None:
        self._received = {}


def _pairs(tensors: dict[str, torch.Tensor], model: Any) -> dict[str, dict[bool, torch.Tensor]]:
    """A (under True) and B (False) of each layer, by vLLM's name of it."""
    pairs: dict[str, dict[bool, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, is_a = parse_fine_tuned_lora_name(name, _renamed(model))
        pairs.setdefault(module, {})[is_a] = tensor
    return pairs


def _renamed(model: Any) -> Any:
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    return mapper and mapper.get_rename_mapper()


def _parts(manager: Any, name: str, layer: Any) -> list[tuple[str, tuple[int, int]]]:
    """Linear layers of the Hugging Face model that vLLM computes in one, with [outputs, inputs]."""
    names = manager.packed_modules.get(name, [name])
    if len(names) == 1:
        outputs = [layer.output_size]
    elif hasattr(layer, "total_num_kv_heads"):  # of q, k and v
        keys = layer.total_num_kv_heads
        outputs = [layer.total_num_heads * layer.head_size, keys * layer.head_size]
        outputs.append(keys * layer.v_head_size)
    else:
        outputs = layer.output_sizes
    return [(part, (n, layer.input_size)) for part, n in zip(names, outputs, strict=True)]


def _fits(pair: dict[bool, torch.Tensor], shape: tuple[int, int], max_rank: int) -> bool:
    """Whether there are A [rank, inputs] and B [outputs, rank]. vLLM copies as much as fits."""
    if len(pair) < 2:
        return False
    a, b = pair[True].shape, pair[False].shape
    return (b[0], a[1]) == shape and a[0] == b[1] <= max_rank


def _load_trained(manager: WorkerLoRAManager, request: LoRARequest) -> LoRAModel:
    """Do as vLLM does, but take what the trainer has sent where it would read from `ADAPTER_PATH`.

    Before the first update that is an adapter that adds nothing.
    """
    if request.lora_path != ADAPTER_PATH:
        return _load_from_files(manager, request)
    number, model = request.lora_int_id, manager._adapter_manager.model
    tensors = getattr(model, "trained_adapter", {})
    if not tensors:  # vLLM wants one pair, and passes by what the model has not
        nothing = LoRALayerWeights("", 1, 1, torch.zeros(1, 1), torch.zeros(1, 1))
        return LoRAModel(number, 1, {"": nothing})
    rank = next(tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name)
    return LoRAModel.from_lora_tensors(
        number,
        tensors,
        PEFTHelper(r=rank, lora_alpha=rank, target_modules=[]),  # a scale of 1
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        weights_mapper=_renamed(model),
    )


def add_lora_linear(
    self: PunicaWrapperCPU,
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a_stacked: tuple[torch.Tensor, ...],
    lora_b_stacked: tuple[torch.Tensor, ...],
    scale: float,
    output_slices: tuple[int, ...],
    **_: Any,
) -> None:
    """Add scale B A x to y [tokens, outputs] where a token's request has the adapter, the only one.

    vLLM's own copies A and B for each token, and adds them to tokens of requests without an
    adapter, too, where others of the same step have one: it takes their index, -1, for the last.
    """
    if self.no_lora:
        return
    adapted = (self.token_lora_indices == 0)[:, None]
    start = 0
    for a, b, outputs in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
        low = scale * adapted * (x.float() @ a[0, 0].float().T)
        y[:, start : start + outputs] += low.to(y.dtype) @ b[0, 0].to(y.dtype).T
        start += outputs


if "nemo_trd_adapter" not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine("nemo_trd_adapter", AdapterReceiver)
    _load_from_files = WorkerLoRAManager._load_adapter
    WorkerLoRAManager._load_adapter = _load_trained  # type: ignore[method-assign]
    PunicaWrapperCPU.add_lora_linear = add_lora_linear  # type: ignore[method-assign]
