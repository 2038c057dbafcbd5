"""The formulas of the divergences: closed forms with gradients, on one shard of the vocabulary,
and estimates from the label's token.

Notation: s and t are student and teacher probabilities of one position over the real vocabulary,
both at `loss.temperature`; z are the student's tempered logits.

`dense_divergence` says the same in plain PyTorch on full logits, for tests and small uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_trd.config.schema import EstimatorName, FullDivergenceName, Loss

# Closed forms. Arguments: log-probabilities and probabilities [n, v] of student and teacher, and
# the function that turns sums over columns into sums over the vocabulary. They overwrite their
# arguments.
Total = Callable[..., tuple[Tensor, ...]]


class Compared(NamedTuple):
    """The divergence of both models at n positions."""

    value: Tensor  # [n], before any clip
    clipped: Tensor  # [n], with no entry beyond `loss.entry_clip`
    beyond: Tensor  # [n], number of entries that were
    gradient: Tensor  # [n, v], of `clipped` in the student's tempered logits


ClosedForm = Callable[[Tensor, Tensor, Tensor, Tensor, Total], Compared]


def closed_form(loss: Loss) -> ClosedForm:
    """Closed form of the divergence over the vocabulary that `loss` names."""
    return CLOSED_FORMS[loss.divergence](loss)  # type: ignore[index]  # estimators have none


def unclipped(value: Tensor, gradient: Tensor) -> Compared:
    """A comparison in which there is no limit for entries."""
    return Compared(value, value, torch.zeros_like(value), gradient)


def _forward_kl(
    clip: float | None, log_s: Tensor, log_t: Tensor, s: Tensor, t: Tensor, total: Total
) -> Compared:
    """KL(t || s) = sum t (log t - log s);  d/dz = s - t.

    The sum adds s - t to each term. That is zero in all, and makes each term at least zero and
    flat in the rounding of the normalisers, which would otherwise drown small divergences.
    """
    entries = log_t.sub_(log_s).mul_(t)
    gradient = s.sub_(t)
    added = gradient.sum(-1)
    if clip is None:
        (value,) = total(entries.sum(-1) + added)
        return unclipped(value, gradient)
    return _with_entry_clip(clip, entries, added, gradient, -1, log_s.exp_(), total)


def _reverse_kl(
    clip: float | None, log_s: Tensor, log_t: Tensor, s: Tensor, t: Tensor, total: Total
) -> Compared:
    """KL(s || t) = sum s (log s - log t);  d/dz = s (log s - log t - KL).

    The value adds t - s to each term, as in `_forward_kl`.
    """
    ratio = log_s.sub_(log_t)
    entries, added = torch.mul(s, ratio, out=log_t), t.sub_(s).sum(-1)
    if clip is not None:
        return _with_entry_clip(clip, entries, added, entries, 1, s, total)
    mean, missing = total(entries.sum(-1), added)
    return unclipped(mean + missing, ratio.sub_(mean[:, None]).mul_(s))


def _jsd(
    beta: float,
    clip: float | None,
    log_s: Tensor,
    log_t: Tensor,
    s: Tensor,
    t: Tensor,
    total: Total,
) -> Compared:
    """beta KL(t || m) + (1 - beta) KL(s || m), m = beta t + (1 - beta) s, 0 < beta < 1.

    With r = log s - log m:  d/dz = (1 - beta) s (r - sum s r).

    The generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649). It vanishes as beta goes
    to 0 or 1, where by definition forward and reverse KL take its place.
    """
    ratio = log_t.sub_(log_s)
    # -log(1 + weight (exp(-|log t/s|) - 1)) is log t/m where t > s, log s/m elsewhere: it neither
    # overflows nor subtracts large numbers. The other of the two is |log t/s| less.
    nearer = ratio.abs().neg_().expm1_()
    nearer.mul_(torch.where(ratio > 0, ratio.new_full((), 1 - beta), ratio.new_full((), beta)))
    nearer.log1p_().neg_()
    r = torch.sub(nearer, ratio.clamp(min=0), out=log_s)
    of_t = nearer.add_(ratio.clamp_(max=0)).mul_(t)
    if clip is not None:
        slopes = r.mul_(s).mul_(1 - beta)
        entries = of_t.mul_(beta).add_(slopes)
        return _with_entry_clip(clip, entries, s.new_zeros(len(s)), slopes, 0, s, total)
    mean_s, mean_t = total((s * r).sum(-1), of_t.sum(-1))
    gradient = r.sub_(mean_s[:, None]).mul_(s).mul_(1 - beta)
    return unclipped(beta * mean_t + (1 - beta) * mean_s, gradient)


def _with_entry_clip(
    clip: float,
    entries: Tensor,
    added: Tensor,
    slopes: Tensor,
    tilt: int,
    s: Tensor,
    total: Total,
) -> Compared:
    """sum_v min(e_v, clip) of entries e_v that depend on the student through log s_v alone.

    With a_v = de_v / dlog s_v, and u_v = 1 where e_v is within the limit, else 0:

        d/dz_j = sum_v u_v a_v (1[v = j] - s_j) = u_j a_j - s_j sum_v u_v a_v

    `slopes` are b = a - tilt s, which are small where the models agree. As
    sum u s = 1 - sum (1 - u) s,

        d/dz_j = u_j b_j + s_j (tilt (sum_v (1 - u_v) s_v - (1 - u_j)) - sum_v u_v b_v)

    in which nothing cancels where nothing is clipped.

    Args:
        entries, s: [n, v]. slopes: [n, v], may be `entries`; is overwritten.
        added: [n], sum of what is zero over the vocabulary and goes into the values.
    """
    beyond = entries > clip
    whole = entries.sum(-1) + added
    limited = entries.clamp(max=clip).sum(-1) + added
    kept = slopes.masked_fill_(beyond, 0)
    cut = torch.where(beyond, s, 0).sum(-1)
    value, clipped, slope, cut, count = total(
        whole, limited, kept.sum(-1), cut, beyond.sum(-1, dtype=s.dtype)
    )
    factor = torch.where(beyond, (tilt * (cut - 1) - slope)[:, None], (tilt * cut - slope)[:, None])
    return Compared(value, clipped, count, factor.mul_(s).add_(kept))


def _jsd_between(loss: Loss) -> ClosedForm:
    """Closed form at `loss.beta`: forward KL at 0, reverse KL at 1."""
    exact = {0.0: _forward_kl, 1.0: _reverse_kl}
    return partial(exact.get(loss.beta, partial(_jsd, loss.beta)), loss.entry_clip)


CLOSED_FORMS: dict[FullDivergenceName, Callable[[Loss], ClosedForm]] = {
    "forward_kl": lambda loss: partial(_forward_kl, loss.entry_clip),
    "reverse_kl": lambda loss: partial(_reverse_kl, loss.entry_clip),
    "jsd": _jsd_between,
}


# Estimators. Arguments: log-probabilities [n] of student and teacher at each label. They return the
# estimate [n], and the factor of d log s(label) / dz in its gradient [n].
Estimator = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _k1(log_s: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    """log s - log t, an unbiased estimate of KL(s || t) where labels are samples of s.

    Its gradient is a policy gradient, with the reward log t - log s held fixed:
    (log s - log t) d log s / dz, whose mean over samples of s is the gradient of KL(s || t).
    (The estimate's own slope is zero in the mean.)
    """
    value = log_s - log_t
    return value, value


def _k3(log_s: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    """r - 1 - log r with r = t / s: never negative, and an unbiased estimate of KL(s || t), too.

    It is differentiated as it stands, (1 - r) d log s / dz: over samples of s the mean of that is
    s - t, the gradient of KL(t || s). After John Schulman, http://joschu.net/blog/kl-approx.html.
    """
    less = torch.expm1(log_t - log_s)
    return less + (log_s - log_t), -less


ESTIMATORS: dict[EstimatorName, Estimator] = {"k1": _k1, "k3": _k3}


def _dense_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Entries of KL(p || q), of log-probabilities [n, V]."""
    return log_p.exp() * (log_p - log_q)


def _dense_jsd(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    if beta == 0:
        return _dense_kl(log_t, log_s)
    if beta == 1:
        return _dense_kl(log_s, log_t)
    log_m = torch.logaddexp(log_s + math.log1p(-beta), log_t + math.log(beta))
    return beta * _dense_kl(log_t, log_m) + (1 - beta) * _dense_kl(log_s, log_m)


# By definition, of log-probabilities [n, V] of student and teacher -> [n, V], whose sum it is.
DEFINITIONS: dict[FullDivergenceName, Callable[[Tensor, Tensor, Loss], Tensor]] = {
    "forward_kl": lambda log_s, log_t, loss: _dense_kl(log_t, log_s),
    "reverse_kl": lambda log_s, log_t, loss: _dense_kl(log_s, log_t),
    "jsd": lambda log_s, log_t, loss: _dense_jsd(log_s, log_t, loss.beta),
}
# The same of estimates, of log-probabilities [n] at the labels -> [n].
ESTIMATES: dict[EstimatorName, Callable[[Tensor, Tensor], Tensor]] = {
    # Its value is log s - log t, its gradient that times the gradient of log s.
    "k1": lambda log_s, log_t: (log_s - log_t).detach() * (1 + log_s - log_s.detach()),
    "k3": lambda log_s, log_t: (log_t - log_s).exp() - 1 - (log_t - log_s),
}


def dense_divergence(
    student_logits: Tensor, teacher_logits: Tensor, loss: Loss, labels: Tensor | None = None
) -> Tensor:
    """The reference: [n, V] logits of both models -> [n], in plain differentiable PyTorch.

    Args:
        labels: int64 [n], for estimators only.
    """
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
    name = loss.divergence
    if name == "k1" or name == "k3":
        assert labels is not None
        of_label = (log.gather(-1, labels[:, None])[:, 0] for log in (log_s, log_t))
        value = ESTIMATES[name](*of_label)
    else:
        entries = DEFINITIONS[name](log_s, log_t, loss)
        value = entries.clamp(max=loss.entry_clip).sum(-1) if loss.entry_clip else entries.sum(-1)
    return value if loss.token_clip is None else value.clamp(max=loss.token_clip)
