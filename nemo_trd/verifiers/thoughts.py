"""Signs by which models mark thoughts. A thought is no part of the final answer."""

from __future__ import annotations

import re

_NAMES = r"(?:seed:)?(?:think|thinking|thought|thoughts|reason|reasoning)"
THOUGHT_BEGINS = re.compile(
    rf"<{_NAMES}>|<\|(?:begin_of_thought|think|thinking|begin_thinking|start_thinking)\|>"
    r"|\[THINK(?:ING)?\]|◁think▷|<\|channel\|>\s*analysis\b",
    re.IGNORECASE,
)
THOUGHT_ENDS = re.compile(
    rf"</{_NAMES}>|<\|(?:end_of_thought|/think|/thinking|end_thinking)\|>|\[/THINK(?:ING)?\]"
    r"|◁/think▷|<\|channel\|>\s*final\b",
    re.IGNORECASE,
)
THOUGHT_OPENED = re.compile(rf"(?:{THOUGHT_BEGINS.pattern})\s*\Z", re.IGNORECASE)


def without_thoughts(text: str) -> str:
    """Text after the last thought, or before one that never ends."""
    ends = [match.end() for match in THOUGHT_ENDS.finditer(text)]
    rest = text[ends[-1] :] if ends else text
    unfinished = THOUGHT_BEGINS.search(rest)
    return rest[: unfinished.start()] if unfinished else rest
