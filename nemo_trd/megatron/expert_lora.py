"""LoRA on the experts of a layer, as Hugging Face PEFT has it (`models.peft`).

Each expert's gate and up together, and its down, have an A and a B of their own. A hook on
Megatron's linear layer adds what they give: on that of each expert where experts compute one after
the other, on the one for all of them where their products are grouped.

Where expert tensor parallel ranks split an expert, each has its columns of A and its rows of B:

    gate, up    gets all inputs, takes those of its columns; its rows of B are its outputs
    down        gets its columns' inputs; its rows of B are some of the outputs, and the
                dispatcher sums over the ranks, as it does for the layer's own

Between them A x, of width `rank`, is summed over the ranks, and so is its gradient. So no rank has
a copy of another's matrix: megatron-core would know nothing of copies when it sums gradients of
experts, and when it takes their norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor
from torch.nn import Parameter, ParameterList

from nemo_trd.config.schema import Adapter
from nemo_trd.megatron.hf_weights import OwnPart, gathered
from nemo_trd.models.peft import FusedWeight, matrix_names, scale

# Megatron's linear layers of an expert, by the axis over which ranks split the weight.
SPLIT_LINEAR = ("linear_fc1", "linear_fc2")


class ExpertsAdapter(torch.nn.Module):
    """What is added to the outputs of one linear layer in each of this rank's experts.

    module: the name below which PEFT has A and B, such as model.layers.0.mlp.experts.
    fused: what of the experts it is put on.
    A: of each expert on this rank [rank, own columns].
    B: likewise [parts, own rows of each part, rank].
    on: whether it is added; see `lora.adapter_off`.
    """

    def __init__(
        self,
        module: str,
        fused: FusedWeight,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        settings: Adapter,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__()
        self.module, self.fused = module, fused
        self.A, self.B = ParameterList(a), ParameterList(b)
        self.on = True
        self.groups = groups
        self._scale = scale(settings)

    @property
    def first(self) -> int:
        """Number in the layer of the first expert on this rank."""
        return self.groups.ep.rank() * len(self.A)

    def put_on(self, experts: torch.nn.Module) -> None:
        """Have it computed by the module of a layer's experts."""
        linear = SPLIT_LINEAR[self.fused.split_axis]
        one_by_one = getattr(experts, "local_experts", None)
        if isinstance(one_by_one, torch.nn.ModuleList):
            for number, expert in enumerate(one_by_one):
                add = partial(self._add_to_one, number)
                expert.get_submodule(linear).register_forward_hook(add)
        else:
            experts.get_submodule(linear).register_forward_hook(self._add_to_all)

    def _add_to_one(
        self, number: int, linear: torch.nn.Module, inputs: Any, output: Any
    ) -> tuple[Tensor, Any]:
        """Forward hook of an expert's linear layer, which returns its output and a bias or None."""
        (result, bias), (x,) = output, inputs
        a, b = [self.A[number]], [self.B[number]]
        return (result + self(x, a, b, [len(x)]) if self.on else result), bias

    def _add_to_all(self, linear: torch.nn.Module, inputs: Any, output: Any) -> tuple[Tensor, Any]:
        """Forward hook of the linear layer of all experts on this rank, likewise."""
        (result, bias), (x, counts) = output, inputs
        return (result + self(x, self.A, self.B, counts) if self.on else result), bias

    def forward(
        self, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], counts: Sequence[int]
    ) -> Tensor:
        """What is added to the outputs of some experts, on this rank.

        Args:
            x: inputs of the linear layer [t, in], the tokens of each expert behind each other.
            a, b: of these experts.
            counts: number of tokens of each.
        """
        tp = self.groups.expt_tp
        if self.fused.split_axis == 0:
            x = x.chunk(tp.size(), -1)[tp.rank()]
        low = torch.cat([F.linear(own, A) for own, A in zip(x.split(counts), a, strict=True)])
        summed = reduce_from_tensor_model_parallel_region(low, group=tp)
        low = self._scale * copy_to_tensor_model_parallel_region(summed, group=tp)
        outputs = torch.cat(
            [F.linear(own, B.flatten(0, 1)) for own, B in zip(low.split(counts), b, strict=True)]
        )
        if self.fused.split_axis == 0:
            return outputs
        before, after = tp.rank(), tp.size() - tp.rank() - 1
        width = outputs.shape[-1]
        return F.pad(outputs, (before * width, after * width))

    def added_to_weights(self) -> Iterator[tuple[str, OwnPart]]:
        """What merging adds to this rank's slices of its experts' weights, fp32, by tensor name.

        Each is collective over the ranks that split the expert.
        """
        module = self.module.removesuffix(".base_layer")
        for own in range(len(self.A)):
            for place, part in enumerate(self.fused.parts):
                name = f"{module}.{self.first + own}.{part}.weight"
                yield name, partial(self._product, own, place)

    @torch.no_grad()
    def _product(self, own: int, place: int) -> Tensor:
        a, b = self.A[own].float(), self.B[own][place].float()
        if self.fused.split_axis == 0:
            a = gathered(a, 1, self.groups.expt_tp)
        else:
            b = gathered(b, 0, self.groups.expt_tp)
        return self._scale * (b @ a)

    def whole(self) -> Iterator[tuple[str, OwnPart]]:
        """A and B of all experts, by their names in PEFT and in its order.

        Each is collective over the ranks that have the experts of the layer.
        """
        a, b = matrix_names(self.module)
        yield a, self._whole_a
        yield b, self._whole_b

    @torch.no_grad()
    def _whole_a(self) -> Tensor:
        own = gathered(torch.stack(list(self.A)), 2, self.groups.expt_tp)
        return gathered(own, 0, self.groups.ep).flatten(0, 1)

    @torch.no_grad()
    def _whole_b(self) -> Tensor:
        own = gathered(torch.stack(list(self.B)), 2, self.groups.expt_tp)
        return gathered(own, 0, self.groups.ep).permute(1, 2, 3, 0).flatten(2).flatten(0, 1)

    def sharded_state_dict(self, prefix: str) -> dict[str, ShardedTensor]:
        """What a checkpoint holds of it, for any layout. `prefix`: of its name in the model."""
        tp, states = self.groups.expt_tp, {}
        for letter, name in zip("AB", matrix_names(self.module), strict=True):
            for own, matrix in enumerate(getattr(self, letter)):
                states[f"{prefix}{letter}.{own}"] = ShardedTensor.from_rank_offsets(
                    name,
                    matrix,
                    (0, self.first + own, self.fused.experts),
                    (2, tp.rank(), tp.size()),  # with the axis of experts before its own
                    replica_id=(0, 0, self.groups.expt_dp.rank()),
                    prepend_axis_num=1,
                )
        return states


