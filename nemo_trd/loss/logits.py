"""Logits in full precision from hidden states and output weights in any."""

from __future__ import annotations

import torch
from torch import Tensor

# Bytes that are worked on at once on a CPU, so that they stay in its caches.
CPU_BLOCK_BYTES = 8 << 20


def full_precision(weight: Tensor) -> torch.dtype:
    """The dtype in which `weight` gives logits: fp32, of float64 weights float64."""
    return torch.promote_types(weight.dtype, torch.float32)


def logits_of(
    hidden: Tensor, weight: Tensor, temperature: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """Tempered logits [n, v] of hidden states [n, H] and output weight [v, H], in
    `full_precision`: the matrix product divides by the temperature.

    They are never rounded to half precision, whose steps are as large as what two models that are
    close to each other differ by. No gradient.

    Args:
        out: where they go.
    """
    exact = full_precision(weight)
    hidden = hidden.detach().to(weight.dtype)
    weight = weight.detach()
    if out is None:
        out = hidden.new_empty(len(hidden), len(weight), dtype=exact)
    product = {"beta": 0.0, "alpha": 1 / temperature}  # beta 0: what is in `out` has no effect
    if weight.dtype == exact:
        return torch.addmm(out, hidden, weight.t(), **product, out=out)
    if weight.is_cuda:
        return torch.addmm(out, hidden, weight.t(), out_dtype=exact, **product, out=out)
    # A CPU has no such product. The factors are exact in fp32.
    hidden = hidden.to(exact)
    rows = max(1, CPU_BLOCK_BYTES // (weight.shape[1] * exact.itemsize))
    for columns, part in zip(out.split(rows, -1), weight.split(rows), strict=True):
        torch.addmm(columns, hidden, part.to(exact).t(), **product, out=columns)
    return out
