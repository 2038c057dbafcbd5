"""Per-token divergences between teacher and student along y, from hidden states.

Notation: s and t are student and teacher probabilities of one position over the real vocabulary,
both at `loss.temperature`; z are the student's tempered logits.

`divergence` never holds the logits of more than `loss.chunk_size` positions. Each divergence has
a closed-form gradient in z, so a chunk's contribution to the gradients of hidden states and
output weight is formed while its logits exist, in the forward pass; the backward pass only
multiplies by the upstream gradient. Peak memory is O(chunk_size * vocabulary / tp), whatever the
number of positions.

`dense_divergence` says the same in plain PyTorch on full logits, for tests and small uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nemo_trd.config import Loss, rule_broken

METRICS = (
    "divergence",  # what is trained on: after the clip
    "student_nll",  # of the labels
    "teacher_nll",
    "student_entropy",
    "teacher_entropy",
    "top1_agreement",  # positions where both have the same most likely token
    "clipped",  # positions beyond loss.token_clip
    "teacher_tail_mass",  # teacher probability outside its top k
)
# Bytes of logits that are worked on at once on a CPU, so that they stay in its caches.
CPU_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class DivergenceOutput:
    """What one call contributes; whoever calls divides by the global number of labels.

    loss_sum: scalar, sum over tokens, differentiable.
    count: number of tokens.
    metrics: sums over tokens, one scalar for each of `METRICS`, at the loss's temperature.
    token_divergence: [n], detached, before the clip: inf and NaN stay visible in it.
    """

    loss_sum: Tensor
    count: int
    metrics: dict[str, Tensor]
    token_divergence: Tensor


@dataclass(frozen=True)
class _Shard:
    """The columns of the vocabulary that this rank holds, and how ranks put theirs together."""

    first: int  # id of the first column
    columns: int  # real ones: padding lies behind them and is never computed
    group: dist.ProcessGroup | None  # None: this rank holds all columns

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    def gather(self, own: Tensor) -> Tensor:
        """[...] of every rank -> [ranks, ...]"""
        if self.group is None:
            return own[None]
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, own.contiguous(), group=self.group)
        return torch.stack(parts)

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


def _shard(rows: int, vocab_size: int, group: dist.ProcessGroup | None) -> _Shard:
    if group is not None and dist.get_world_size(group) == 1:
        group = None
    first = 0 if group is None else dist.get_rank(group) * rows
    held = rows * (1 if group is None else dist.get_world_size(group))
    assert held >= vocab_size, f"{held} output rows for a vocabulary of {vocab_size}"
    return _Shard(first, min(max(vocab_size - first, 0), rows), group)


def divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    loss: Loss,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
) -> DivergenceOutput:
    """Sum over tokens of the divergence that `loss` names, with its gradients.

    Collective over `group`: all its ranks pass the same n, hidden states and labels.

    Args:
        student_hidden: [n, Hs], final hidden states of the positions that predict `labels`. Its
            gradient is this rank's part: the caller sums it over `group`.
        student_weight: [V/tp, Hs], this rank's rows of the output layer; rows whose id is
            `vocab_size` or more are padding. Its gradient is summed in fp32.
        teacher_hidden: [n, Ht], of the same labels.
        teacher_weight: [V/tp, Ht], sharded like the student's.
        labels: int64 [n], token ids of y.
        vocab_size: number of real ids, at most V.
        group: the ranks over which the vocabulary is sharded; None: it is not.

    Raises:
        ValueError: a label outside the vocabulary.
    """
    if loss.top_k is not None and loss.top_k >= vocab_size:
        loss = loss.model_copy(update={"top_k": None})
    n = labels.numel()
    assert student_hidden.shape[0] == teacher_hidden.shape[0] == n
    shard = _shard(student_weight.shape[0], vocab_size, group)
    if shard.group is not None:
        assert student_weight.shape[0] == teacher_weight.shape[0], "shards differ"
    _check_labels(labels, vocab_size)
    loss_sum, statistics = _Divergence.apply(
        student_hidden,
        student_weight,
        teacher_hidden.detach(),
        teacher_weight.detach(),
        labels,
        loss,
        shard,
        torch.is_grad_enabled(),
    )
    sums = statistics.sum(-1)
    return DivergenceOutput(loss_sum, n, dict(zip(METRICS, sums, strict=False)), statistics[-1])


def _check_labels(labels: Tensor, vocab_size: int) -> None:
    outside = labels[(labels < 0) | (labels >= vocab_size)]
    if outside.numel():
        raise rule_broken(
            "labels",
            int(outside[0]),
            f"labels are ids of a vocabulary of {vocab_size}",
            "use the tokenizer that belongs to the models",
        )


class _Divergence(torch.autograd.Function):
    """Forms the gradients in the forward pass; the backward pass scales and releases them."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor,
        loss: Loss,
        shard: _Shard,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(student_weight.dtype, torch.float32)
        wants_hidden, wants_weight = (grad_enabled and need for need in ctx.needs_input_grad[:2])
        d_hidden = torch.zeros_like(student_hidden) if wants_hidden else None
        d_weight = torch.zeros_like(student_weight, dtype=exact) if wants_weight else None
        statistics = student_hidden.new_zeros(len(METRICS) + 1, labels.numel(), dtype=exact)

        # Padding is cut off here, once: no mask, no wasted work, no way for junk to come in.
        weight, other_weight = student_weight[: shard.columns], teacher_weight[: shard.columns]
        block = loss.chunk_size
        if not weight.is_cuda:
            row_bytes = student_weight.shape[0] * exact.itemsize  # the same on all ranks
            block = max(1, CPU_BLOCK_BYTES // row_bytes)
        longest = min(loss.chunk_size, labels.numel())
        student_buffer = weight.new_empty(longest, shard.columns)
        teacher_buffer = other_weight.new_empty(longest, shard.columns)
        for start in range(0, labels.numel(), loss.chunk_size):
            chunk = slice(start, start + loss.chunk_size)
            hidden = student_hidden[chunk].to(weight.dtype)
            other_hidden = teacher_hidden[chunk].to(other_weight.dtype)
            logits, others = student_buffer[: len(hidden)], teacher_buffer[: len(hidden)]
            torch.mm(hidden, weight.t(), out=logits)
            torch.mm(other_hidden, other_weight.t(), out=others)
            for i in range(0, len(hidden), block):
                rows = slice(i, i + block)
                statistics[:, chunk][:, rows] = _tokens(
                    logits[rows], others[rows], labels[chunk][rows], loss, shard
                )
            if d_hidden is not None:
                d_hidden[chunk] = logits @ weight
            if d_weight is not None:
                _add_outer(d_weight[: shard.columns], logits, hidden)
        ctx.gradients = d_hidden, d_weight
        ctx.weight_dtype = student_weight.dtype
        ctx.mark_non_differentiable(statistics)
        return statistics[0].sum(), statistics

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of a divergence are handed out once, by backward()")
        d_hidden, d_weight = ctx.gradients
        ctx.gradients = None
        if d_hidden is not None:
            d_hidden.mul_(upstream)
        if d_weight is not None:
            d_weight = d_weight.mul_(upstream).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None, None, None, None


def _add_outer(total: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """total [v, H] += d_logits^T [v, n] hidden [n, H], in the precision of `total`."""
    if total.dtype == hidden.dtype:
        total.addmm_(d_logits.t(), hidden)
    elif total.is_cuda:  # half-precision factors, fp32 sum; PyTorch has this on CUDA only
        torch.addmm(total, d_logits.t(), hidden, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(d_logits.t().to(total.dtype), hidden.to(total.dtype))


def _tokens(student: Tensor, teacher: Tensor, labels: Tensor, loss: Loss, shard: _Shard) -> Tensor:
    """Statistics of n positions; the gradient in the raw logits replaces `student`, in place.

    Args:
        student, teacher: [n, v] raw logits on this shard.
        labels: [n]

    Returns: [len(METRICS) + 1, n]; the last row is the divergence before the clip.
    """
    exact = torch.promote_types(student.dtype, torch.float32)
    z_s, z_t = student.to(exact), teacher.to(exact)
    if loss.temperature != 1:
        z_s, z_t = z_s / loss.temperature, z_t / loss.temperature
    (log_s, log_t), agreement = _log_softmax([z_s, z_t], shard)
    s, t = log_s.exp(), log_t.exp()
    product = s * log_s
    entropy_s = -product.sum(-1)
    entropy_t = -torch.mul(t, log_t, out=product).sum(-1)
    del product
    nll_s, nll_t, entropy_s, entropy_t = shard.total(
        -_pick(log_s, labels, shard), -_pick(log_t, labels, shard), entropy_s, entropy_t
    )
    if loss.top_k is None:
        value, gradient = _closed_form(loss)(log_s, log_t, s, t, shard.total)
        tail_mass = torch.zeros_like(value)
    else:
        value, gradient, tail_mass = _on_top_k(z_s, z_t, loss, shard)
    if loss.token_clip is None:
        clipped_value, clipped = value, torch.zeros_like(value)
    else:
        clipped_value, clipped = value.clamp(max=loss.token_clip), value > loss.token_clip
        gradient.mul_(~clipped[:, None])
    if loss.temperature != 1:
        gradient.div_(loss.temperature)
    student.copy_(gradient)
    rows = (clipped_value, nll_s, nll_t, entropy_s, entropy_t, agreement, clipped, tail_mass, value)
    return torch.stack([row.to(exact) for row in rows])


def _log_softmax(logits: list[Tensor], shard: _Shard) -> tuple[list[Tensor], Tensor]:
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


def _pick(log_probs: Tensor, ids: Tensor, shard: _Shard) -> Tensor:
    """[n]: log-probability of each row's id, zero where another rank holds it."""
    if not shard.columns:
        return log_probs.new_zeros(ids.shape)
    local = ids - shard.first
    own = (local >= 0) & (local < shard.columns)
    picked = log_probs.gather(-1, local.clamp(0, shard.columns - 1)[:, None])[:, 0]
    return torch.where(own, picked, 0)


def _on_top_k(z_s: Tensor, z_t: Tensor, loss: Loss, shard: _Shard) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence of two smaller distributions: over the teacher's k most likely ids, and,
    with `top_k_tail: bucket`, one category more that holds all other ids.

    A category is a sum of probabilities, so the bucket only loses information: what comes out is
    a lower bound of the full divergence. Its log-mass is a log-sum-exp over the other ids and not
    log(1 - rest), which is exact however little is left.

    Returns: divergence [n], gradient in the student's tempered logits [n, v] on this shard, and
        the teacher's probability outside its top k [n].
    """
    assert loss.top_k is not None
    k, held = loss.top_k, min(loss.top_k, shard.columns)
    ids = _largest(z_t, held)
    own = torch.stack([z_t.gather(-1, ids), z_s.gather(-1, ids)])
    padded = F.pad(own, (0, k - held), value=-math.inf)
    candidates = torch.cat(shard.gather(padded).unbind(), -1)  # [2, n, ranks * k]
    # Candidates lie in the order of their ids wherever teacher logits are equal.
    best = candidates[0].sort(dim=-1, descending=True, stable=True).indices[:, :k]
    mine = slice(shard.rank * k, shard.rank * k + held)
    chosen = torch.zeros_like(candidates[0], dtype=torch.bool).scatter_(-1, best, True)[:, mine]

    top_t, top_s = candidates.gather(-1, best.expand(2, -1, -1))
    others_t = z_t.scatter(-1, ids, own[0].masked_fill(chosen, -math.inf))
    others_s = z_s.scatter(-1, ids, own[1].masked_fill(chosen, -math.inf))
    tail_t = shard.logsumexp(others_t)[:, None]
    tail_mass = torch.sigmoid(tail_t - top_t.logsumexp(-1, keepdim=True))[:, 0]
    bucket = loss.top_k_tail == "bucket"
    if bucket:
        tail_s = shard.logsumexp(others_s)[:, None]
        top_s, top_t = torch.cat([top_s, tail_s], -1), torch.cat([top_t, tail_t], -1)
    log_s, log_t = torch.log_softmax(top_s, -1), torch.log_softmax(top_t, -1)
    value, d_top = _closed_form(loss)(log_s, log_t, log_s.exp(), log_t.exp(), lambda *sums: sums)

    # d tail_s / d z is the student's distribution inside the bucket, zero on the top k.
    gradient = (others_s - tail_s).exp_().mul_(d_top[:, -1:]) if bucket else torch.zeros_like(z_s)
    spread = torch.zeros_like(candidates[0]).scatter_(-1, best, d_top[:, :k])
    return value, gradient.scatter_add_(-1, ids, spread[:, mine]), tail_mass


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


# Closed forms. Arguments: log-probabilities and probabilities [n, v] of student and teacher, and
# the function that turns sums over columns into sums over the vocabulary. They return the
# divergence [n] and its gradient [n, v] in the student's tempered logits, and overwrite their
# arguments.
Total = Callable[..., tuple[Tensor, ...]]
ClosedForm = Callable[[Tensor, Tensor, Tensor, Tensor, Total], tuple[Tensor, Tensor]]


def _beta(loss: Loss) -> float:
    return {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": loss.beta}[loss.divergence]


def _closed_form(loss: Loss) -> ClosedForm:
    beta = _beta(loss)
    if beta == 0:
        return _forward_kl
    if beta == 1:
        return _reverse_kl
    return partial(_jsd, beta)


def _forward_kl(
    log_s: Tensor, log_t: Tensor, s: Tensor, t: Tensor, total: Total
) -> tuple[Tensor, Tensor]:
    """KL(t || s) = sum t (log t - log s);  d/dz = s - t.

    The sum adds s - t to each term. That is zero in all, and makes each term at least zero and
    flat in the rounding of the normalisers, which would otherwise drown small divergences.
    """
    weighted = log_t.sub_(log_s).mul_(t)
    gradient = s.sub_(t)
    (value,) = total(weighted.sum(-1) + gradient.sum(-1))
    return value, gradient


def _reverse_kl(
    log_s: Tensor, log_t: Tensor, s: Tensor, t: Tensor, total: Total
) -> tuple[Tensor, Tensor]:
    """KL(s || t) = sum s (log s - log t);  d/dz = s (log s - log t - KL).

    The value adds t - s to each term, as in `_forward_kl`.
    """
    ratio = log_s.sub_(log_t)
    mean, missing = total(torch.mul(s, ratio, out=log_t).sum(-1), t.sub_(s).sum(-1))
    return mean + missing, ratio.sub_(mean[:, None]).mul_(s)


def _jsd(
    beta: float, log_s: Tensor, log_t: Tensor, s: Tensor, t: Tensor, total: Total
) -> tuple[Tensor, Tensor]:
    """beta KL(t || m) + (1 - beta) KL(s || m), m = beta t + (1 - beta) s, 0 < beta < 1.

    With r = log s - log m:  d/dz = (1 - beta) s (r - sum s r).

    The generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649). It vanishes as beta goes
    to 0 or 1, where by definition forward and reverse KL take its place.
    """
    ratio = log_t.sub_(log_s)  # log t/s; r = -log(1 + beta (t/s - 1)), linear where t/s overflows
    r = ratio.clamp(max=80).expm1_().mul_(beta).log1p_().neg_().sub_((ratio - 80).relu_())
    mean_s, mean_t = total((s * r).sum(-1), ratio.add_(r).mul_(t).sum(-1))
    gradient = r.sub_(mean_s[:, None]).mul_(s).mul_(1 - beta)
    return beta * mean_t + (1 - beta) * mean_s, gradient


def dense_divergence(student_logits: Tensor, teacher_logits: Tensor, loss: Loss) -> Tensor:
    """The reference: [n, V] logits of both models -> [n], in plain differentiable PyTorch."""
    z_s, z_t = student_logits / loss.temperature, teacher_logits / loss.temperature
    if loss.top_k is not None and loss.top_k < z_s.shape[-1]:
        top = z_t.sort(dim=-1, descending=True, stable=True).indices[:, : loss.top_k]
        parts = [[z.gather(-1, top), z.scatter(-1, top, -math.inf)] for z in (z_s, z_t)]
        if loss.top_k_tail == "bucket":
            parts = [[chosen, rest.logsumexp(-1, keepdim=True)] for chosen, rest in parts]
        else:
            parts = [[chosen] for chosen, _ in parts]
        z_s, z_t = (torch.cat(part, -1) for part in parts)
    log_s, log_t = F.log_softmax(z_s, -1), F.log_softmax(z_t, -1)
    beta = _beta(loss)
    if beta == 0:
        value = (log_t.exp() * (log_t - log_s)).sum(-1)
    elif beta == 1:
        value = (log_s.exp() * (log_s - log_t)).sum(-1)
    else:
        log_m = torch.logaddexp(log_s + math.log1p(-beta), log_t + math.log(beta))
        kl_t, kl_s = ((p.exp() * (p - log_m)).sum(-1) for p in (log_t, log_s))
        value = beta * kl_t + (1 - beta) * kl_s
    return value if loss.token_clip is None else value.clamp(max=loss.token_clip)


@torch.no_grad()
def token_nll(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    chunk_size: int,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """[n]: -log p(label) of each position. Arguments as in `divergence`. No gradient."""
    shard = _shard(weight.shape[0], vocab_size, group)
    _check_labels(labels, vocab_size)
    weight = weight[: shard.columns]
    exact = torch.promote_types(weight.dtype, torch.float32)
    nll = hidden.new_empty(labels.numel(), dtype=exact)
    for start in range(0, labels.numel(), chunk_size):
        chunk = slice(start, start + chunk_size)
        logits = (hidden[chunk].to(weight.dtype) @ weight.t()).to(exact) / temperature
        (log_probs,), _ = _log_softmax([logits], shard)
        (nll[chunk],) = shard.total(-_pick(log_probs, labels[chunk], shard))
    return nll
