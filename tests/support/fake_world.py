"""One rank of a job of any size in this process: nothing is computed, nothing is sent.

Tensors have shapes and no storage (torch's FakeTensorMode), process groups have members and no
connections (torch's "fake" backend). What ranks tell each other as objects is answered as if all
of them said the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def rank_of(rank: int, world_size: int) -> Iterator[None]:
    """Be one rank of `world_size` whose tensors are fake; those from before may be mixed in."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with (
            mock.patch("torch.distributed.all_gather_object", _all_say_the_same),
            FakeTensorMode(allow_non_fake_inputs=True),
        ):
            yield
    finally:
        dist.destroy_process_group()


def _all_say_the_same(answers: list[Any], own: Any, group: Any = None) -> None:
    answers[:] = [own] * len(answers)
