"""Settings from the files of conf/, composed once in a process: it takes a third of a second."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from nemo_trd.config import load
from nemo_trd.config.schema import Config


def compose(overrides: Sequence[str]) -> Config:
    """As `nemo_trd.config.load.compose`; the same object for the same overrides."""
    return _composed(*overrides)


@cache
def _composed(*overrides: str) -> Config:
    return load.compose(list(overrides))
