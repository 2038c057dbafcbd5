"""Verifiers: decide whether the final answer of a generated text is right.

A `Judge` gives the reason too, a `Verifier` only the verdict: True, False, or None. None means no
verdict (verifier "none", or the check failed or ran out of time): neither right nor wrong, so it
must be counted apart. Here: `math`, `code` in its `sandbox`, exact words. May import config. No
models and no prompts: two texts in, a judgement out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import TypeVar

from nemo_trd.config.schema import Sandbox, VerifierName
from nemo_trd.verifiers.judgement import Answer, Judge, Judgement
from nemo_trd.verifiers.several import judge_answer

Verifier = Callable[[str, Answer], bool | None]  # (generated text, expected answer)
Item = TypeVar("Item")
Judged = TypeVar("Judged")
THREADS = 8


@lru_cache
def verifier(name: VerifierName, sandbox: Sandbox | None = None) -> Verifier:
    """Verifier that `data.verifier` names; cached, so that a process has one of each kind.

    Any thread may call it. "code" needs the limits of its sandbox.
    """
    judge = judge_of(name, sandbox)
    return lambda text, answer: judge_answer(judge, text, answer).correct


def judge_of(name: VerifierName, sandbox: Sandbox | None, math_timeout_s: float = 5.0) -> Judge:
    """Judge that `name` stands for: a verifier with reasons.

    A judge of mathematics works on one answer at a time, `math_timeout_s` seconds of processor
    time at most.
    """
    if name == "math":
        from nemo_trd.verifiers.math import MathJudge

        return MathJudge(math_timeout_s)
    if name == "code":
        assert sandbox is not None
        from nemo_trd.verifiers.code import judge_code

        return partial(judge_code, limits=sandbox)
    return _judge_words if name == "exact" else _judge_nothing


def judge_all(judge: Callable[[Item], Judged], items: Iterable[Item]) -> list[Judged]:
    """Apply `judge` to each item in `THREADS` threads: verdicts wait for other processes."""
    with ThreadPoolExecutor(THREADS, thread_name_prefix="verdicts") as threads:
        return list(threads.map(judge, items))


def same_words(text: str, answer: str) -> bool:
    """Whether the text ends in the words of the answer.

    The final answer is what follows the last "#" ("# 10", "#### 42"), or without any "#" as
    many last words as the answer has. White space does not matter, case does.
    """
    expected = answer.split()
    if "#" in text:
        return text.rpartition("#")[2].split() == expected
    return bool(expected) and text.split()[-len(expected) :] == expected


def _judge_words(text: str, answer: str) -> Judgement:
    right = same_words(text, answer)
    return Judgement(right, "right" if right else "wrong_answer")


def _judge_nothing(text: str, answer: str) -> Judgement:
    return Judgement(None, "unknown")
