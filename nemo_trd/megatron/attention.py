"""Attention of the local layers over packed sequences, and the rotary angles of their tokens.

A pack is one row of segments, one behind the other; a token attends to those of its own segment up
to itself. TransformerEngine's kernels read the borders of segments on the device. The local layers
know them as numbers of the host, so nothing is read back, and there is no mask of a whole pack.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_trd.data.types import ContextBatch
from nemo_trd.distributed.process import to_device


@dataclass
class Segments(PackedSeqParams):
    """The segments of a pack as the local layers take them: [t, 1, ...], one sequence to Megatron.

    Told of packed sequences, its own rotary embedding would read the borders back from the device
    in every layer.
    """

    lengths: tuple[int, ...] = ()  # tokens of each segment, t in all
    position_ids: Tensor | None = None  # [t] on the device: place of each token in its segment


def segments(batch: ContextBatch, config: TransformerConfig) -> PackedSeqParams:
    """Say to the layers of a model with these settings where the sequences of a pack begin."""
    longest = max(batch.lengths)
    if config.transformer_impl == "local":
        positions = to_device(batch.position_ids[0])
        return Segments(qkv_format="sbhd", lengths=batch.lengths, position_ids=positions)
    borders = to_device(batch.cu_seqlens)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


class SegmentAttention(torch.nn.Module):
    """Core attention of the local layers, causal within each segment.

    Keys and values may have fewer heads than queries: each serves a group of them. One call
    for neighbours of equal length, and micro-batches have the longest first: gathering all equal
    ones from where they are costs more than their common call saves, unless most are equal
    (benchmarks/packing.py has that too).
    """

    def __init__(self, config: TransformerConfig, *args: Any, **unused: Any) -> None:
        super().__init__()
        assert config.softmax_scale is None and not config.attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: Segments,
        **unused: Any,
    ) -> Tensor:
        """[t, 1, heads, d] -> [t, 1, heads * d]."""
        runs = [(n, len(list(same))) for n, same in groupby(packed_seq_params.lengths)]
        lengths, sizes = [n for n, _ in runs], [n * count for n, count in runs]
        q, k, v = (x[:, 0].split(sizes) for x in (query, key, value))
        parts = zip(q, k, v, lengths, strict=True)
        return torch.cat([_attend(*part) for part in parts])[:, None]


def _attend(query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
    """Causal attention within segments of one length: [n, heads, d] -> [n, heads * d]."""
    q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (query, key, value))
    result = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return result.transpose(1, 2).flatten(2).flatten(0, 1)


class RotaryAngles(torch.nn.Module):
    """The local layers' rotary embedding: angles of the positions that the tokens of a pack have.

    It stands where megatron-core has one that counts positions from 0 to the longest sequence, and
    has the two methods by which a model asks that one.
    """

    def __init__(self, inverse_frequencies: Tensor) -> None:
        super().__init__()
        self._inverse_frequencies = inverse_frequencies

    def get_rotary_seq_len(
        self, context: Any, block: Any, hidden: Any, config: Any, pack: Segments
    ) -> Tensor:
        """Return what `forward` is to get: positions [t] instead of a length."""
        assert pack.position_ids is not None
        return pack.position_ids

    def forward(self, positions: Tensor, **unused: Any) -> Tensor:
        """Angles [t, 1, 1, d] in radians, of the first half of a head and again of the second."""
        half = torch.outer(positions.float(), self._inverse_frequencies)
        return torch.cat([half, half], -1)[:, None, None]
