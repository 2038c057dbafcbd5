"""Attention of the local layers over packed sequences, and the rotation of queries and keys.

A pack is one row of segments, one behind the other; a token attends to those of its own segment up
to itself. TransformerEngine's kernels read the borders of segments on the device. The local layers
know them as numbers of the host, so nothing is read back, and there is no mask of a whole pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_trd.data.types import ContextBatch
from nemo_trd.distributed.process import device, to_device
from nemo_trd.megatron.context_parallel import GatherTokens, places_of_rank
from nemo_trd.megatron.load_balancing import PackBalance

# Products of a query's and a key's element that take as long as one more call of attention, forward
# and backward (measured on a CPU with benchmarks/packing.py).
CALL_COST = 50_000
BLOCK = 256  # queries that share a mask where context parallel ranks attend to what comes before


class Attend(Protocol):
    """Causal attention within the segments of a pack."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """[t, heads, d] -> [t, heads * d]. A `scale` of None is 1 / sqrt(d)."""
        ...


@dataclass
class Pack(PackedSeqParams):
    """What all layers get with the tokens of a pack.

    balance: what routers need of it where they balance the load of experts.
    """

    balance: PackBalance | None = None


@dataclass
class Segments(Pack):
    """The segments of a pack as the local layers take them: [t, 1, ...], one sequence to Megatron.

    Told of packed sequences, megatron-core would read the borders back from the device in every
    layer.
    """

    position_ids: Tensor | None = None  # of this rank's tokens, on the device
    attend: Attend | None = None
    _rotation: tuple[Tensor, Tensor] | None = None

    def rotation(self, inverse_frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [t, 1, d] for `rotated`, computed once for all layers of a model."""
        if self._rotation is None:
            assert self.position_ids is not None
            angles = torch.outer(self.position_ids.float(), inverse_frequencies)
            cos, sin = angles.cos(), angles.sin()
            halves = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
            self._rotation = halves[0].to(dtype)[:, None], halves[1].to(dtype)[:, None]
        return self._rotation


