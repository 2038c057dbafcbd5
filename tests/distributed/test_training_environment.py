"""What ranks see and set of their machine before they meet."""

from __future__ import annotations

import os

import pytest

from nemo_trd.config.errors import ConfigError
from nemo_trd.distributed.process import (
    TRAINING_ENVIRONMENT,
    init_distributed,
    set_training_environment,
)


def test_variables_are_set_unless_the_caller_has_under_either_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", {})
    set_training_environment()
    assert os.environ == TRAINING_ENVIRONMENT
    own = {"CUDA_DEVICE_MAX_CONNECTIONS": "8", "PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}
    monkeypatch.setattr(os, "environ", dict(own))
    set_training_environment()
    assert os.environ == own


@pytest.mark.parametrize(
    "of_rank", [{"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"}, {"LOCAL_RANK": "7"}]
)
def test_more_ranks_than_gpus_are_refused_before_they_meet(
    of_rank: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    nowhere = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RANK": "7", "WORLD_SIZE": "8"}
    monkeypatch.setattr(os, "environ", nowhere | of_rank)
    with pytest.raises(ConfigError, match="ranks on this machine = 8: .* 4 are visible"):
        init_distributed(timeout_minutes=1)
