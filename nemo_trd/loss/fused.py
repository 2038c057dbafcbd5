"""Per-token divergences between teacher and student along y, from hidden states.

`fused_divergence` never holds the logits of more than `loss.chunk_size` positions. Each divergence
has a closed-form gradient in the student's logits (`nemo_trd.loss.formulas`), so a chunk's
contribution to the gradients of hidden states and output weight is formed while its logits exist,
in the forward pass; the backward pass only multiplies by the upstream gradient. Peak memory is
O(chunk_size * vocabulary / tp), whatever the number of positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_trd.config.errors import rule_broken
from nemo_trd.config.schema import Loss
from nemo_trd.loss.comparison import METRICS, comparing
from nemo_trd.loss.divergences import chunk_size
from nemo_trd.loss.formulas import ESTIMATORS
from nemo_trd.loss.logits import full_precision, logits_of
from nemo_trd.loss.top_k import TopK, most_likely
from nemo_trd.loss.vocab_shard import VocabShard, at_labels, log_softmax, own_shard

TOP_K_IDS = "top-k ids of the teacher's servers"


@dataclass(frozen=True)
class DivergenceOutput:
    """Contribution of one call; the caller divides by the global number of labels.

    loss_sum: scalar, sum over tokens, differentiable.
    count: number of tokens.
    metrics: sums over tokens, one scalar for each of `METRICS`, at the loss's temperature; but no
        `teacher_entropy` of a teacher that is known by its top k.
    token_divergence: [n], detached, before any clip: inf and NaN stay visible in it.
    token_nll: [2, n], detached: the student's and the teacher's, of the labels, in nats.
    """

    loss_sum: Tensor
    count: int
    metrics: dict[str, Tensor]
    token_divergence: Tensor
    token_nll: Tensor


def fused_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    loss: Loss,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    weight_gradient: Tensor | None = None,
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
        weight_gradient: fp32 [V/tp, Hs], to which the gradient of the student's weight in
            `loss_sum` is added here, instead of in a buffer of its own that autograd hands out.

    Raises:
        ConfigError: a label outside the vocabulary, where they are on the host.
        RuntimeError: in the backward pass, where `weight_gradient` has been added to and the
            upstream gradient is not one; on a GPU an assertion on the device.
    """
    if loss.top_k is not None and loss.top_k >= vocab_size:
        loss = loss.model_copy(update={"top_k": None})
    n = labels.numel()
    assert student_hidden.shape[0] == teacher_hidden.shape[0] == n
    shard = own_shard(student_weight.shape[0], vocab_size, group)
    if shard.group is not None:
        assert student_weight.shape[0] == teacher_weight.shape[0], "shards differ"
    longest = chunk_size(loss, shard.rows, student_weight.is_cuda)
    teacher = _Logits(teacher_hidden, teacher_weight[: shard.columns], loss.temperature, longest)
    student = student_hidden, student_weight, weight_gradient
    return _differentiable(*student, teacher, labels, loss, vocab_size, shard)


def divergence_from_top_k(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: TopK,
    labels: Tensor,
    loss: Loss,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    weight_gradient: Tensor | None = None,
) -> DivergenceOutput:
    """As `fused_divergence`, of a teacher of which the `loss.top_k` most likely ids at the same n
    labels are known (any number for an estimator), at temperature 1: the same on all ranks of
    `group`.

    Raises:
        ConfigError: a label or an id of the teacher outside the vocabulary, likewise.
    """
    assert len(teacher.ids) == labels.numel() and loss.temperature == 1
    assert loss.divergence in ESTIMATORS or teacher.ids.shape[1] == loss.top_k
    if loss.top_k == vocab_size:  # nothing is left for a bucket
        loss = loss.model_copy(update={"top_k_tail": "renormalize"})
    check_ids(TOP_K_IDS, teacher.ids, vocab_size)
    shard = own_shard(student_weight.shape[0], vocab_size, group)
    student = student_hidden, student_weight, weight_gradient
    out = _differentiable(*student, teacher, labels, loss, vocab_size, shard)
    del out.metrics["teacher_entropy"]
    return out


def _differentiable(
    student_hidden: Tensor,
    student_weight: Tensor,
    weight_gradient: Tensor | None,
    teacher: _Logits | TopK,
    labels: Tensor,
    loss: Loss,
    vocab_size: int,
    shard: VocabShard,
) -> DivergenceOutput:
    check_ids("labels", labels, vocab_size)
    student = student_hidden, student_weight, weight_gradient
    loss_sum, statistics = _FusedDivergence.apply(
        *student, teacher, labels, loss, shard, torch.is_grad_enabled()
    )
    metrics = dict(zip(METRICS, statistics.sum(-1), strict=False))
    nll = METRICS.index("student_nll")
    return DivergenceOutput(
        loss_sum, labels.numel(), metrics, statistics[-1], statistics[nll : nll + 2]
    )


def check_ids(name: str, ids: Tensor | Sequence[int], vocab_size: int) -> None:
    """Refuse ids outside of the vocabulary.

    Those on a device are not looked at, since the host would wait for it: check them before.

    Raises:
        ConfigError
    """
    if isinstance(ids, Tensor) and ids.device.type != "cpu":
        return
    values = np.asarray(ids)
    outside = values[(values < 0) | (values >= vocab_size)]
    if outside.size:
        raise rule_broken(
            name,
            int(outside.flat[0]),
            f"{name} are ids of a vocabulary of {vocab_size}",
            "use the tokenizer that belongs to the models"
            if name == "labels"
            else "lower loss.top_k: it reaches columns that pad the teacher's vocabulary",
        )


