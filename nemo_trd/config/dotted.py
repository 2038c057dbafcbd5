"""Nested settings under dotted names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def dotted(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"num_steps": 3}} -> {"train.num_steps": 3}, in the same order.

    An empty section is a value of its own.
    """
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= dotted(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