def segments(batch: ContextBatch, config: TransformerConfig, cp: dist.ProcessGroup) -> Pack:
    """Say to the layers of a model with these settings where the sequences of a pack begin.

    Args:
        batch: this rank's part of the pack.
        cp: the model's context parallel group.
    """
    if config.transformer_impl == "local":
        width = config.num_attention_heads * config.kv_channels
        attend = (
            WithinSegments(
                batch.lengths, batch.cu_seqlens, width // config.tensor_model_parallel_size
            )
            if cp.size() == 1
            else OverRanks(batch.lengths, cp, config.params_dtype)
        )
        position_ids = to_device(batch.position_ids[0])
        return Segments(qkv_format="sbhd", position_ids=position_ids, attend=attend)
    longest, borders = max(batch.lengths), to_device(batch.cu_seqlens)
    return Pack(
        qkv_format="thd",
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


class SegmentAttention(torch.nn.Module):
    """Core attention of the local layers: rotates queries and keys, and attends within segments.

    Keys and values may have fewer heads than queries: each serves a group of them.

    Args:
        inverse_frequencies: of the rotation, fp32 [d / 2].
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        inverse_frequencies: Tensor,
        **unused: Any,
    ) -> None:
        super().__init__()
        self._inverse_frequencies = inverse_frequencies
        self._scale = config.softmax_scale
        assert not config.attention_dropout

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
        pack = packed_seq_params
        assert pack.attend is not None
        cos, sin = pack.rotation(self._inverse_frequencies, query.dtype)
        q, k = (rotated(x[:, 0], cos, sin) for x in (query, key))
        return pack.attend(q, k, value[:, 0], self._scale)[:, None]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate element i of each head with i + d / 2, by the angle at its token: [t, heads, d].

    Args:
        cos: [t, 1, d], the angles twice.
        sin: the same, negative in the first half.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class WithinSegments:
    """Attention within segments that this rank holds whole.

    Neighbours of similar length share a call: behind their last tokens, where none of their tokens
    looks, they are filled up to the longest of them. Micro-batches have the longest first.

    Args:
        lengths: tokens of each segment.
        borders: of the segments in the pack, int [s + 1], on the host.
        width: elements of a token's queries on this rank.
    """

    def __init__(self, lengths: Sequence[int], borders: Tensor, width: int) -> None:
        self._calls = shared_calls(lengths, CALL_COST // width)
        tokens, filled = sum(lengths), sum(count * length for count, length in self._calls)
        # Which token stands at each place of the filled row, and at which each token stands.
        self._tokens = self._places = None
        if filled > tokens:
            own = borders.diff().long()
            longest = torch.cat([torch.full((count,), length) for count, length in self._calls])
            starts, filled_starts = own.cumsum(0) - own, longest.cumsum(0) - longest
            places = torch.arange(tokens) + (filled_starts - starts).repeat_interleave(own)
            offsets = torch.arange(filled) - filled_starts.repeat_interleave(longest)
            offsets = offsets.minimum((own - 1).repeat_interleave(longest))  # the last, repeated
            index = starts.repeat_interleave(longest) + offsets
            self._tokens, self._places = to_device(index), to_device(places)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        if self._tokens is None:
            return self._attend(query, key, value, scale)
        q, k, v = (_Filled.apply(x, self._tokens, self._places) for x in (query, key, value))
        return _Unfilled.apply(self._attend(q, k, v, scale), self._places)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        sizes = [count * length for count, length in self._calls]
        parts = zip(*(x.split(sizes) for x in (query, key, value)), self._calls, strict=True)
        results = []
        for q, k, v, (count, _) in parts:
            rows = [x.unflatten(0, (count, -1)) for x in (q, k, v)]
            results.append(attention(rows[0], rows[1], rows[2], scale=scale).flatten(0, 1))
        return torch.cat(results)


def shared_calls(lengths: Sequence[int], worth: int) -> list[tuple[int, int]]:
    """Divide segments, in their order, among calls of attention that fill them up to the longest.

    Args:
        lengths: tokens of each segment.
        worth: filling that costs as much as one more call, in scores of one query and key.

    Returns: number of segments of each call, and tokens of its longest.
    """
    calls: list[tuple[int, int]] = []
    for length in lengths:
        count, longest = calls[-1] if calls else (0, 0)
        together = max(longest, length)
        apart = count * longest**2 + length**2
        if calls and (count + 1) * together**2 - apart <= worth:
            calls[-1] = (count + 1, together)
        else:
            calls.append((1, length))
    return calls


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None,
    mask: Tensor | None = None,
) -> Tensor:
    """[b, n, heads, d] -> [b, n, heads * d], causal where there is no mask to add to the scores."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    result = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )
    return result.transpose(1, 2).flatten(2)


class _Filled(torch.autograd.Function):
    """Segments filled up with repetitions of a token, of which nothing depends."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.places = places
        return x.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, ctx.places), None, None


class _Unfilled(torch.autograd.Function):
    """The inverse: without what segments have been filled up with."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.places, ctx.shape = places, x.shape
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.new_zeros(ctx.shape).index_copy_(0, ctx.places, gradient), None


class OverRanks:
    """Attention of this rank's two parts of each segment to all that comes before them.

    Context parallel ranks gather the keys and values of whole sequences. `BLOCK` queries at a time
    attend: one mask of so many rows serves all of them, each in a window of its own.

    Args:
        lengths: tokens of each segment, on all ranks together.
        group: the context parallel ranks.
        dtype: of queries, keys and values.
    """

    def __init__(
        self, lengths: Sequence[int], group: dist.ProcessGroup, dtype: torch.dtype
    ) -> None:
        size, rank = group.size(), group.rank()
        self._group, self._lengths = group, list(lengths)
        parts = [length // (2 * size) for length in lengths]
        # For each part: its tokens, and how many first tokens of the segment the last of them sees.
        self._parts = [[(n, n * end) for end in (rank + 1, 2 * size - rank)] for n in parts]
        # Where in the pack the tokens of rank 0 are, rank 1's, ..., and the inverse.
        places = torch.cat([places_of_rank(tuple(lengths), size, other) for other in range(size)])
        self._places, self._order = to_device(places), to_device(places.argsort())
        rows, longest = min(BLOCK, max(parts)), max(lengths)
        mask = torch.full((rows, longest + rows), -torch.inf, dtype=dtype, device=device())
        self._mask = mask.triu(longest + 1)  # row i sees the columns up to longest + i

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        keys, values = (
            GatherTokens.apply(x, self._places, self._order, self._group).split(self._lengths)
            for x in (key, value)
        )
        queries = iter(query.split([n for parts in self._parts for n, _ in parts]))
        results = []
        for parts, k, v in zip(self._parts, keys, values, strict=True):
            for n, end in parts:
                seen = end - n
                for q in next(queries).split(len(self._mask)):
                    seen += len(q)
                    mask = self._window(len(q), seen)
                    before = k[None, :seen], v[None, :seen]
                    results.append(attention(q[None], *before, scale=scale, mask=mask))
        return torch.cat(results, 1)[0]

    def _window(self, n: int, seen: int) -> Tensor:
        """Mask [n, seen] of the queries of which the last sees all of these keys."""
        first = self._mask.shape[1] - len(self._mask) - (seen - n)
        return self._mask[:n, first : first + seen]
