"""Imported in every worker of a server that checks drafts on a CPU: mends vLLM 0.32 without Triton.

Two functions of its rejection sampler fail above temperature 0. `expand_kernel` is to give each
drafted token its request's temperature, top-k and top-p; a compiled stand-in writes them into
copies of the tensors, which are dropped, and what is read then is whatever memory held ("index ...
out of bounds"). And top-k alone fails in a step in which nobody has a draft ("max(): Expected
reduction dim"). Imports nothing but torch and vllm.
"""

from __future__ import annotations

import torch
from vllm.triton_utils import HAS_TRITON
from vllm.triton_utils.dispatcher import register_kernels
from vllm.v1.sample import rejection_sampler

_apply_top_k_top_p = rejection_sampler.apply_top_k_top_p


def expand(
    output: torch.Tensor,
    values: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,  # noqa: N803
) -> None:
    """Write the value of each request [n] once for each of its tokens into `output`.

    Args:
        cu_num_tokens: [n], tokens of the request and of those before it.
        replace_from, replace_to: a value that is written as another one.
    """
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    replaced = values.masked_fill(values == replace_from, replace_to)
    output.copy_(replaced.repeat_interleave(counts.long()))


def apply_top_k_top_p(
    logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None
) -> torch.Tensor:
    """Do as vLLM does where there are rows."""
    return _apply_top_k_top_p(logits, k, p) if len(logits) else logits


class WorkerExtension:
    """Nothing: vLLM imports the module with it."""


if not HAS_TRITON:
    register_kernels({"vllm.v1.sample.rejection_sampler.expand_kernel": expand})
    rejection_sampler.apply_top_k_top_p = apply_top_k_top_p
