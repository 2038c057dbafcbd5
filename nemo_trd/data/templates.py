"""Fills texts with placeholders in one pass."""

from __future__ import annotations

import re
from collections.abc import Iterable

PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")


def fill_template(template: str, **fields: str) -> str:
    """Put `fields` in the place of their `{name}` in one pass over the template.

    Inserted text is never searched again, so a problem that contains "{rollout}" stays as it
    is. Braces around anything but a lower-case name, as in `\\boxed{}`, are plain text.

    Raises:
        ValueError: the template has a placeholder that is not in `fields`.
    """
    unknown = sorted(set(PLACEHOLDER.findall(template)) - set(fields))
    if unknown:
        names = placeholder_names(fields)
        raise ValueError(f"template has no value for {placeholder_names(unknown)}; known: {names}")
    return PLACEHOLDER.sub(lambda match: fields[match[1]], template)


def placeholder_names(placeholders: Iterable[str]) -> str:
    """Names in braces, as templates write them, for messages."""
    return ", ".join(f"{{{name}}}" for name in sorted(placeholders))
