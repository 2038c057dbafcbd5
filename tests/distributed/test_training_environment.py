"""Variables of CUDA and torch that ranks set for themselves."""

from __future__ import annotations

import os

import pytest

from nemo_trd.distributed.process import TRAINING_ENVIRONMENT, set_training_environment


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
