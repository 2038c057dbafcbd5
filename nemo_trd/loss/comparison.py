"""The comparison of both models at the positions of a chunk: all that is done with its logits.

`compare` is one function of tensors. A GPU runs it compiled, as few kernels that read the logits
and write the gradient, where the operators one by one would write and read each of their results.
A CPU runs them one by one, on blocks of positions that stay in its caches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_trd.config.schema import Loss
from nemo_trd.loss.formulas import ESTIMATORS, Compared, closed_form, unclipped
from nemo_trd.loss.logits import CPU_BLOCK_BYTES
from nemo_trd.loss.top_k import TopK, on_support, on_top_k
from nemo_trd.loss.vocab_shard import VocabShard, add, at_labels, log_softmax, pick

METRICS = (
    "divergence",  # what is trained on: after both clips
    "student_nll",  # of the labels
    "teacher_nll",
    "student_entropy",
    "teacher_entropy",
    "top1_agreement",  # positions where both have the same most likely token
    "clipped",  # positions beyond loss.token_clip
    "clipped_entries",  # entries beyond loss.entry_clip, a number for each position
    "teacher_tail_mass",  # teacher probability outside its top k
)

# Of a chunk: the student's tempered logits [n, v], the teacher's or its top k, labels [n] ->
# statistics [len(METRICS) + 1, n], the last row the divergence before any clip; and the gradient
# [n, v] in the student's tempered logits, in the dtype of the weights.
Comparing = Callable[[Tensor, Tensor | TopK, Tensor], tuple[Tensor, Tensor]]


def comparing(loss: Loss, shard: VocabShard, weight: Tensor) -> Comparing:
    """`compare` as the device of `weight`, of which the logits come, wants it."""
    return (_compiled if weight.is_cuda else _in_blocks)(loss, shard, weight.dtype)


def _compiled(loss: Loss, shard: VocabShard, dtype: torch.dtype) -> Comparing:
    own = _own_code(loss.model_copy(update={"chunk_size": None}))

    def run(z_s: Tensor, teacher: Tensor | TopK, labels: Tensor) -> tuple[Tensor, Tensor]:
        others = (teacher,) if isinstance(teacher, Tensor) else teacher.tensors
        for x in (z_s, *others, labels):  # compiled once for any number of positions beyond one
            torch._dynamo.maybe_mark_dynamic(x, 0)
        return own(z_s, teacher, labels, loss, shard, dtype)

    return run


@cache
def _own_code(loss: Loss) -> Callable[..., tuple[Tensor, Tensor]]:
    """`compare` in a code object for this loss alone.

    PyTorch compiles each for eight cases at most, which all losses of a process would share.
    """
    copy = FunctionType(compare.__code__.replace(), compare.__globals__)
    return torch.compile(copy, fullgraph=True)


def _in_blocks(loss: Loss, shard: VocabShard, dtype: torch.dtype) -> Comparing:
    def run(z_s: Tensor, teacher: Tensor | TopK, labels: Tensor) -> tuple[Tensor, Tensor]:
        # The gradient takes the place of the logits. In half precision it is the first half of
        # each row.
        gradient = z_s.view(dtype)[:, : z_s.shape[1]]
        rows = max(1, CPU_BLOCK_BYTES // (shard.rows * z_s.itemsize))  # the same on all ranks
        statistics = []
        for start in range(0, len(z_s), rows):
            block = slice(start, start + rows)
            part, gradient[block] = compare(
                z_s[block], teacher[block], labels[block], loss, shard, dtype
            )
            statistics.append(part)
        return torch.cat(statistics, -1), gradient

    return run


def compare(
    z_s: Tensor,
    teacher: Tensor | TopK,
    labels: Tensor,
    loss: Loss,
    shard: VocabShard,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Compare both models at n positions, see `Comparing`; the gradient is in `dtype`."""
    if isinstance(teacher, TopK):
        compared = _with_top_k(z_s, teacher, labels, loss, shard)
    else:
        compared = _with_logits(z_s, teacher, labels, loss, shard)
    value, trained, entries, gradient = compared.divergence
    clipped = torch.zeros_like(value)
    if loss.token_clip is not None:
        clipped = trained > loss.token_clip
        trained = trained.clamp(max=loss.token_clip)
        gradient = gradient.mul_(~clipped[:, None])
    both = (*compared.nll, *compared.entropy, compared.agreement)
    rows = (trained, *both, clipped, entries, compared.tail, value)
    return torch.stack([row.to(z_s.dtype) for row in rows]), gradient.to(dtype)


