"""Types of expected answers and of judgements on generated texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class AnswerList:
    """Several final answers to one problem: any of them is right, or all together are."""

    texts: tuple[str, ...]
    needed: Literal["any", "all"]

    def __str__(self) -> str:
        return (" or " if self.needed == "any" else " and ").join(self.texts)


Answer = str | AnswerList


@dataclass(frozen=True)
class Judgement:
    """Verdict of a judge and its reason.

    `correct` is None where there is no verdict; `reason` is then one of these:

    error     the check itself failed, or its process died
    timeout   it did not end in time
    aborted   the generator gave the sample up
    unknown   there is nothing to compare with
    """

    correct: bool | None
    reason: str  # "right", or in which way it is wrong: "wrong_answer", "no_answer", ...


RIGHT, WRONG = Judgement(True, "right"), Judgement(False, "wrong_answer")
NO_ANSWER = Judgement(False, "no_answer")
TOO_LARGE = Judgement(False, "too_large")  # longer, deeper or larger than any answer

Judge = Callable[[str, str], Judgement]  # (generated text, expected answer)
