"""Verifiers: is the final answer of a generated text right?

A verdict is True, False, or None. None says that there is no verdict (verifier "none", or the
comparison failed or ran out of time): it is neither right nor wrong, and whoever counts must
count it apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

Verifier = Callable[[str, str], bool | None]  # (generated text, expected answer)


def verifier(name: Literal["math", "exact", "none"]) -> Verifier:
    """The verifier that `data.verifier` names. All of them may be called from any thread."""
    if name == "math":
        from nemo_trd.verifiers.math import same_mathematics

        return same_mathematics
    return same_words if name == "exact" else no_verdict


def same_words(text: str, answer: str) -> bool:
    """Whether the text ends in the words of the answer.

    The final answer is what follows the last "#" ("# 10", "#### 42"), or without any "#" as
    many last words as the answer has. White space does not matter, case does.
    """
    wanted = answer.split()
    if "#" in text:
        return text.rpartition("#")[2].split() == wanted
    return bool(wanted) and text.split()[-len(wanted) :] == wanted


def no_verdict(text: str, answer: str) -> None:
    """For data without answers."""
    return None
