"""Keys and values of the tokens so far, with room for more, for Hugging Face `generate`."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from nemo_trd.models.family import FAMILIES

_LEAST_ROOM = 64  # tokens; beyond 8 times as many, an eighth of what is there


def cache_with_room(model: Any) -> dict[str, Any]:
    """The argument that gives `model.generate` a cache which is not copied for every token.

    It is empty for a model that may need another kind of cache: one of none of our families.
    """
    if model.config.model_type not in FAMILIES:
        return {}
    cache = DynamicCache(config=model.config)
    cache.layers = [LayerWithRoom() if type(one) is DynamicLayer else one for one in cache.layers]
    renamed = "cache" in inspect.signature(model.forward).parameters
    return {"cache" if renamed else "past_key_values": cache}


class LayerWithRoom(DynamicLayer):
    """A `DynamicLayer` whose keys and values [batch, heads, tokens, head size] begin a buffer.

    `DynamicLayer` concatenates, which copies all of them for each token.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens; returns keys and values of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        new, old = (key_states, value_states), (self.keys, self.values)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self._has_room(old, end):
            room = end + max(_LEAST_ROOM, end // 8)
            self._buffers = [one.new_empty((*one.shape[:-2], room, one.shape[-1])) for one in new]
            if start:
                for buffer, one in zip(self._buffers, old, strict=True):
                    buffer[..., :start, :] = one
        for buffer, one in zip(self._buffers, new, strict=True):
            buffer[..., start:end, :] = one
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return self.keys, self.values

    def _has_room(self, states: tuple[torch.Tensor, torch.Tensor], end: int) -> bool:
        # Some operations of a cache, such as choosing rows, put other tensors in place of ours.
        return bool(self._buffers) and all(
            end <= buffer.shape[-2]
            and here.data_ptr() == buffer.data_ptr()
            and here.shape[:-2] == buffer.shape[:-2]
            for here, buffer in zip(states, self._buffers, strict=True)
        )
