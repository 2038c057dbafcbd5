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
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_trd.data.types import ContextBatch
from nemo_trd.distributed.process import to_device
from nemo_trd.megatron.context_parallel import GatherTokens, places_of_rank


@dataclass
class Segments(PackedSeqParams):
    """The segments of a pack as the local layers take them: [t, 1, ...], one sequence to Megatron.

    Told of packed sequences, its own rotary embedding would read the borders back from the device
    in every layer.
    """

    lengths: tuple[int, ...] = ()  # tokens of each segment, on all context parallel ranks together
    # With context parallelism, for each of this rank's two parts of each segment: number of its
    # tokens, and how many first tokens of the segment the last of them sees.
    queries: tuple[tuple[tuple[int, int], ...], ...] = ()
    position_ids: Tensor | None = None  # of this rank's tokens, on the device
    # With context parallelism, on the device: places in the pack of rank 0's tokens, rank 1's, ...,
    # and the inverse.
    places: Tensor | None = None
    order: Tensor | None = None


def segments(
    batch: ContextBatch, config: TransformerConfig, cp: dist.ProcessGroup
) -> PackedSeqParams:
    """Say to the layers of a model with these settings where the sequences of a pack begin.

    Args:
        batch: this rank's part of the pack.
        cp: the model's context parallel group.
    """
    if config.transformer_impl == "local":
        return _local_segments(batch, cp.size(), cp.rank())
    longest, borders = max(batch.lengths), to_device(batch.cu_seqlens)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _local_segments(batch: ContextBatch, size: int, rank: int) -> Segments:
    pack = Segments(
        qkv_format="sbhd",
        lengths=batch.lengths,
        position_ids=to_device(batch.position_ids[0]),
    )
    if size > 1:
        parts = [length // (2 * size) for length in batch.lengths]
        ends = (rank + 1, 2 * size - rank)
        pack.queries = tuple(tuple((part, part * end) for end in ends) for part in parts)
        places = torch.cat([places_of_rank(batch.lengths, size, other) for other in range(size)])
        pack.places, pack.order = to_device(places), to_device(places.argsort())
    return pack


class SegmentAttention(torch.nn.Module):
    """Core attention of the local layers, causal within each segment.

    Keys and values may have fewer heads than queries: each serves a group of them. One call
    for neighbours of equal length, and micro-batches have the longest first: gathering all equal
    ones from where they are costs more than their common call saves, unless most are equal
    (benchmarks/packing.py has that too). Context parallel ranks gather the keys and values of whole
    sequences.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        pg_collection: ProcessGroupCollection,
        **unused: Any,
    ) -> None:
        super().__init__()
        self._cp = pg_collection.cp
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
        pack, q, k, v = packed_seq_params, query[:, 0], key[:, 0], value[:, 0]
        attend = _within_segments if pack.places is None else self._over_ranks
        return attend(q, k, v, pack)[:, None]

    def _over_ranks(self, query: Tensor, key: Tensor, value: Tensor, pack: Segments) -> Tensor:
        """Attention of this rank's two parts of each segment to all that comes before."""
        keys, values = (
            GatherTokens.apply(x, pack.places, pack.order, self._cp).split(pack.lengths)
            for x in (key, value)
        )
        queries = iter(query.split([n for parts in pack.queries for n, _ in parts]))
        of_parts = [
            _attend_as_last(next(queries), k[:seen], v[:seen])
            for parts, k, v in zip(pack.queries, keys, values, strict=True)
            for _, seen in parts
        ]
        return torch.cat(of_parts)


def _within_segments(query: Tensor, key: Tensor, value: Tensor, pack: Segments) -> Tensor:
    runs = [(n, len(list(same))) for n, same in groupby(pack.lengths)]
    lengths, sizes = [n for n, _ in runs], [n * count for n, count in runs]
    q, k, v = (x.split(sizes) for x in (query, key, value))
    return torch.cat([_attend(*run) for run in zip(q, k, v, lengths, strict=True)])


def _attend(query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
    """Causal attention within segments of one length: [n, heads, d] -> [n, heads * d]."""
    q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (query, key, value))
    result = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return result.transpose(1, 2).flatten(2).flatten(0, 1)


def _attend_as_last(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of the last tokens of a sequence: [n, heads, d] -> [n, heads * d]."""
    n, seen = len(query), len(key)
    mask = torch.ones(n, seen, dtype=torch.bool, device=query.device).tril(seen - n)
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    result = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    return result[0].transpose(0, 1).flatten(1)


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
