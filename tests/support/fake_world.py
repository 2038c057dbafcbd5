"""One rank of a job of any size in this process: nothing is computed, nothing is sent.

Tensors have shapes and no storage (torch's FakeTensorMode), process groups have members and no
connections (torch's "fake" backend). What ranks tell each other as objects is answered as if all
of them said the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore


class FakeTensors(FakeTensorMode):
    """Tensors without values: to read one back to the host is an error.

    answers: instead, each value that is read is zero, or true.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.answers = False

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.answers and func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype is torch.bool else 0
        return super().dispatch(func, types, args, kwargs)


@contextmanager
def rank_of(rank: int, world_size: int) -> Iterator[FakeTensors]:
    """Be one rank of `world_size` whose tensors are fake; those from before may be mixed in."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with (
            mock.patch("torch.distributed.all_gather_object", _all_say_the_same),
            FakeTensors() as tensors,
        ):
            yield tensors
    finally:
        dist.destroy_process_group()


def _all_say_the_same(answers: list[Any], own: Any, group: Any = None) -> None:
    answers[:] = [own] * len(answers)


def on_the_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors that are real, such as those of a plan, among fake ones."""

    def call(*args: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args)

    return call
