"""The exponential moving average of the student's weights: a self-teacher that follows it.

The average is in fp32 whatever the weights are in: a bf16 number does not move by less than 2^-9 of
itself, and a step moves an average by 1 - decay of a step. It is split as the parameters are, over
the same ranks, and is saved beside them as an optimizer's states are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
)
from torch import Tensor

KEY = "teacher"  # of the average in checkpoints, before the names of the parameters


class MovingAverage:
    """w <- decay w + (1 - decay) theta, of all parameters theta that are trained.

    tensors: the average w of each, fp32.
    """

    def __init__(self, models: Sequence[torch.nn.Module], decay: float) -> None:
        """Begin with the parameters as they are."""
        trained = (p for model in models for p in model.parameters() if p.requires_grad)
        self._parameters = list(dict.fromkeys(trained))
        self._decay = decay
        self.tensors = [p.detach().to(torch.float32, copy=True) for p in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the parameters as they are now."""
        for average, parameter in zip(self.tensors, self._parameters, strict=True):
            average.lerp_(parameter.float(), 1 - self._decay)

    def of(self, parameter: Tensor) -> Tensor:
        """The average of a parameter, in the parameter's dtype; in fp32 the average itself."""
        place = next(i for i, own in enumerate(self._parameters) if own is parameter)
        return self.tensors[place].to(parameter.dtype)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the models compute with the average, until the end of the block.

        Only one copy in the parameters' dtype is made, and none of fp32. No gradients in here.
        """
        own = [parameter.data for parameter in self._parameters]
        try:
            for average, parameter in zip(self.tensors, self._parameters, strict=True):
                parameter.data = average.to(parameter.dtype)
            yield
        finally:
            for parameter, data in zip(self._parameters, own, strict=True):
                parameter.data = data

    def sharded_state_dict(self, models: Mapping[str, Any]) -> dict[str, Any]:
        """What a checkpoint holds of it, for any layout.

        Args:
            models: the sharded state dicts of the models.
        """
        sharded = get_param_id_to_sharded_param_map(dict(models), self._parameters)
        return {
            str(place): make_sharded_optimizer_tensor(sharded[place], average, KEY)
            for place, average in enumerate(self.tensors)
        }

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Take over what a checkpoint gave for `sharded_state_dict`."""
        for place, average in enumerate(self.tensors):
            average.copy_(saved[str(place)])
