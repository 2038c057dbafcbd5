"""LoRA (arXiv 2106.09685) on Megatron's linear layers, as Hugging Face PEFT computes it.

A target W x becomes W x + scale B A x. W is frozen; A [rank, in] and B [out, rank] are trained.
Megatron computes q, k and v in one linear layer, and gate and up in another; each of them keeps an
A and a B of its own. What is added lies below the linear layer, and a hook adds its output to the
layer's, so the layers are Megatron's or TransformerEngine's as they are.

Where a layer is split over its outputs (q, k, v, gate, up) A is whole on every tensor parallel rank
and B has the rank's outputs; where it is split over its inputs (o, down) A has the rank's inputs
and B is whole. Only A x, of width `rank`, is exchanged:

                      without sequence parallelism    with it: tokens are split outside the layers
    outputs split     gradients of A x are summed     A x is gathered; gradients are scattered
    inputs split      A x is summed                   A x is summed and scattered

With sequence parallelism each rank sees a part of the tokens in the matrix that is whole: its
gradient is summed over tensor parallel ranks, as Megatron does for norms.

Experts have theirs in `expert_lora`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import (
    make_sharded_tensor_for_checkpoint,
    make_tp_sharded_tensor_for_checkpoint,
)
from safetensors import safe_open
from torch import Tensor
from torch.nn import Parameter
from transformers import PretrainedConfig

from nemo_trd.config.schema import Adapter
from nemo_trd.megatron.expert_lora import ExpertsAdapter, experts_adapter
from nemo_trd.megatron.hf_weights import ADAPTER, OwnPart, whole_tensors
from nemo_trd.megatron.model import HiddenStatesModel, mark_experts
from nemo_trd.models.directory import ADAPTER_WEIGHTS
from nemo_trd.models.family import expected_tensors, family_of, is_sparse
from nemo_trd.models.peft import (
    adapted_experts,
    adapter_tensors,
    begins_from_directory,
    matrix_names,
    scale,
    target_modules,
)

QKV = "self_attention.linear_qkv"
# Megatron's linear layers below a layer, and the targets in each, in the order of its outputs.
LINEAR: dict[str, tuple[str, ...]] = {
    QKV: ("q", "k", "v"),
    "self_attention.linear_proj": ("o",),
    "mlp.linear_fc1": ("gate", "up"),
    "mlp.linear_fc2": ("down",),
}


class Pair(torch.nn.Module):
    """A and B of one target: this rank's columns of A, or its rows of B.

    module: the target's name in the Hugging Face model, such as model.layers.0.self_attn.q_proj.
    """

    def __init__(self, module: str, a: Parameter, b: Parameter) -> None:
        super().__init__()
        self.module = module
        self.A, self.B = a, b


class LinearAdapter(torch.nn.Module):
    """What is added to the output of one of Megatron's linear layers.

    on: whether it is added; see `adapter_off`.
    """

    def __init__(
        self,
        pairs: Mapping[str, Pair],
        outputs: Mapping[str, int],
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        settings: Adapter,
        *,
        splits_inputs: bool,
        interleaved: int,
    ) -> None:
        """Add to a linear layer.

        Args:
            pairs: by target.
            outputs: target -> number of outputs on this rank, of all targets in the layer.
            splits_inputs: whether the layer is split over its inputs, not its outputs.
            interleaved: number of groups of outputs on this rank, each with a share of every
                target; 1 where the targets follow each other.
        """
        super().__init__()
        self._of_target = dict(pairs)
        self.pairs = torch.nn.ModuleDict(pairs)  # so that they are found
        self.on = True
        self._outputs = dict(outputs)
        self._interleaved = interleaved
        self._splits_inputs = splits_inputs
        self._sequence_parallel = config.sequence_parallel
        self._tp = groups.tp
        self._scale = scale(settings)
        self._rank = settings.rank
        self._dropout = settings.dropout

    def forward(self, x: Tensor) -> Tensor:
        """x [t, 1, in] -> what is added to the layer's output [t, 1, out], on this rank."""
        pairs = self._of_target.values()
        if self._dropout and self.training:
            low = torch.cat([F.linear(self._with_dropout(x), pair.A) for pair in pairs], -1)
        else:
            low = F.linear(x, torch.cat([pair.A for pair in pairs]))
        of_each = (self._scale * self._exchanged(low)).split(self._rank, -1)
        outputs = {
            target: F.linear(part, pair.B)
            for part, (target, pair) in zip(of_each, self._of_target.items(), strict=True)
        }
        return self._joined(outputs)

    def _exchanged(self, low: Tensor) -> Tensor:
        """A x [t, 1, n] from what this rank's tokens or inputs give."""
        if self._splits_inputs:
            if self._sequence_parallel:
                return reduce_scatter_to_sequence_parallel_region(low, group=self._tp)
            return reduce_from_tensor_model_parallel_region(low, group=self._tp)
        if self._sequence_parallel:
            return gather_from_sequence_parallel_region(
                low, tensor_parallel_output_grad=True, group=self._tp
            )
        return copy_to_tensor_model_parallel_region(low, group=self._tp)

    def _joined(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Outputs of the targets as the layer orders its own; zero for those without a pair."""
        first = next(iter(outputs.values()))
        parts = [
            outputs[target] if target in outputs else first.new_zeros(*first.shape[:-1], width)
            for target, width in self._outputs.items()
        ]
        grouped = [part.unflatten(-1, (self._interleaved, -1)) for part in parts]
        return torch.cat(grouped, -1).flatten(-2)

    def _with_dropout(self, x: Tensor) -> Tensor:
        """Draw which inputs are dropped, by a seed of the CPU's generator.

        The recomputation of activations brings that generator back to where it was. It stands at
        the same place on all tensor parallel ranks: they drop the same of what they all have, and
        different inputs of what is split over them.
        """
        is_split = self._splits_inputs or self._sequence_parallel
        seed = int(torch.randint(2**48, (1,))) + is_split * self._tp.rank()
        generator = torch.Generator(x.device).manual_seed(seed)
        kept = 1 - self._dropout
        return x * torch.empty_like(x).bernoulli_(kept, generator=generator) / kept

    def add(self, linear: torch.nn.Module, inputs: Any, output: Any) -> tuple[Tensor, Any]:
        """Forward hook of the linear layer, which returns its output and a bias or None.

        A layer of TransformerEngine that has the norm in it returns the normalised input too
        (`return_layernorm_output`): that is the adapter's.
        """
        (result, bias), x = output, inputs[0]
        if isinstance(result, tuple):
            result, x = result
        return (result + self(x) if self.on else result), bias


def add_adapters(
    models: Sequence[HiddenStatesModel],
    hf: PretrainedConfig,
    settings: Adapter,
    groups: ProcessGroupCollection,
    seed: int,
) -> None:
    """Freeze models that have their weights, and put an adapter on them. Not collective.

    A and B do not depend on how the model is split.
    """
    make = _Maker(hf, settings, groups, seed)
    for model in models:
        model.requires_grad_(False)
        if model.config.recompute_granularity == "full" and model.pre_process:
            # Layers are recomputed for a gradient only if something that goes into them has one.
            model.embedding.register_forward_hook(lambda _, __, output: output.requires_grad_())
        for layer in model.decoder.layers:
            number = layer.layer_number - 1
            for path in LINEAR:
                adapter = make.adapter(number, path, model.config)
                if adapter is None:
                    continue
                linear = layer.get_submodule(path)
                if hasattr(linear, "return_layernorm_output"):
                    linear.return_layernorm_output = True
                linear.add_module(ADAPTER, adapter)
                linear.register_forward_hook(adapter.add)
            if adapters := make.experts_adapters(number, model.config):
                layer.mlp.experts.add_module(ADAPTER, torch.nn.ModuleList(adapters))
                for of_experts in adapters:
                    of_experts.put_on(layer.mlp.experts)
        mark_experts(model)


class _Maker:
    """Makes adapters, with A and B as `student.adapter.init` says."""

    def __init__(
        self, hf: PretrainedConfig, settings: Adapter, groups: ProcessGroupCollection, seed: int
    ) -> None:
        self._hf, self._settings, self._groups, self._seed = hf, settings, groups, seed
        self._layers = family_of(hf).layers
        self._modules = target_modules(family_of(hf).layer)
        self._weights = expected_tensors(hf)
        self._tensors = adapter_tensors(hf, settings)
        self._of_experts = adapted_experts(hf, settings)
        self._file: Any = None
        if begins_from_directory(settings):
            file = Path(settings.init) / ADAPTER_WEIGHTS
            self._file = safe_open(file, framework="pt", device="cpu")

    def adapter(self, layer: int, path: str, config: TransformerConfig) -> LinearAdapter | None:
        """The adapter of one of `LINEAR` in a layer; None where none of its outputs is a target.

        A layer with experts has no linear layers of the MLP.
        """
        if path.startswith("mlp.") and is_sparse(self._hf, layer):
            return None
        chosen: Sequence[str] = self._settings.targets
        names = {t: f"{self._layers}.{layer}.{self._modules[t]}" for t in LINEAR[path]}
        pairs = {t: self._pair(module, config) for t, module in names.items() if t in chosen}
        if not pairs:
            return None
        weights = [self._weights[f"{module}.weight"] for module in names.values()]
        tp = self._groups.tp.size()
        splits_inputs = weights[0].split_axis == 1
        outputs = [w.shape[0] // (1 if splits_inputs else tp) for w in weights]
        return LinearAdapter(
            *(pairs, dict(zip(names, outputs, strict=True))),
            *(config, self._groups, self._settings),
            splits_inputs=splits_inputs,
            interleaved=config.num_query_groups // tp if path == QKV else 1,
        )

    def experts_adapters(self, layer: int, config: TransformerConfig) -> list[ExpertsAdapter]:
        """Those of the experts of a layer."""
        return [
            experts_adapter(
                *(module, fused, self._settings, self._groups),
                *(lambda name: self._whole(name, self._tensors[name].shape), config.params_dtype),
            )
            for module, fused in self._of_experts.items()
            if fused.layer == layer
        ]

    def _pair(self, module: str, config: TransformerConfig) -> Pair:
        matrices = []
        for name in matrix_names(module):
            tensor = self._tensors[name]
            own = self._whole(name, tensor.shape)
            if tensor.split_axis is not None:
                own = own.chunk(self._groups.tp.size(), tensor.split_axis)[self._groups.tp.rank()]
            own = own.to(torch.cuda.current_device(), config.params_dtype, copy=True)
            matrices.append(Parameter(own.contiguous()))
            if tensor.split_axis is None:
                # Tokens are split where this matrix is whole: Megatron sums its gradients.
                matrices[-1].sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            else:
                set_tensor_model_parallel_attributes(matrices[-1], True, tensor.split_axis, 1)
        return Pair(module, *matrices)

    def _whole(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A or B whole, the same on every rank; fp32, or as it is stored."""
        if self._file is not None:
            return self._file.get_tensor(name)
        if ".lora_B." in name:
            return torch.zeros(shape)
        generator = torch.Generator().manual_seed(_number(self._seed, name))
        if self._settings.init == "gaussian":
            return torch.randn(shape, generator=generator) / self._settings.rank
        bound = 1 / math.sqrt(shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _number(*parts: object) -> int:
    """A seed from these parts, of 48 bits."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big")


@contextmanager
def adapter_off(models: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Make the models compute as without their adapters, until the end of the block."""
    kinds = (LinearAdapter, ExpertsAdapter)
    adapters = [m for model in models for m in model.modules() if isinstance(m, kinds)]
    before = [adapter.on for adapter in adapters]
    try:
        for adapter in adapters:
            adapter.on = False
        yield
    finally:
        for adapter, on in zip(adapters, before, strict=True):
            adapter.on = on


@contextmanager
def dropout_of(update: int, seed: int, groups: ProcessGroupCollection) -> Iterator[None]:
    """Draw dropout in this block by the number of the update: the same when a run is resumed.

    Tensor parallel ranks draw the same, all others each their own.
    """
    before = torch.get_rng_state()
    number = _number(seed, update, groups.dp_cp.rank(), groups.pp.rank())
    torch.default_generator.manual_seed(number)
    try:
        yield
    finally:
        torch.set_rng_state(before)


def _pairs(models: Sequence[torch.nn.Module]) -> Iterator[Pair]:
    return (m for model in models for m in model.modules() if isinstance(m, Pair))


def _experts_adapters(models: Sequence[torch.nn.Module]) -> Iterator[ExpertsAdapter]:
    return (m for model in models for m in model.modules() if isinstance(m, ExpertsAdapter))


def added_to_weights(models: Sequence[HiddenStatesModel], settings: Adapter) -> dict[str, OwnPart]:
    """What merging adds to this rank's slices of the weights: scale B A in fp32, by tensor name.

    Of experts collective over the ranks that split them.
    """

    @torch.no_grad()
    def product(pair: Pair) -> Tensor:
        return scale(settings) * (pair.B.float() @ pair.A.float())

    added: dict[str, OwnPart] = {
        f"{pair.module}.weight": partial(product, pair) for pair in _pairs(models)
    }
    for adapter in _experts_adapters(models):
        added |= adapter.added_to_weights()
    return added


def export_adapter(
    models: Sequence[HiddenStatesModel],
    hf: PretrainedConfig,
    settings: Adapter,
    groups: ProcessGroupCollection,
) -> Iterator[tuple[str, Tensor]]:
    """Every A and B in full, under its name in PEFT, one at a time.

    Collective as `hf_weights.whole_tensors`.
    """
    own: dict[str, OwnPart] = {
        name: partial(matrix.detach)
        for pair in _pairs(models)
        for name, matrix in zip(matrix_names(pair.module), (pair.A, pair.B), strict=True)
    }
    for adapter in _experts_adapters(models):
        own |= adapter.whole()
    return whole_tensors(own, adapter_tensors(hf, settings), models[0], groups)


def sharded_state_dict(model: HiddenStatesModel, groups: ProcessGroupCollection) -> dict[str, Any]:
    """What a checkpoint holds of a model with an adapter: A and B, for any layout."""
    prefixes = {module: name for name, module in model.named_modules()}
    both = {"tp_group": groups.tp, "dp_cp_group": groups.dp_cp}
    states = {}
    for pair in _pairs([model]):
        matrices = (("A", pair.A, 1), ("B", pair.B, 0))
        for name, (letter, matrix, axis) in zip(matrix_names(pair.module), matrices, strict=True):
            if getattr(matrix, "tensor_model_parallel", False):
                state = make_tp_sharded_tensor_for_checkpoint(matrix, name, tp_axis=axis, **both)
            else:
                state = make_sharded_tensor_for_checkpoint(matrix, name, **both)
            states[f"{prefixes[pair]}.{letter}"] = state
    for adapter in _experts_adapters([model]):
        states |= adapter.sharded_state_dict(f"{prefixes[adapter]}.")
    return states