class _Logits:
    """A model's tempered logits [n, v] on this shard, a chunk at a time: the next overwrites the
    last.

    hidden: [n, H]; weight: [v, H], no padding; longest: positions of a chunk.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, temperature: float, longest: int) -> None:
        self._hidden = hidden
        self._weight = weight
        self._temperature = temperature
        longest = min(longest, len(hidden))
        self._buffer = weight.new_empty(longest, len(weight), dtype=full_precision(weight))

    def __getitem__(self, chunk: slice) -> Tensor:
        hidden = self._hidden[chunk]
        return logits_of(hidden, self._weight, self._temperature, self._buffer[: len(hidden)])


class _FusedDivergence(torch.autograd.Function):
    """Forms the gradients in the forward pass; the backward pass scales and releases them."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        weight_gradient: Tensor | None,
        teacher: _Logits | TopK,
        labels: Tensor,
        loss: Loss,
        shard: VocabShard,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        exact = full_precision(student_weight)
        wants_hidden, wants_weight = (grad_enabled and need for need in ctx.needs_input_grad[:2])
        d_hidden = torch.zeros_like(student_hidden) if wants_hidden else None
        d_weight = weight_gradient if grad_enabled else None
        if d_weight is None and wants_weight:
            d_weight = torch.zeros_like(student_weight, dtype=exact)
        statistics = student_hidden.new_zeros(len(METRICS) + 1, labels.numel(), dtype=exact)

        # Padding is cut off here, once: no mask, no wasted work, no way for junk to come in.
        weight = student_weight[: shard.columns]
        longest = chunk_size(loss, shard.rows, weight.is_cuda)
        student = _Logits(student_hidden, weight, loss.temperature, longest)
        compared = comparing(loss, shard, weight)
        for start in range(0, labels.numel(), longest):
            chunk = slice(start, start + longest)
            statistics[:, chunk], gradient = compared(student[chunk], teacher[chunk], labels[chunk])
            if d_hidden is not None:
                d_hidden[chunk] = gradient @ weight
            if d_weight is not None:
                hidden = student_hidden[chunk].to(weight.dtype)
                scale = 1 / loss.temperature  # the gradient is in the tempered logits
                _add_outer(d_weight[: shard.columns], gradient, hidden, scale)
        ctx.of_one = weight_gradient is not None
        ctx.gradients = d_hidden, None if ctx.of_one else d_weight
        ctx.weight_dtype = student_weight.dtype
        ctx.temperature = loss.temperature
        ctx.mark_non_differentiable(statistics)
        return statistics[0].sum(), statistics

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of a divergence are handed out once, by backward()")
        d_hidden, d_weight = ctx.gradients
        ctx.gradients = None
        if ctx.of_one:  # what has been added to the weight's gradient
            torch._assert_async(upstream == 1, "the gradient of a sum of divergences is not one")
        if d_hidden is not None:
            d_hidden.mul_(upstream / ctx.temperature)
        if d_weight is not None:
            d_weight = d_weight.mul_(upstream).to(ctx.weight_dtype)
        return d_hidden, d_weight, *[None] * 6


def _add_outer(total: Tensor, d_logits: Tensor, hidden: Tensor, scale: float) -> None:
    """total [v, H] += scale d_logits^T [v, n] hidden [n, H], in the precision of `total`."""
    if total.dtype == hidden.dtype:
        total.addmm_(d_logits.t(), hidden, alpha=scale)
    elif total.is_cuda:  # half-precision factors, fp32 sum; PyTorch has this on CUDA only
        factors = d_logits.t(), hidden
        torch.addmm(total, *factors, out_dtype=total.dtype, alpha=scale, out=total)
    else:
        total.addmm_(d_logits.t().to(total.dtype), hidden.to(total.dtype), alpha=scale)


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
    """[n]: -log p(label) of each position. Arguments as in `fused_divergence`. No gradient."""
    shard = own_shard(weight.shape[0], vocab_size, group)
    check_ids("labels", labels, vocab_size)
    weight = weight[: shard.columns]
    nll = hidden.new_empty(labels.numel(), dtype=full_precision(weight))
    for start in range(0, labels.numel(), chunk_size):
        chunk = slice(start, start + chunk_size)
        logits = logits_of(hidden[chunk], weight, temperature)
        (log_probs,), _ = log_softmax([logits], shard)
        (nll[chunk],) = shard.total(-at_labels(log_probs, labels[chunk], shard))
    return nll


@torch.no_grad()
def top_k_of(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    k: int,
    *,
    vocab_size: int,
    chunk_size: int,
    group: dist.ProcessGroup | None = None,
) -> TopK:
    """The k most likely ids at each of n labels, at temperature 1; as in `fused_divergence`."""
    shard = own_shard(weight.shape[0], vocab_size, group)
    check_ids("labels", labels, vocab_size)
    weight = weight[: shard.columns]
    parts = []
    for start in range(0, max(1, labels.numel()), chunk_size):  # also without a label
        chunk = slice(start, start + chunk_size)
        (log_probs,), _ = log_softmax([logits_of(hidden[chunk], weight)], shard)
        (of_labels,) = shard.total(at_labels(log_probs, labels[chunk], shard))
        parts.append((*most_likely(log_probs, k, shard), of_labels))
    return TopK(*map(torch.cat, zip(*parts, strict=True)))
