"""What is found out about one answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Judgement:
    """`correct` is None where there is no verdict; `reason` is then one of these:

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