class _Comparison(NamedTuple):
    """Comparison of both models at n positions; pairs are student and teacher."""

    divergence: Compared
    tail: Tensor  # [n], the teacher's probability outside its top k
    nll: tuple[Tensor, Tensor]
    entropy: tuple[Tensor, Tensor]
    agreement: Tensor  # [n], whether both have the same most likely id


def _with_logits(
    z_s: Tensor, z_t: Tensor, labels: Tensor, loss: Loss, shard: VocabShard
) -> _Comparison:
    (log_s, log_t), agreement = log_softmax([z_s, z_t], shard)
    s, t = log_s.exp(), log_t.exp()
    product = s * log_s
    entropy_s = -product.sum(-1)
    entropy_t = -torch.mul(t, log_t, out=product).sum(-1)
    del product
    nll_s, nll_t, entropy_s, entropy_t = shard.total(
        -at_labels(log_s, labels, shard), -at_labels(log_t, labels, shard), entropy_s, entropy_t
    )
    tail = torch.zeros_like(nll_t)
    if loss.divergence in ESTIMATORS:
        divergence = _estimated(s, nll_s, nll_t, labels, loss, shard)
    elif loss.top_k is None:
        divergence = closed_form(loss)(log_s, log_t, s, t, shard.total)
    else:
        del log_s, log_t, s, t
        divergence, tail = on_top_k(z_s, z_t, loss, shard)
    return _Comparison(divergence, tail, (nll_s, nll_t), (entropy_s, entropy_t), agreement)


def _with_top_k(
    z_s: Tensor, teacher: TopK, labels: Tensor, loss: Loss, shard: VocabShard
) -> _Comparison:
    """The teacher's entropy is not known, and is zero."""
    (log_s,), _ = log_softmax([z_s], shard)
    nll, entropy, at_best = shard.total(
        -at_labels(log_s, labels, shard),
        -(log_s.exp() * log_s).sum(-1),
        pick(log_s, teacher.ids[:, :1], shard)[:, 0],
    )
    best = log_s.amax(-1) if shard.columns else torch.full_like(nll, -math.inf)
    agreement = at_best == shard.gather(best).amax(0)
    unknown, nll_t = torch.zeros_like(nll), -teacher.label_log_probs.to(z_s.dtype)
    if loss.divergence in ESTIMATORS:
        divergence, tail_mass = _estimated(log_s.exp_(), nll, nll_t, labels, loss, shard), unknown
    else:
        del log_s
        top, tail = teacher.log_probs.to(z_s.dtype), teacher.log_tail().to(z_s.dtype)
        divergence, tail_mass = on_support(z_s, teacher.ids, top, tail, loss, shard)
    return _Comparison(divergence, tail_mass, (nll, nll_t), (entropy, unknown), agreement)


def _estimated(
    s: Tensor, nll_s: Tensor, nll_t: Tensor, labels: Tensor, loss: Loss, shard: VocabShard
) -> Compared:
    """From the labels' tokens alone; d log s(label) / dz is 1[label] - s. Overwrites s."""
    value, slope = ESTIMATORS[loss.divergence](-nll_s, -nll_t)  # type: ignore[index]
    gradient = s.mul_(-slope[:, None])
    return unclipped(value, add(gradient, labels[:, None], slope[:, None], shard))
