"""How a setting that cannot work is reported."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting that cannot work. The message names field, value, rule and fix."""


def rule_broken(field: str, value: object, rule: str, fix: str) -> ConfigError:
    """The one shape in which a bad setting is reported."""
    return ConfigError(f"{field} = {value!r}: {rule}. Fix: {fix}.")
