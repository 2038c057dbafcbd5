"""Reads a model's part of a checkpoint, whichever layers wrote it.

The weights have the same names with TransformerEngine's layers and without. Beside them
TransformerEngine's layers keep an extra state each, in which delayed scaling has its scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata


def load_models(
    models: Sequence[torch.nn.Module],
    state_dict: dict[str, Any],
    checkpoint: Path,
    *,
    strict: bool = True,
) -> dict[str, Any]:
    """Read a checkpoint and fill `models` from it; return all that was read. Collective.

    Args:
        state_dict: what to read. Under "model" the sharded state dict of each model in turn, as
            "chunk0", "chunk1", ...
        strict: whether that is all that they have; else the rest stays as it is.
    """
    saved = load_sharded_metadata(str(checkpoint))
    without: dict[str, list[str]] = {}
    for chunk, tensors in state_dict["model"].items():
        without[chunk] = [
            name
            for name, value in tensors.items()
            if isinstance(value, ShardedObject) and value.unique_key not in saved
        ]
        for name in without[chunk]:
            del tensors[name]
    states = dist_checkpointing.load(state_dict, str(checkpoint))
    for index, model in enumerate(models):
        tensors = states["model"][f"chunk{index}"]
        # An empty one says that there was no FP8.
        none = {name: torch.empty(0, dtype=torch.uint8) for name in without[f"chunk{index}"]}
        model.load_state_dict(tensors | none, strict=strict)
    return states
