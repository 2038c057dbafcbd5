"""Settings that every test relies on, and what a machine without a GPU skips."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest

# Before torch and transformers are imported. One thread: several ranks share the cores, and sums
# are formed in the same order everywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

# NeMo-Aligner's tests run in its own environment: `make test-adapters`.
collect_ignore = [] if importlib.util.find_spec("nemo_aligner") else ["adapters/aligner"]
LONG = ("vllm", "distributed")

# A busy machine is no failure, and the same tree passes or fails each time. Environments for the
# tests of an adapter or of a GPU have no Hypothesis.
if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile("steady", deadline=None, derandomize=True)
    settings.load_profile("steady")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest first, for files that run side by side to end together.
    items.sort(key=lambda item: [item.get_closest_marker(mark) is None for mark in LONG])
    gpu_tests = {item: mark for item in items if (mark := item.get_closest_marker("gpu"))}
    if not gpu_tests:
        return
    from devices import EMULATED, missing_devices

    for item, mark in gpu_tests.items():
        if (missing := missing_devices()) and not (EMULATED and mark.kwargs.get("emulated")):
            item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture(scope="session")
def one_rank() -> Iterator[Any]:
    """Process groups of a world of one rank, in this process."""
    import torch.distributed as dist

    from nemo_trd.config.schema import Layout
    from nemo_trd.megatron.process_groups import process_groups

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield process_groups(Layout(tensor_model_parallel_size=1, pipeline_model_parallel_size=1))
    dist.destroy_process_group()
