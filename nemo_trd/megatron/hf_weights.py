"""Weights between Hugging Face safetensors and Megatron's tensor and pipeline parallel shards.

Both directions use one description: `_parts` shows where each Hugging Face tensor, or this rank's
slice of it, lies inside Megatron's parameters. Loading copies into those views, exporting gathers
them, so a round trip is exact. The names of both sides are in `models.family.Family`.

Megatron's layouts: each rank has some of the experts of a layer, one behind the other. The rows of
linear_qkv are, for each group of query heads that share a key, the queries, the key, the value;
linear_fc1 holds this rank's rows of gate_proj, then of up_proj; the vocabulary is padded with rows
that are zero.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig

from nemo_trd.config.errors import rule_broken
from nemo_trd.megatron.model import HiddenStatesModel
from nemo_trd.models.directory import check_weights
from nemo_trd.models.family import (
    WeightTensor,
    expected_tensors,
    family_of,
    padded_vocab_size,
)

# What is added to a linear layer is below it under this name; model files know nothing of it.
ADAPTER = "adapter"
# Weights of an expert below its layer: of the local layers, and of TransformerEngine's.
_EXPERT = re.compile(
    r"mlp\.experts\.(?:local_experts\.(?P<local>\d+)\.(?P<layer>linear_fc[12])\.weight"
    r"|(?P<of_group>linear_fc[12])\.weight(?P<grouped>\d+))"
)
OwnPart = Callable[[], Tensor]  # gives this rank's slice of a tensor, whole where it is not split


@dataclass(frozen=True)
class _Part:
    """A Hugging Face tensor, or this rank's slice of it, inside a Megatron parameter."""

    name: str
    view: Tensor  # into the parameter; the slice, perhaps with its first axis unfolded
    whole: WeightTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of this rank's slice, padding included."""
        shape, axis = list(self.whole.shape), self.whole.split_axis
        if axis is not None:
            others = math.prod(shape) // shape[axis]
            shape[axis] = self.view.numel() // others
        return tuple(shape)


def load_hf_weights(
    models: Sequence[HiddenStatesModel],
    hf: PretrainedConfig,
    path: str,
    groups: ProcessGroupCollection,
) -> None:
    """Fill every parameter of `models` from the safetensors in `path`, converting to its dtype.

    Reads only this rank's slices. Not collective.

    Raises:
        ConfigError: files that `models.directory.check_weights` refuses, or a tied model
            whose output weight is not its embedding.
    """
    reader = _Reader(path, hf)
    with torch.no_grad():
        for model in models:
            for parameter, weight, parts in _parameters(model, hf, groups):
                for part in parts:
                    reader.read_into(part, _splitting(part.whole, groups).rank())
                if is_float8tensor(parameter):
                    parameter.copy_(weight)
    if any(model.post_process for model in models):
        reader.check_tied(groups.tp.rank(), groups.tp.size())


def read_output_weight(
    hf: PretrainedConfig,
    path: str,
    tp_rank: int,
    tp_size: int,
    dtype: torch.dtype,
    device: torch.device,
    rows: int | None = None,
) -> Tensor:
    """Rows of the output weight for one of `tp_size` ranks, [rows, h].

    `rows` is by default this model's own padded vocabulary / `tp_size`; a teacher's weight that
    is read beside a student's takes the student's.

    Raises:
        ConfigError: as `load_hf_weights`.
    """
    reader = _Reader(path, hf)
    reader.check_tied(tp_rank, tp_size)
    if rows is None:
        rows = padded_vocab_size(hf.vocab_size, tp_size) // tp_size
    weight = torch.empty(rows, hf.hidden_size, dtype=dtype, device=device)
    family = family_of(hf)
    name = family.embedding if hf.tie_word_embeddings else family.head
    reader.read_into(_Part(name, weight, expected_tensors(hf)[name]), tp_rank)
    return weight