def experts_adapter(
    module: str,
    fused: FusedWeight,
    settings: Adapter,
    groups: ProcessGroupCollection,
    whole: Callable[[str], Tensor],
    dtype: torch.dtype,
) -> ExpertsAdapter:
    """Make one, with this rank's part of A and B.

    Args:
        module: as in `peft.adapted_experts`.
        whole: gives the tensor of that name in PEFT.
    """
    a, b = (whole(name) for name in matrix_names(module))
    tp, count = groups.expt_tp, fused.experts // groups.ep.size()
    own = slice(groups.ep.rank() * count, (groups.ep.rank() + 1) * count)
    of_each_a = a.unflatten(0, (fused.experts, settings.rank))[own]
    of_each_b = b.unflatten(1, (settings.rank, fused.experts)).permute(2, 0, 1)[own]
    of_each_b = of_each_b.unflatten(1, (len(fused.parts), fused.rows))

    def parameters(matrices: Tensor) -> list[Parameter]:
        mine = matrices.chunk(tp.size(), 2)[tp.rank()]
        device = torch.cuda.current_device()
        return [Parameter(m.to(device, dtype, copy=True).contiguous()) for m in mine]

    return ExpertsAdapter(
        module, fused, parameters(of_each_a), parameters(of_each_b), settings, groups
    )
