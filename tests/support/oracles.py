"""Other ways to compute the divergences: what `nemo_trd.loss.fused` is compared with."""

from __future__ import annotations

import importlib
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from nemo_trd.config.schema import Loss

DIVERGENCES = {
    "forward_kl": {"divergence": "forward_kl"},
    "reverse_kl": {"divergence": "reverse_kl"},
    "jsd": {"divergence": "jsd", "beta": 0.3},
}
ESTIMATORS = ("k1", "k3")
TAILS = {
    "full": {},
    "bucket": {"top_k": 7, "top_k_tail": "bucket"},
    "renormalize": {"top_k": 7, "top_k_tail": "renormalize"},
}
TRL, MODELOPT = "trl.experimental.gkd", "modelopt.torch.distill.plugins.megatron"


def need(module: str) -> None:
    """Skip the test where `module` is not installed. In CI that is a failure."""
    import nemo_trd.megatron  # noqa: F401  (ModelOpt imports megatron-core, which needs this first)

    if os.environ.get("CI"):
        importlib.import_module(module)
    pytest.importorskip(module, exc_type=ImportError)


def make_loss(divergence: str = "forward_kl", tail: str = "full", **settings: Any) -> Loss:
    defaults = {
        "beta": 0.5,
        "top_k": None,
        "top_k_tail": "bucket",
        "token_clip": None,
        "temperature": 1.0,
        "chunk_size": 4,
    }
    own = DIVERGENCES.get(divergence, {"divergence": divergence})
    return Loss(**(defaults | own | TAILS[tail] | settings))


def by_definition(student_logits: Tensor, teacher_logits: Tensor, divergence: str) -> Tensor:
    """[n], with torch.distributions; jsd with the beta of `DIVERGENCES`."""
    student, teacher = Categorical(logits=student_logits), Categorical(logits=teacher_logits)
    if divergence == "forward_kl":
        return kl_divergence(teacher, student)
    if divergence == "reverse_kl":
        return kl_divergence(student, teacher)
    beta = float(DIVERGENCES["jsd"]["beta"])
    mixture = Categorical(probs=beta * teacher.probs + (1 - beta) * student.probs)
    return beta * kl_divergence(teacher, mixture) + (1 - beta) * kl_divergence(student, mixture)


def trl(student_logits: Tensor, teacher_logits: Tensor, loss: Loss) -> Tensor:
    """Sum over tokens, with TRL's generalised JSD."""
    from trl.experimental.gkd import GKDTrainer

    return GKDTrainer.generalized_jsd_loss(
        student_logits[None],
        teacher_logits[None],
        beta={"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": loss.beta}[loss.divergence],
        temperature=loss.temperature,
        reduction="sum",
    )


def modelopt(student_logits: Tensor, teacher_logits: Tensor, loss: Loss, ranks: int = 1) -> Tensor:
    """[n], with NVIDIA ModelOpt. With several ranks, logits are shards over Megatron's tensor
    parallel group, and what comes back is this rank's part of the sum over the vocabulary."""
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss, TopKLogitsKLLoss

    settings: dict[str, Any] = {
        "temperature": loss.temperature,
        "reverse": loss.divergence == "reverse_kl",
    }
    config: Any = SimpleNamespace(tensor_model_parallel_size=ranks)
    if loss.top_k is None:
        criterion = LogitsKLLoss(config, **settings)
    else:
        criterion = TopKLogitsKLLoss(config, top_k=loss.top_k, **settings)
    return criterion(student_logits[:, None], teacher_logits[:, None])[0][0]


class _Sum(torch.autograd.Function):
    """Sum over the group of something that each rank then uses on its own part of the vocabulary:
    its gradient is the sum over the group, too."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        total = upstream.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _SumOnce(torch.autograd.Function):
    """Sum over the group that every rank turns into the same loss: one upstream gradient."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream, None


def vocab_parallel(
    student_logits: Tensor, teacher_logits: Tensor, loss: Loss, group: dist.ProcessGroup
) -> Tensor:
    """[n], the full-vocabulary divergence of logits [n, v] that are sharded over the group, with
    all logits in memory and gradients by autograd. No padding."""

    def log_softmax(logits: Tensor) -> Tensor:
        logits = logits / loss.temperature
        maximum = logits.detach().amax(-1, keepdim=True)
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
        total = _Sum.apply((logits - maximum).exp().sum(-1, keepdim=True), group)
        return logits - maximum - total.log()

    log_s, log_t = log_softmax(student_logits), log_softmax(teacher_logits)
    s, t = log_s.exp(), log_t.exp()
    if loss.divergence == "forward_kl":
        terms = t * (log_t - log_s)
    elif loss.divergence == "reverse_kl":
        terms = s * (log_s - log_t)
    else:
        log_m = (loss.beta * t + (1 - loss.beta) * s).log()
        terms = loss.beta * t * (log_t - log_m) + (1 - loss.beta) * s * (log_s - log_m)
    if loss.entry_clip is not None:
        terms = terms.clamp(max=loss.entry_clip)
    return _SumOnce.apply(terms.sum(-1), group)
