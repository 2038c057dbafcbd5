"""The dtypes that settings name: what torch and vLLM call them, and their sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16"}  # setting -> name in torch and vLLM
ELEMENT_BYTES = {"fp32": 4, "bf16": 2}


def torch_dtype(setting: str) -> torch.dtype:
    """torch's dtype of a setting, one of `DTYPE_NAMES`."""
    import torch

    dtype: torch.dtype = getattr(torch, DTYPE_NAMES[setting])
    return dtype
