"""What the unit tests of the losses share: inputs, a run of ours, and the float64 reference."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nemo_trd.config.schema import Loss
from nemo_trd.loss.formulas import dense_divergence
from nemo_trd.loss.fused import DivergenceOutput, fused_divergence

VOCAB, PADDED = 50, 64


class Inputs(NamedTuple):
    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor


def make_inputs(
    n: int = 10, dtype: torch.dtype = torch.float32, vocab: int = VOCAB, padded: int = PADDED
) -> Inputs:
    g = torch.Generator().manual_seed(n)
    shapes = ((n, 8), (padded, 8), (n, 6), (padded, 6))
    tensors = [torch.randn(shape, generator=g).to(dtype) for shape in shapes]
    for x in tensors[:2]:
        x.requires_grad_()
    return Inputs(*tensors, torch.randint(vocab, (n,), generator=g))


def run(inputs: Inputs, loss: Loss, vocab: int = VOCAB, upstream: float = 0.5) -> DivergenceOutput:
    for x in inputs[:2]:
        x.grad = None
    out = fused_divergence(*inputs, loss, vocab)
    (upstream * out.loss_sum).backward()
    return out


def reference(
    inputs: Inputs,
    loss: Loss,
    vocab: int = VOCAB,
    upstream: float = 0.5,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token values and both gradients, by autograd on full logits in `dtype`, whose
    log-softmax is taken in fp32 or better."""
    hs, ws, ht, wt = (x.detach().to(dtype) for x in inputs[:4])
    exact = torch.promote_types(dtype, torch.float32)
    hs.requires_grad_()
    ws.requires_grad_()
    logits = (hs @ ws[:vocab].t()).to(exact), (ht @ wt[:vocab].t()).to(exact)
    value = dense_divergence(*logits, loss, inputs.labels)
    d_hidden, d_weight = torch.autograd.grad(upstream * value.sum(), (hs, ws))
    return value.detach(), d_hidden, d_weight


def distance(a: Tensor, b: Tensor) -> float:
    """Relative to the norm of b."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def as_inputs(student_logits: Tensor, teacher_logits: Tensor) -> Inputs:
    """Inputs that produce exactly these logits: hidden states are the logits."""
    eye = torch.eye(student_logits.shape[1], dtype=student_logits.dtype)
    return Inputs(
        student_logits.clone().requires_grad_(),
        eye.clone().requires_grad_(),
        teacher_logits,
        eye,
        torch.zeros(len(student_logits), dtype=torch.int64),
    )
