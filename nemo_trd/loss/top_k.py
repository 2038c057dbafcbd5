"""Divergences on the teacher's k most likely tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_trd.config.schema import Loss
from nemo_trd.loss.formulas import Compared, closed_form
from nemo_trd.loss.vocab_shard import VocabShard, add, pick, without


@dataclass(frozen=True)
class TopK:
    """A teacher of which only the k most likely ids at each of n labels are known.

    Natural log-probabilities at temperature 1, over the teacher's whole vocabulary.
    """

    ids: Tensor  # int64 [n, k], distinct, most likely first
    log_probs: Tensor  # fp32 [n, k]
    label_log_probs: Tensor  # fp32 [n]

    def __getitem__(self, rows: slice | Tensor) -> TopK:
        return TopK(self.ids[rows], self.log_probs[rows], self.label_log_probs[rows])

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All of it."""
        return self.ids, self.log_probs, self.label_log_probs

    def moved(self, move: Callable[[Tensor], Tensor]) -> TopK:
        """The same with every tensor moved to another place."""
        return TopK(move(self.ids), move(self.log_probs), move(self.label_log_probs))

    def log_tail(self) -> Tensor:
        """[n]: log-probability of all other ids together.

        What the k fp32 log-probabilities leave of 1. Their rounding is of the size of the least
        tail that is told apart; below it a bucket would have no probability at all, and a
        student's there an infinite divergence.
        """
        tail = 1 - self.log_probs.double().exp().sum(-1)
        return tail.clamp(min=torch.finfo(torch.float32).eps).log()


def on_top_k(z_s: Tensor, z_t: Tensor, loss: Loss, shard: VocabShard) -> tuple[Compared, Tensor]:
    """The divergence of two smaller distributions: over the teacher's k most likely ids, and,
    with `top_k_tail: bucket`, one category more that holds all other ids.

    Returns: the divergence, and the teacher's probability outside its top k [n].
    """
    assert loss.top_k is not None
    ids, top_t = most_likely(z_t, loss.top_k, shard)
    tail_t = shard.logsumexp(without(z_t, ids, shard))
    return on_support(z_s, ids, top_t, tail_t, loss, shard)


def on_support(
    z_s: Tensor, ids: Tensor, top_t: Tensor, tail_t: Tensor, loss: Loss, shard: VocabShard
) -> tuple[Compared, Tensor]:
    """As `on_top_k`, over ids [n, k] of which the teacher's logits [n, k] are given, and the
    log-sum-exp of its logits at all other ids [n]; both up to a constant of each row.

    A category is a sum of probabilities, so the bucket only loses information: what comes out is
    a lower bound of the full divergence. Its log-mass is a log-sum-exp over the other ids and not
    log(1 - rest), which is exact however little is left.
    """
    k = ids.shape[-1]
    (top_s,) = shard.total(pick(z_s, ids, shard))
    tail_mass = torch.sigmoid(tail_t - top_t.logsumexp(-1))
    bucket = loss.top_k_tail == "bucket"
    if bucket:
        others_s = without(z_s, ids, shard)
        tail_s = shard.logsumexp(others_s)[:, None]
        top_s, top_t = torch.cat([top_s, tail_s], -1), torch.cat([top_t, tail_t[:, None]], -1)
    log_s, log_t = torch.log_softmax(top_s, -1), torch.log_softmax(top_t, -1)
    of_support = closed_form(loss)(log_s, log_t, log_s.exp(), log_t.exp(), lambda *sums: sums)
    d_top = of_support.gradient

    # d tail_s / d z is the student's distribution inside the bucket, zero on the top k.
    gradient = (others_s - tail_s).exp_().mul_(d_top[:, -1:]) if bucket else torch.zeros_like(z_s)
    return of_support._replace(gradient=add(gradient, ids, d_top[:, :k], shard)), tail_mass


def most_likely(z: Tensor, k: int, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """The ids [n, k] of the largest entries over the vocabulary, equal ones by id, and those."""
    held = min(k, shard.columns)
    columns = _largest(z, held)
    # Ids are exact in fp32 up to 2^24.
    own = torch.stack([z.gather(-1, columns), (columns + shard.first).to(z.dtype)])
    padded = F.pad(own, (0, k - held), value=-math.inf)
    candidates = torch.cat(shard.gather(padded).unbind(), -1)  # [2, n, ranks * k]
    # Candidates lie in the order of their ids wherever logits are equal.
    best = candidates[0].sort(dim=-1, descending=True, stable=True).indices[:, :k]
    top, ids = candidates.gather(-1, best.expand(2, -1, -1))
    return ids.long(), top


def _largest(z: Tensor, k: int) -> Tensor:
    """[n, v] -> [n, k] columns of the largest entries, largest first, equal ones by column.

    `torch.topk` leaves open which of several equal entries it takes, and equal logits are common
    in half precision: the support would depend on the sharding.
    """
    if k == 0:
        return torch.zeros(z.shape[0], 0, dtype=torch.int64, device=z.device)
    values, columns = z.topk(k)
    least = values[:, -1:]
    by_column = torch.arange(z.shape[-1], 0, -1, dtype=z.dtype, device=z.device)
    tied = torch.where(z == least, by_column, 0).topk(k).indices
    place, above = torch.arange(k, device=z.device), (values > least).sum(-1, keepdim=True)
    columns = torch.where(place < above, columns, tied.gather(-1, (place - above).clamp(min=0)))
    columns = columns.sort(-1).values
    order = z.gather(-1, columns).sort(dim=-1, descending=True, stable=True).indices
    return columns.gather(-1, order)
