"""Weights between Hugging Face safetensors and Megatron's tensor and pipeline parallel shards.

Both directions use one description: `_parts` shows where each Hugging Face tensor, or this rank's
slice of it, lies inside Megatron's parameters. Loading copies into those views, exporting
gathers them, so a round trip is exact.

Megatron's layouts: the rows of linear_qkv are, for each group of query heads that share a key,
the queries, the key, the value; linear_fc1 holds this rank's rows of gate_proj, then of up_proj;
the vocabulary is padded with rows that are zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig

from nemo_trd.config.errors import rule_broken
from nemo_trd.megatron.model import HiddenStatesModel
from nemo_trd.models.directory import check_weights
from nemo_trd.models.family import expected_shapes, padded_vocab_size

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# Megatron's names below decoder.layers.N, for TransformerEngine's layers and for the local ones.
LAYER_NAMES = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
# The axis along which tensor parallelism splits a Hugging Face tensor. Norms are not split.
SPLIT_AXIS = {
    "embed_tokens": 0,
    "lm_head": 0,
    "q_proj": 0,
    "k_proj": 0,
    "v_proj": 0,
    "gate_proj": 0,
    "up_proj": 0,
    "o_proj": 1,
    "down_proj": 1,
}


@dataclass(frozen=True)
class _Part:
    """A Hugging Face tensor, or this rank's slice of it, inside a Megatron parameter."""

    name: str
    view: Tensor  # into the parameter; the slice, perhaps with its first axis unfolded
    full_shape: tuple[int, ...]

    @property
    def axis(self) -> int | None:
        return SPLIT_AXIS.get(self.name.split(".")[-2])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of this rank's slice, padding included."""
        shape = list(self.full_shape)
        if self.axis is not None:
            others = math.prod(shape) // shape[self.axis]
            shape[self.axis] = self.view.numel() // others
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
        ConfigError: files that `hf_directory.check_weights` refuses, or a tied model whose
            lm_head is not its embedding.
    """
    reader = _Reader(path, hf)
    with torch.no_grad():
        for model in models:
            for part in _parts(model, hf):
                reader.read_into(part, groups.tp.rank())
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
    name = EMBEDDING if hf.tie_word_embeddings else HEAD
    reader.read_into(_Part(name, weight, expected_shapes(hf)[name]), tp_rank)
    return weight


def export_hf_weights(
    models: Sequence[HiddenStatesModel], hf: PretrainedConfig, groups: ProcessGroupCollection
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model in full, under its Hugging Face name, one at a time.

    Collective over the tensor and pipeline parallel groups: each rank consumes the iterator to
    its end and gets every tensor, on the model's device in the model's dtype. Tied models have no
    lm_head.
    """
    own = {part.name: part for model in reversed(models) for part in _parts(model, hf)}
    holdings: list[list[str]] = [[] for _ in range(groups.pp.size())]
    dist.all_gather_object(holdings, list(own), group=groups.pp)
    config = models[0].config
    device = next(models[0].parameters()).device
    for name, shape in expected_shapes(hf).items():
        # The embedding of a tied model is on the first stage and, as a copy, on the last.
        owner = next(stage for stage, names in enumerate(holdings) if name in names)
        if owner == groups.pp.rank():
            tensor = _gather(own[name], groups.tp)
        else:
            tensor = torch.empty(shape, dtype=config.params_dtype, device=device)
        if groups.pp.size() > 1:
            dist.broadcast(tensor, group=groups.pp, group_src=owner)
        yield name, tensor


def _gather(part: _Part, group: dist.ProcessGroup) -> Tensor:
    own = part.view.detach().reshape(part.shape).contiguous()
    if part.axis is None:
        return own.clone()
    slices = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(slices, own, group=group)
    full = torch.cat(slices, dim=part.axis)
    return full.narrow(part.axis, 0, part.full_shape[part.axis]).contiguous()


