"""Signs of thought in what models write. What is thought is not said."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from nemo_trd.data.types import Completion

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
_OPENED = re.compile(rf"(?:{THOUGHT_BEGINS.pattern})\s*\Z", re.IGNORECASE)
_OPENING_TOKENS = 32  # at least as many as such a sign has


def without_thoughts(text: str) -> str:
    """What is said after the last thought, or before one that never ends."""
    ends = [match.end() for match in THOUGHT_ENDS.finditer(text)]
    said = text[ends[-1] :] if ends else text
    unfinished = THOUGHT_BEGINS.search(said)
    return said[: unfinished.start()] if unfinished else said


def text_to_judge(text: str, prompt: Sequence[int], completion: Completion, tokenizer: Any) -> str:
    """What of the text of a completion a verifier is to read.

    Nothing where the prompt ends with the sign that opens a thought (as chat templates of models
    that always think do) and the completion has none that ends it: the text shows neither, and a
    \\boxed{} in it would be taken for an answer.
    """
    if not _OPENED.search(tokenizer.decode(list(prompt[-_OPENING_TOKENS:]))):
        return text
    written = tokenizer.decode(list(completion.token_ids)) + completion.tail
    return text if THOUGHT_ENDS.search(written) else ""
