"""The columns of the vocabulary that a rank holds, and sums and maxima over those of all ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """The columns of the vocabulary that this rank holds, and how ranks put theirs together."""

    first: int  # id of the first column
    rows: int  # of the output weight on this rank, as on every other
    columns: int  # real ones: padding lies behind them and is never computed
    group: dist.ProcessGroup | None  # None: this rank holds all columns

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    def gather(self, own: Tensor) -> Tensor:
        """[...] of every rank -> [ranks, ...]"""
        if self.group is None:
            return own[None]
        ranks = dist.get_world_size(self.group)
        every = own.new_empty(ranks * len(own), *own.shape[1:])
        dist.all_gather_into_tensor(every, own.contiguous(), group=self.group)
        return every.view(ranks, *own.shape)

    def total(self, *sums: Tensor) -> tuple[Tensor, ...]:
        """Sums over this rank's columns -> sums over the vocabulary."""
        if self.group is None:
            return sums
        stacked = torch.stack(sums)
        dist.all_reduce(stacked, group=self.group)
        return stacked.unbind()

    def logsumexp(self, logits: Tensor) -> Tensor:
        """[n, v] on this shard -> [n] over the vocabulary."""
        return self.gather(logits.logsumexp(-1)).logsumexp(0)


def own_shard(rows: int, vocab_size: int, group: dist.ProcessGroup | None) -> VocabShard:
    """Shard of this rank of `group`, where each has `rows` rows of the output weight."""
    if group is not None and dist.get_world_size(group) == 1:
        group = None
    first = 0 if group is None else dist.get_rank(group) * rows
    held = rows * (1 if group is None else dist.get_world_size(group))
    assert held >= vocab_size, f"{held} output rows for a vocabulary of {vocab_size}"
    return VocabShard(first, rows, min(max(vocab_size - first, 0), rows), group)


def log_softmax(logits: list[Tensor], shard: VocabShard) -> tuple[list[Tensor], Tensor]:
    """Log-probabilities [n, v] on this shard, and whether the last model's most likely id is the
    first one's too [n].

    A shard's own log-softmax is shifted to the whole vocabulary's: with m the largest logit and
    c = log sum exp(z - m), of this shard and of all, it is (m' - m) + (c' - c). Differences of
    maxima stay exact where log-normalisers of large logits would be rounded.
    """
    log_probs = [torch.log_softmax(z, -1) for z in logits]
    if shard.group is None:
        first, last = log_probs[0], log_probs[-1]
        best = last.argmax(-1, keepdim=True)
        return log_probs, first.gather(-1, best)[:, 0] == first.amax(-1)
    peaks = []  # of each model: m, c and the id of the largest logit, exact in fp32 up to 2^24
    for z, p in zip(logits, log_probs, strict=True):
        if shard.columns:
            best = z.argmax(-1, keepdim=True)
            rows = (z.gather(-1, best), -p.gather(-1, best), (best + shard.first).to(z.dtype))
        else:  # nothing but padding here
            nothing, zero = z.new_full((z.shape[0], 1), -math.inf), z.new_zeros(z.shape[0], 1)
            rows = (nothing, zero, zero)
        peaks.append(torch.cat(rows, -1))
    maxima, normalisers, ids = shard.gather(torch.stack(peaks)).unbind(-1)  # [ranks, models, n]
    maximum, winner = maxima.max(0, keepdim=True)
    shifts = maxima - maximum + normalisers
    normaliser = shifts.logsumexp(0)
    for p, shift in zip(log_probs, shifts[shard.rank] - normaliser, strict=True):
        p.add_(shift[:, None])
    top = ids.gather(0, winner)[0]
    return log_probs, top[0] == top[-1]


def pick(values: Tensor, ids: Tensor, shard: VocabShard) -> Tensor:
    """[n, k]: the values [n, v] at each row's ids [n, k], zero where another rank holds them."""
    if not shard.columns:
        return values.new_zeros(ids.shape)
    columns, own = _columns(ids, shard)
    return torch.where(own, values.gather(-1, columns), 0)


def at_labels(values: Tensor, labels: Tensor, shard: VocabShard) -> Tensor:
    """[n]: the value [n, v] at each row's label [n], zero where another rank holds it."""
    return pick(values, labels[:, None], shard)[:, 0]


def add(values: Tensor, ids: Tensor, terms: Tensor, shard: VocabShard) -> Tensor:
    """Add terms [n, k] to the values [n, v] at each row's distinct ids, in place."""
    if not shard.columns:
        return values
    columns, own = _columns(ids, shard)
    return values.scatter_add_(-1, columns, torch.where(own, terms, 0))


def without(logits: Tensor, ids: Tensor, shard: VocabShard) -> Tensor:
    """[n, v]: a copy in which each row's ids [n, k] are -inf."""
    if not shard.columns:
        return logits
    columns, own = _columns(ids, shard)
    # A column that stands for an id of another rank may also be one to remove.
    limits = logits.new_full(ids.shape, math.inf).masked_fill_(own, -math.inf)
    return logits.scatter_reduce(-1, columns, limits, "amin")


def _columns(ids: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """This rank's columns of ids, any column where it has none; and where it has one."""
    local = ids - shard.first
    return local.clamp(0, shard.columns - 1), (local >= 0) & (local < shard.columns)
