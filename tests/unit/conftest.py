"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def one_rank() -> Iterator[Any]:
    """Process groups of a world of one rank, in this process."""
    import torch.distributed as dist

    from nemo_trd.config import Layout
    from nemo_trd.megatron.parallel import process_groups

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield process_groups(Layout(tensor_model_parallel_size=1, pipeline_model_parallel_size=1))
    dist.destroy_process_group()
