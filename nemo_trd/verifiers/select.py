"""Selects the verifier that `data.verifier` names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import TypeVar

from nemo_trd.config.schema import Sandbox, VerifierName
from nemo_trd.verifiers.exact import judge_words
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
    if name == "exact":
        return judge_words
    return _judge_nothing


def judge_all(judge: Callable[[Item], Judged], items: Iterable[Item]) -> list[Judged]:
    """Apply `judge` to each item in `THREADS` threads: verdicts wait for other processes."""
    with ThreadPoolExecutor(THREADS, thread_name_prefix="verdicts") as threads:
        return list(threads.map(judge, items))


def _judge_nothing(text: str, answer: str) -> Judgement:
    return Judgement(None, "unknown")