class _Reader:
    """Reads slices of the tensors of one directory; keeps its files open (memory mapped)."""

    def __init__(self, path: str, hf: PretrainedConfig) -> None:
        self._hf = hf
        self._stored = check_weights(Path(path), hf, "weights")
        self._open: dict[str, Any] = {}

    def slice(self, name: str, axis: int | None, start: int, stop: int) -> Tensor:
        file = str(self._stored[name].file)
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt", device="cpu")
        whole = self._open[file].get_slice(name)
        if axis is None:
            return whole[:]
        return whole[start:stop] if axis == 0 else whole[:, start:stop]

    def read_into(self, part: _Part, rank: int) -> None:
        """Fill `part.view`; rows beyond the end of the tensor, padding, become zero."""
        if part.axis is None:
            part.view.copy_(self.slice(part.name, None, 0, 0))
            return
        width, size = part.shape[part.axis], part.full_shape[part.axis]
        start, stop = (min(edge, size) for edge in (rank * width, (rank + 1) * width))
        if stop - start == width:
            part.view.copy_(self.slice(part.name, part.axis, start, stop).reshape(part.view.shape))
            return
        part.view.zero_()
        if stop > start:
            part.view[: stop - start].copy_(self.slice(part.name, part.axis, start, stop))

    def check_tied(self, rank: int, size: int) -> None:
        """A tied model may carry a lm_head: it must be the embedding. Compares this rank's rows.

        Raises:
            ConfigError: it is not.
        """
        if not self._hf.tie_word_embeddings or HEAD not in self._stored:
            return
        rows = -(-self._hf.vocab_size // size)
        edges = (rank * rows, min((rank + 1) * rows, self._hf.vocab_size))
        if edges[0] < edges[1] and not torch.equal(
            self.slice(HEAD, 0, *edges), self.slice(EMBEDDING, 0, *edges)
        ):
            raise rule_broken(
                "weights",
                str(self._stored[HEAD].file),
                f"{HEAD} differs from {EMBEDDING}, but config.json sets tie_word_embeddings",
                "set tie_word_embeddings to false there",
            )


def _parts(model: HiddenStatesModel, hf: PretrainedConfig) -> Iterator[_Part]:
    """Where the tensors that `model` holds lie in its parameters."""
    shapes = expected_shapes(hf)
    for name, parameter in model.named_parameters():
        for hf_name, view in _views(name, parameter.data, model, hf):
            yield _Part(hf_name, view, shapes[hf_name])


def _views(
    name: str, weight: Tensor, model: HiddenStatesModel, hf: PretrainedConfig
) -> list[tuple[str, Tensor]]:
    if name == "embedding.word_embeddings.weight":
        return [(EMBEDDING, weight)]
    if name == "output_layer.weight":
        return [(EMBEDDING if hf.tie_word_embeddings else HEAD, weight)]
    if name == "decoder.final_layernorm.weight":
        return [("model.norm.weight", weight)]
    _, _, index, rest = name.split(".", 3)
    layer = model.decoder.layers[int(index)].layer_number - 1
    prefix = f"model.layers.{layer}."
    kind = rest.rsplit(".", 1)[-1]
    if rest in ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"):
        config = model.config
        queries = config.num_attention_heads // config.num_query_groups
        # [groups, queries + key + value, head_dim, ...]
        grouped = weight.view(-1, queries + 2, config.kv_channels, *weight.shape[1:])
        q, k, v = grouped.split([queries, 1, 1], dim=1)
        return [
            (f"{prefix}self_attn.q_proj.{kind}", q),
            (f"{prefix}self_attn.k_proj.{kind}", k),
            (f"{prefix}self_attn.v_proj.{kind}", v),
        ]
    if rest == "mlp.linear_fc1.weight":
        gate, up = weight.chunk(2)
        return [(f"{prefix}mlp.gate_proj.weight", gate), (f"{prefix}mlp.up_proj.weight", up)]
    return [(prefix + LAYER_NAMES[rest], weight)]
