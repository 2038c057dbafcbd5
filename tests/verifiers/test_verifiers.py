"""Verdicts on final answers, and that what cannot be decided is never called wrong."""

import json
import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from nemo_trd.verifiers import math_worker
from nemo_trd.verifiers.answer_text import final_answer
from nemo_trd.verifiers.judgement import RIGHT, Judgement
from nemo_trd.verifiers.math import MathJudge
from nemo_trd.verifiers.math_worker import MathWorker
from nemo_trd.verifiers.select import verifier

same_mathematics = verifier("math")
GSM8K = Path(__file__).parents[3] / "shared/data/gsm8k_test.jsonl"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so it is \boxed{\frac{6}{8}}", "3/4"),
        (r"first \boxed{1} then \boxed{2}", "2"),
        (r"\boxed{2\sqrt{12}}", r"4\sqrt{3}"),
        (r"\boxed{\frac{1}{2}} of the set \{1, 2\}", "0.5"),
        (r"\boxed{(1,2)}", "(1, 2)"),
        (r"\boxed{50\%}", "50%"),
        (r"\boxed{18 \text{ eggs}}", "18"),
        (r"\boxed{\text{Paris}}", "paris"),
        (r"\boxed{x = 3}", "3"),
        ("She makes 9 * 2 = 18.\n#### 18", "18"),
        ("#### 70,000", "70000"),
        ("#### $18 \nNow check: 17 + 1", "18"),
        ("#### 18 eggs", "18"),
        ("The answer is 18.", "18"),
        ("The answer is B", "B"),
        ("18", "#### 18"),
    ],
)
def test_math_accepts_equal_answers_however_they_are_written(text: str, answer: str) -> None:
    assert same_mathematics(text, answer) is True


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1} then \boxed{2}", "1"),
        (r"\boxed{0.333}", "1/3"),
        (r"\boxed{Pairs}", "Paris"),  # as products of letters these two are equal
        (r"\boxed{2 x}", "2"),
        ("#### 17", "18"),
        ("18 is wrong\n#### 17", "18"),
        ("no idea", "18"),
        ("The answer is A", "B"),
        (r"\boxed{", "18"),
        (r"\boxed{}", "18"),
        ("", "18"),
    ],
)
def test_math_refuses_other_answers_and_texts_without_one(text: str, answer: str) -> None:
    assert same_mathematics(text, answer) is False


def test_nested_braces_and_unfinished_boxes() -> None:
    assert final_answer(r"\boxed{\frac{1}{\sqrt{2}}} and \boxed{un") == r"\frac{1}{\sqrt{2}}"
    assert final_answer(r"\boxed{\{1\}}") == r"\{1\}"
    assert final_answer("nothing") is None


def test_a_comparison_that_never_ends_is_undecided_and_the_next_one_works(
    caplog: pytest.LogCaptureFixture,
) -> None:
    worker = MathWorker(timeout_s=0.5)
    try:
        with caplog.at_level(logging.WARNING):
            assert worker.compare("$10^{10^{10^{10}}}$", "$5$") == Judgement(None, "timeout")
        assert "no verdict" in caplog.text
        worker.timeout_s = 30.0
        assert worker.compare("$x + x$", "$2x$") == RIGHT
    finally:
        worker.stop()


def test_the_limit_holds_where_its_signal_is_ignored_and_blocked() -> None:
    worker = MathWorker(timeout_s=0.5)
    handler = signal.signal(signal.SIGPROF, signal.SIG_IGN)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF})
    try:
        assert worker.compare("$x + x$", "$2x$") == RIGHT
        started = time.monotonic()
        assert worker.compare("$10^{10^{10^{10}}}$", "$5$") == Judgement(None, "timeout")
        assert time.monotonic() - started < math_worker.CLOCK_TO_CPU * 0.5
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGPROF, handler)
        worker.stop()


def test_a_killed_worker_is_undecided_and_replaced() -> None:
    worker = MathWorker()
    try:
        assert worker.compare("$x + x$", "$2x$") == RIGHT
        assert worker._process is not None
        worker._process.kill()
        worker._process.wait()
        assert worker.compare("$x + x$", "$2x$") == Judgement(None, "error")
        assert worker.compare("$x + x$", "$2x$") == RIGHT
    finally:
        worker.stop()


def test_an_expected_answer_that_is_no_mathematics_is_undecided_not_wrong() -> None:
    assert same_mathematics("the answer is 3", "@@") is None


def test_math_may_be_called_from_many_threads() -> None:
    verdicts: dict[int, list[bool | None]] = {}

    def ask(number: int) -> None:
        verdicts[number] = [same_mathematics(rf"\boxed{{{number}x}}", "3x") for _ in range(20)]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {n: [n == 3] * 20 for n in range(8)}


def test_math_finds_the_answer_of_every_gsm8k_solution() -> None:
    if not GSM8K.exists() and "CI" not in os.environ:
        pytest.skip(f"{GSM8K} is not there")
    for line in GSM8K.read_text().splitlines():
        solution = json.loads(line)["answer"]
        answer = solution.rpartition("####")[2].strip()
        assert same_mathematics(solution, answer) is True, solution
        assert same_mathematics(solution, answer + "1") is False, solution


@pytest.mark.parametrize(
    ("text", "answer", "verdict"),
    [
        ("* p 3 9 = 1 ; # 10", "10", True),
        ("# 10 ; # 4", "10", False),
        ("= 10 ; # 1 0", "10", False),
        ("#### 42\n", " 42 ", True),
        ("it is New  York", "New York", True),
        ("it is York", "New York", False),
        ("it is paris", "Paris", False),
        ("# ", "10", False),
        ("", "10", False),
    ],
)
def test_exact_compares_the_last_words(text: str, answer: str, verdict: bool) -> None:
    assert verifier("exact")(text, answer) is verdict


def test_none_has_no_verdict() -> None:
    assert verifier("none")("#### 3", "3") is None


def test_the_reason_of_a_verdict_is_told() -> None:
    judge = MathJudge()
    assert judge("the answer is 3", "@@") == Judgement(None, "error")
    assert judge("no idea", "18") == judge("", "18") == Judgement(False, "no_answer")
    assert judge("it is 17", "18") == Judgement(False, "wrong_answer")
    judge.worker.stop()
