"""The formulas of the divergences: closed forms with gradients, on one shard of the vocabulary.

Notation: s and t are student and teacher probabilities of one position over the real vocabulary,
both at `loss.temperature`; z are the student's tempered logits.

`dense_divergence` says the same in plain PyTorch on full logits, for tests and small uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_trd.config.schema import DivergenceName, Loss

# Closed forms. Arguments: log-probabilities and probabilities [n, v] of student and teacher, and
# the function that turns sums over columns into sums over the vocabulary. They return the
# divergence [n] and its gradient [n, v] in the student's tempered logits, and overwrite their
# arguments.
Total = Callable[..., tuple[Tensor, ...]]
ClosedForm = Callable[[Tensor, Tensor, Tensor, Tensor, Total], tuple[Tensor, Tensor]]


def closed_form(loss: Loss) -> ClosedForm:
    """Closed form of the divergence that `loss` names."""
    return CLOSED_FORMS[loss.divergence](loss)


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
    ratio = log_t.sub_(log_s)
    # -log(1 + weight (exp(-|log t/s|) - 1)) is log t/m where t > s, log s/m elsewhere: it neither
    # overflows nor subtracts large numbers. The other of the two is |log t/s| less.
    nearer = ratio.abs().neg_().expm1_()
    nearer.mul_(torch.where(ratio > 0, ratio.new_full((), 1 - beta), ratio.new_full((), beta)))
    nearer.log1p_().neg_()
    r = torch.sub(nearer, ratio.clamp(min=0), out=log_s)
    mean_s, mean_t = total((s * r).sum(-1), nearer.add_(ratio.clamp_(max=0)).mul_(t).sum(-1))
    gradient = r.sub_(mean_s[:, None]).mul_(s).mul_(1 - beta)
    return beta * mean_t + (1 - beta) * mean_s, gradient


def _jsd_between(loss: Loss) -> ClosedForm:
    """Closed form at `loss.beta`: forward KL at 0, reverse KL at 1."""
    exact = {0.0: _forward_kl, 1.0: _reverse_kl}
    return exact.get(loss.beta, partial(_jsd, loss.beta))


CLOSED_FORMS: dict[DivergenceName, Callable[[Loss], ClosedForm]] = {
    "forward_kl": lambda loss: _forward_kl,
    "reverse_kl": lambda loss: _reverse_kl,
    "jsd": _jsd_between,
}


def _dense_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities [n, V] -> [n]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _dense_jsd(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    if beta == 0:
        return _dense_kl(log_t, log_s)
    if beta == 1:
        return _dense_kl(log_s, log_t)
    log_m = torch.logaddexp(log_s + math.log1p(-beta), log_t + math.log(beta))
    return beta * _dense_kl(log_t, log_m) + (1 - beta) * _dense_kl(log_s, log_m)


# By definition, of log-probabilities [n, V] of student and teacher -> [n].
DEFINITIONS: dict[DivergenceName, Callable[[Tensor, Tensor, Loss], Tensor]] = {
    "forward_kl": lambda log_s, log_t, loss: _dense_kl(log_t, log_s),
    "reverse_kl": lambda log_s, log_t, loss: _dense_kl(log_s, log_t),
    "jsd": lambda log_s, log_t, loss: _dense_jsd(log_s, log_t, loss.beta),
}


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
    value = DEFINITIONS[loss.divergence](log_s, log_t, loss)
    return value if loss.token_clip is None else value.clamp(max=loss.token_clip)