def export_hf_weights(
    models: Sequence[HiddenStatesModel],
    hf: PretrainedConfig,
    groups: ProcessGroupCollection,
    added: Mapping[str, OwnPart] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model in full, under its Hugging Face name, one at a time.

    Collective over the tensor, expert and pipeline parallel groups: each rank consumes the iterator
    to its end and gets every tensor, on the model's device in the model's dtype. Tied models have
    no output weight of their own.

    Args:
        added: what is added to this rank's slices of some of them, by name. The model stays as it
            is.
    """
    added = added or {}
    own = {
        part.name: partial(_own_slice, part, added.get(part.name))
        for model in reversed(models)
        for part in _parts(model, hf, groups)
    }
    return whole_tensors(own, expected_tensors(hf), models[0], groups)


def _own_slice(part: _Part, added: OwnPart | None) -> Tensor:
    own = part.view.detach().reshape(part.shape)
    return own if added is None else (own + added()).to(own.dtype)


def whole_tensors(
    own: Mapping[str, OwnPart],
    tensors: Mapping[str, WeightTensor],
    model: HiddenStatesModel,
    groups: ProcessGroupCollection,
) -> Iterator[tuple[str, Tensor]]:
    """Every one of `tensors` in full on every rank, one at a time.

    Collective over the tensor, expert and pipeline parallel groups of `model`.

    Args:
        own: this rank's slices of those that it has: all of its stage but other ranks' experts.
    """
    # By layers: a rank has of the experts of its stage's layers only some.
    mine = {name if tensors[name].layer is None else tensors[name].layer for name in own}
    holdings: list[set[str | int | None]] = [set() for _ in range(groups.pp.size())]
    dist.all_gather_object(holdings, mine, group=groups.pp)
    device = next(model.parameters()).device
    for name, whole in tensors.items():
        # The embedding of a tied model is on the first stage and, as a copy, on the last.
        key = name if whole.layer is None else whole.layer
        stage = next(stage for stage, held in enumerate(holdings) if key in held)
        if stage == groups.pp.rank() and name in own:
            tensor = _gather(own[name](), whole, _splitting(whole, groups))
        else:
            tensor = torch.empty(whole.shape, dtype=model.config.params_dtype, device=device)
        if whole.expert is not None and stage == groups.pp.rank() and groups.ep.size() > 1:
            holder = whole.expert // (model.config.num_moe_experts // groups.ep.size())
            dist.broadcast(tensor, group=groups.ep, group_src=holder)
        if groups.pp.size() > 1:
            dist.broadcast(tensor, group=groups.pp, group_src=stage)
        yield name, tensor


def _splitting(whole: WeightTensor, groups: ProcessGroupCollection) -> dist.ProcessGroup:
    """The ranks over which a tensor is split."""
    return groups.tp if whole.expert is None else groups.expt_tp


def _gather(own: Tensor, whole: WeightTensor, group: dist.ProcessGroup) -> Tensor:
    axis = whole.split_axis
    if axis is None:
        return own.contiguous().clone()
    return gathered(own, axis, group).narrow(axis, 0, whole.shape[axis]).contiguous()


def gathered(own: Tensor, axis: int, group: dist.ProcessGroup) -> Tensor:
    """What the ranks of a group have, one behind the other along an axis. Collective."""
    own = own.contiguous()
    slices = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(slices, own, group=group)
    return torch.cat(slices, dim=axis)


class _Reader:
    """Reads slices of the tensors of one directory; keeps its files open (memory mapped)."""

    def __init__(self, path: str, hf: PretrainedConfig) -> None:
        self._hf = hf
        self._stored = check_weights(Path(path), hf, "weights")
        self._open: dict[str, Any] = {}

    def slice(self, name: str, axis: int | None, start: int, stop: int) -> Tensor:
        """Part [start, stop) of a tensor along `axis`; the whole where that is None."""
        file = str(self._stored[name].file)
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt", device="cpu")
        stored = self._stored[name]
        if stored.place is not None:
            rows, columns = stored.shape
            edges = [(0, rows), (0, columns)]
            if axis is not None:
                edges[axis] = (start, stop)
            (top, bottom), (left, right) = edges
            place = stored.place
            fused = self._open[file].get_slice(place.tensor)
            top, bottom = top + place.first_row, bottom + place.first_row
            return fused[place.expert : place.expert + 1, top:bottom, left:right][0]
        whole = self._open[file].get_slice(name)
        if axis is None:
            return whole[:]
        return whole[start:stop] if axis == 0 else whole[:, start:stop]

    def read_into(self, part: _Part, rank: int) -> None:
        """Fill `part.view`; rows beyond the end of the tensor, padding, become zero."""
        axis = part.whole.split_axis
        if axis is None:
            part.view.copy_(self.slice(part.name, None, 0, 0))
            return
        width, size = part.shape[axis], part.whole.shape[axis]
        start, stop = (min(edge, size) for edge in (rank * width, (rank + 1) * width))
        if stop - start == width:
            part.view.copy_(self.slice(part.name, axis, start, stop).reshape(part.view.shape))
            return
        part.view.zero_()
        if stop > start:
            part.view[: stop - start].copy_(self.slice(part.name, axis, start, stop))

    def check_tied(self, rank: int, size: int) -> None:
        """Refuse a tied model with an output weight that is not the embedding, in this rank's rows.

        Raises:
            ConfigError: it is not.
        """
        family = family_of(self._hf)
        if not self._hf.tie_word_embeddings or family.head not in self._stored:
            return
        rows = -(-self._hf.vocab_size // size)
        edges = (rank * rows, min((rank + 1) * rows, self._hf.vocab_size))
        if edges[0] < edges[1] and not torch.equal(
            self.slice(family.head, 0, *edges), self.slice(family.embedding, 0, *edges)
        ):
            raise rule_broken(
                "weights",
                str(self._stored[family.head].file),
                f"{family.head} differs from {family.embedding}, but config.json sets "
                "tie_word_embeddings",
                "set tie_word_embeddings to false there",
            )


def _parts(
    model: HiddenStatesModel, hf: PretrainedConfig, groups: ProcessGroupCollection
) -> Iterator[_Part]:
    """Where the tensors that `model` holds lie in its parameters."""
    for _, _, parts in _parameters(model, hf, groups):
        yield from parts


def _parameters(
    model: HiddenStatesModel, hf: PretrainedConfig, groups: ProcessGroupCollection
) -> Iterator[tuple[Tensor, Tensor, list[_Part]]]:
    """Each parameter of `model`, its values, and the Hugging Face tensors that lie in these.

    The values are the parameter's own; of one in FP8 they are for it to be rounded from.
    """
    family, tensors = family_of(hf), expected_tensors(hf)
    outer = family.outer_parameters(tied=bool(hf.tie_word_embeddings))
    inner = family.layer_parameters()
    for name, parameter in model.named_parameters():
        if f".{ADAPTER}." in name:
            continue
        weight = parameter.data
        if is_float8tensor(weight):
            weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        if name in outer:
            yield parameter, weight, [_Part(outer[name], weight, tensors[outer[name]])]
            continue
        _, _, index, rest = name.split(".", 3)  # decoder.layers.N
        layer = model.decoder.layers[int(index)].layer_number - 1
        expert = _EXPERT.fullmatch(rest)
        if expert is None:
            below = inner[rest]
        else:
            first = groups.ep.rank() * (model.config.num_moe_experts // groups.ep.size())
            number = first + int(expert["local"] or expert["grouped"])
            below = family.expert_parameters(number)[expert["layer"] or expert["of_group"]]
        names = [f"{family.layers}.{layer}.{tensor}" for tensor in below]
        views = _views(rest, weight, model.config)
        parts = [_Part(n, view, tensors[n]) for n, view in zip(names, views, strict=True)]
        yield parameter, weight, parts


def _views(parameter: str, weight: Tensor, config: TransformerConfig) -> Sequence[Tensor]:
    """The parts of a layer's parameter, in the order of `Family.layer_parameters`."""
    if parameter in ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"):
        queries = config.num_attention_heads // config.num_query_groups
        # [groups, queries + key + value, head_dim, ...]
        grouped = weight.view(-1, queries + 2, config.kv_channels, *weight.shape[1:])
        return grouped.split([queries, 1, 1], dim=1)
    if "linear_fc1.weight" in parameter or parameter == "mlp.linear_fc1.bias":
        return weight.chunk(2)
    return [weight]
