r"""Answers that are hard to compare, with the verdict that a person would give.

A person who knows the problem forgives how an answer is written, and not what it says.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from nemo_trd.config.evaluation import EvaluationConfig
from nemo_trd.config.load import compose_as
from nemo_trd.evaluate.judging import JudgePool
from nemo_trd.verifiers import math_worker
from nemo_trd.verifiers.judgement import RIGHT, Judgement
from nemo_trd.verifiers.math import MathJudge
from nemo_trd.verifiers.math_worker import MathWorker

# What is in the box ("text around": the whole text), and the expected answer.
RIGHT_ANSWERS = {
    "fractions": [
        (r"\dfrac{6}{8}", r"\frac{3}{4}"),
        (r"-\frac{1}{2}", r"\frac{-1}{2}"),
        (r"\frac12", "0.5"),
        (r"1\frac{1}{2}", r"\frac{3}{2}"),
        ("3/4", "0.75"),
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
        (r"\frac{x^2-1}{x-1}", "x+1"),
    ],
    "intervals": [
        ("[0, 1)", "[0,1)"),
        (r"(-\infty, 2]", r"(-\infty,2]"),
        ("(−∞, 2]", r"(-\infty,2]"),
        (r"(-\infty,-1)\cup(1,\infty)", r"(1,\infty)\cup(-\infty,-1)"),
        (r"x \in [2, 5]", "[2,5]"),
        (r"\left[0,\frac12\right]", "[0,0.5]"),
        ("1 < x < 3", "(1,3)"),
        ("-∞ < x ≤ 2", r"(-\infty,2]"),
        (r"(2,\infty)", "x > 2"),
    ],
    "units": [
        (r"18 \text{ eggs}", "18"),
        ("18 eggs", "18"),
        (r"5\text{ cm}^2", "5"),
        (r"12\,\mathrm{m/s}", "12"),
        (r"\$18.00", "18"),
        (r"45^\circ", "45"),
        ("45°", "45"),
    ],
    "boxed inside boxed": [
        (r"\boxed{7}", "7"),
        (r"x = \boxed{7}", "7"),
        (r"\text{so } \boxed{12}", "12"),
    ],
    "percent": [
        (r"50\%", r"50\%"),
        ("50%", r"50\%"),
        (r"50\%", "0.5"),
        (r"50\%", "50"),
        ("50", r"50\%"),
        ("0.5", r"50\%"),
        (r"12.5\%", r"\frac{1}{8}"),
    ],
    "scientific and large numbers": [
        (r"3\times 10^8", "300000000"),
        ("1.5 × 10^3", "1500"),
        (r"1.5 \times 10^{-3}", "0.0015"),
        ("1.5e-3", "0.0015"),
        ("3e8", r"3\times 10^8"),
        (r"3\times 10^8", "3e8"),
        (r"6.02 \cdot 10^{23}", r"6.02\times10^{23}"),
        ("1,234,567", "1234567"),
        ("1{,}234", "1234"),
        (r"1\,234", "1234"),
        ("5.0", "5"),
        (".5", "1/2"),
        ("007", "7"),
    ],
    "sets and tuples": [
        (r"\{1,2,3\}", r"\{3,2,1\}"),
        ("1, 2", r"\{1,2\}"),
        ("2, 1", "1,2"),
        (r"3\text{ and }5", "3,5"),
        (r"\frac{1}{2} \text{ or } 2", r"2, \frac12"),
        (r"\pm 2", "2, -2"),
        (r"\emptyset", r"\varnothing"),
        ("(1,2),(3,4)", "(3,4),(1,2)"),
    ],
    "algebra": [
        ("x=5", "5"),
        ("y = 2x + 3", "2x+3"),
        ("y = x", "x"),
        ("5 = x", "5"),
        ("x^2+2x+1", "(x+1)^2"),
        (r"\sqrt{50}", r"5\sqrt{2}"),
        ("2+3i", "3i+2"),
        ("2·3x", "6x"),
        (r"\binom{5}{2}", "10"),
        ("10!", "3628800"),
        (r"\log_2 8", "3"),
        (
            r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
            r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        ),
    ],
    "words and letters": [
        (r"\text{(A)}", "A"),
        (r"\textbf{(B)}", "B"),
        (r"\text{Yes}", "yes"),
        ("2:3", "2:3"),
    ],
    "bases": [
        (r"1011_{\text{two}}", "1011_2"),
        ("1011₂", "1011_{2}"),
        ("1011", "1011_2"),
        (r"2516_{\text{base }8}", "2516_8"),
        ("2A in base 16", "2A_{16}"),
    ],
    "brackets": [
        (r"\left\{ 2, 1 \right\}", r"\{1,2\}"),
        ("1, 2", "(1,2)"),
        (r"\langle 1,2\rangle", "(1,2)"),
        (r"\{(1,2),(3,4)\}", "(1,2),(3,4)"),
        ("]1,2[", "(1,2)"),
        ("[1,2)", "[1, 2)"),
    ],
    "compound units": [
        (r"2\text{ hours }30\text{ minutes}", r"150\text{ minutes}"),
        ("2 hours and 30 minutes", "2.5"),
        ("5 feet 6 inches", "66 inches"),
        ("5'6\"", "5.5 feet"),
        ("2 dollars and 50 cents", r"\$2.50"),
        (r"\frac{1}{2} \text{ hour}", "30 minutes"),
        ("90 seconds", "1 minute 30 seconds"),
        ("7 1/2 cups", "7.5"),
        ("45°C", "45"),
        ("60 mph", "60 miles per hour"),
        (r"5\text{ cm}^2", "5 square centimeters"),
        (r"36\pi \text{ cm}^3", r"36\pi"),
    ],
    "letters at the end": [
        ("t*7", "7t"),
        ("4ba", "4ab"),
        (r"h \pi r^2", r"\pi r^2 h"),
        (r"5\sqrt{2} \text{ m}", r"5\sqrt{2}"),
        (r"5\pi cm", r"5\pi"),
        (r"5\pi m", r"5\pi"),
        ("10^{5} m", "10^5"),
        ("5m", "5"),
        ("6s", "6"),
    ],
    "signs of Unicode": [
        ("2√3", r"2\sqrt{3}"),
        ("∛27", "3"),
        ("(1+√5)/2", r"\frac{1+\sqrt{5}}{2}"),
        ("x²", "x^2"),
        ("2½", "5/2"),
        ("2π", "2pi"),
        ("2·10⁵", "200000"),
        ("−5", "-5"),
        ("４２", "42"),
        ("42\u200f", "42"),
        ("٣٫٥", "3.5"),
        ("1٬234", "1234"),
        ("١، ٢", "1, 2"),
        ("٥٠٪", r"50\%"),
    ],
    "colours": [
        (r"\textcolor{red}{5}", "5"),
        (r"\color{blue}{\frac12}", "1/2"),
        (r"\color{red}5", "5"),
        (r"\textcolor{red}{\text{Yes}}", "yes"),
    ],
    "mixed numbers": [
        ("1 1/2", "3/2"),
        ("2 2/3", r"2\frac{2}{3}"),
        ("-1 1/2", "-1.5"),
        (r"x = 2 \frac23", "8/3"),
    ],
    "groups of digits": [
        ("1 234 567", "1234567"),
        (r"1\,234\,567", "1,234,567"),
        ("1\u202f234\u202f567", "1234567"),
        ("1.234.567", "1{,}234{,}567"),
        ("1,000, 2,000", "1000, 2000"),
        ("1{,}000, 2{,}000", "1000, 2000"),
        (r"1,000 \text{ and } 2,000", "1000, 2000"),
        ("(1,234)", "(1, 234)"),
        ("(1, 2), (3,400)", "(1,2),(3,400)"),
    ],
    "choices": [
        (r"\textbf{(C)}\ 42", "C"),
        (r"\textbf{(C)}\ 42", "42"),
        ("C) 42", r"\text{(C)}"),
        (r"\mathrm{C}", "C"),
        ("42", "(C) 42"),
        ("(A) and (C)", "A, C"),
    ],
    "repeating decimals": [(r"0.1\overline{6}", r"\frac{1}{6}"), ("0.333...", "1/3")],
    "times of day": [(r"3:30\text{ p.m.}", "3:30 PM")],
    "numbers in words": [
        ("twelve", "12"),
        ("21", r"\text{twenty-one}"),
        ("5 million", "5,000,000"),
        ("5 million", "5"),
        ("2.5 billion", "2500 million"),
        (r"70 \text{ thousand dollars}", "70000"),
        ("5000000 people", "5 million people"),
    ],
    "large, but somebody's": [
        ("2^{2024}", "4^{1012}"),
        ("100!", r"100 \cdot 99!"),
        ("3^{1000}-1", "9^{500}-1"),
        ("7!!", "105"),
        ("10^{10^{3}}", "10^{1000}"),
        ("(1+x)^{2024}", "(x+1)^{2024}"),
    ],
    "the imaginary unit": [(r"e^{i\pi}", "-1"), ("(1+i)^2", "2i")],
    "text around": [
        (r"\fbox{7}", "7"),
        ("The answer is (D).", "D"),
        ("Options (A) and (B) are wrong. I choose (D).", "D"),
        ("**Answer: C**", "C"),
        ("The answer is B because A is too small.", "B"),
        ("The answer is 2√3.", r"2\sqrt{3}"),
        ("The answer is 1 1/2.", "1.5"),
        ("So it takes 2 hours 30 minutes.", "150 minutes"),
        ("<reasoning>C or D?</reasoning><answer> C </answer>", "C"),
        (r"so \boxed{2} and \boxed{3}", "2,3"),
        (r"<think>maybe \boxed{5}</think> It is \boxed{6}", "6"),
        (r"[THINK]maybe \boxed{5}[/THINK]The answer is 6.", "6"),
        (r"The answer is \boxed{42}. I am confident.", "42"),
        ("**Answer:** 42", "42"),
        (r"Therefore, the final answer is $\frac{3}{4}$.", "3/4"),
        (r"It costs $\$5$ so the answer is $\boxed{\$5}$.", "5"),
        ("So she has 3 apples and 4 pears, 7 in total.", "7"),
        ("Now we know.\n#### 1,234", "1234"),
        ("The answer is 12. Wait, no, it is 13", "13"),
        ("Step 1: the sum is 3.\nStep 2: twice that. It takes 6 days", "6"),
        ("It is not 12. It is 13", "13"),
        ("Therefore we have $7t$ for all", "7t"),
        ("#### Step 3: the total\n9 × 2 = 18\n\nJanet makes $18 every day.", "18"),
        ("#### Conclusion\nThe answer is \\(42\\).", "42"),
        ("#### Final Answer\n\n**18**", "18"),
        ("#### 18 eggs\nThat is all of them.", "18"),
        ("So they meet.\n#### Yes", "Yes"),
    ],
}
WRONG_ANSWERS = {
    "fractions": [("0.33", "1/3"), (r"\frac{3}{4}", r"\frac{4}{3}")],
    "intervals": [("[0,1]", "[0,1)"), ("(0,1)", "[0,1]"), ("x>3", r"(2,\infty)")],
    "units": [(r"17 \text{ eggs}", "18")],
    "boxed inside boxed": [(r"\boxed{7}", "8")],
    "percent": [(r"5\%", r"50\%"), ("0.05", r"50\%"), (r"10\%", "1"), (r"\%", "5")],
    "scientific and large numbers": [
        (r"3\times10^8", r"3\times 10^9"),
        ("1e400", "5"),
        ("0.123456789", "0.123456788"),
        ("12345678901234567890", "12345678901234567891"),
    ],
    "sets and tuples": [(r"\{1,2\}", r"\{1,2,3\}"), ("(1,2)", "(2,1)")],
    "algebra": [
        ("x^2+1", "(x+1)^2"),
        ("-5", "5"),
        ("3.14159", r"\pi"),
        ("x = y", "x"),
        ("5 or more", "5"),
        (r"\neq 5", "5"),
        ("5+", "5"),
        ("> 5", "5"),
        (r"\ge 5", "5"),
        (r"\leq 5", "5"),
        ("5<", "5"),
        (r"x \ge 2", "x > 2"),
        (
            r"\begin{pmatrix}1&2\\3&5\end{pmatrix}",
            r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        ),
    ],
    "words and letters": [("No", "Yes"), ("2:3", "3:2"), (r"\text{None}", "0")],
    "bases": [
        ("1011_2", "1011_3"),
        ("1011_{2}", r"1011_{\text{three}}"),
        ("11", "1011_2"),
        ("13_8", "1011_2"),
    ],
    "brackets": [
        ("(1,2)", r"\{1,2\}"),
        (r"\{1,2\}", "(1,2)"),
        ("[1,2]", r"\{1,2\}"),
        ("[1,2)", "[1,2]"),
        (r"(0,\{1,2\})", "(0,(1,2))"),
    ],
    "compound units": [
        (r"2\text{ hours }30\text{ minutes}", "2"),
        (r"2\text{ hours }30\text{ minutes}", "30"),
        ("2 hours", "2 hours 30 minutes"),
        ("5 feet 6 inches", "5"),
        ("30 minutes", "30 hours"),
        (r"5\sqrt{2} \text{ cm}", r"5\sqrt{2} \text{ m}"),
        ("5 kg", "5 cm"),
        ("45°C", "45°F"),
    ],
    "letters at the end": [
        (r"\pi r^2", r"\pi r^2 h"),
        ("8", "10-2t"),
        ("x+2", "x + 2h"),
        (r"\frac{3}{2}g", r"\frac{3}{2}t"),
        ("7", "7t"),
        ("4", "4ab"),
        ("m", "m g"),
        ("a + c", "a + b + c"),
    ],
    "signs of Unicode": [("2√3", "2"), ("2√3", r"2\sqrt{5}"), ("−5", "5")],
    "colours": [(r"\textcolor{red}{5}", "6")],
    "mixed numbers": [("1 1/2", "11/2"), ("1 1/2", "1"), ("2 2/3", "4/3")],
    "groups of digits": [("1 234 567", "1234568"), ("1 2", "12"), ("(1,234)", "1234")],
    "choices": [(r"\textbf{(C)}\ 42", "D"), ("(A) and (C)", "A"), ("C = 5", "C"), ("A", "42")],
    "times of day": [("3:30 AM", "3:30 PM")],
    "numbers in words": [("thirteen", "12"), ("3 thousand", "3 million"), ("5 million", "6")],
    "large, but somebody's": [("2^{2024}", "2^{2023}")],
    "text around": [
        (r"I think 17. No wait, it is \boxed{19}", "17"),
        (r"<think>maybe \boxed{5}, no wait", "5"),
        (r"maybe \boxed{5}, no wait</think>", "5"),
        (r"<think>\boxed{5}</think> It is \boxed{6}.", "5"),
        (r"<|begin_of_thought|>It is \boxed{5}. Let me check", "5"),
        ("Options (A) and (B) are wrong.", "A"),
        ("The answer is 2√3.", "2"),
        ("It is a", "A"),
        ("The answer is A cat.", "A"),
        ("The answer is not (A).", "A"),
        ("The answer is not 12.", "12"),
        ("The answer is 12. Wait, no, it is 13", "12"),
        ("Is the answer 42? I do not know.", "42"),
        ("The answer is at least $42$.", "42"),
        ("The answer is between 5 and 7", "7"),
        ("5 is not the answer", "5"),
        ("So it grows.\n**Step 2:** we", "2"),
        ("2. Then we", "2"),
        ("#### 2. Money\nThe answer is 7.", "2"),
        ("#### Case 2: x=3\nThe answer is 7.", "3"),
        ("Therefore we have $7$ for all", "7t"),
        ("Therefore we have $7t$ for all", "7"),
    ],
}


def _pair(kind: str, said: str, answer: str) -> tuple[str, str]:
    return (said if kind == "text around" else rf"\boxed{{{said}}}"), answer


Asked = tuple[tuple[str, str], bool]  # (text, expected answer), verdict
PAIRS: list[Asked] = [
    (_pair(kind, *case), verdict)
    for cases, verdict in ((RIGHT_ANSWERS, True), (WRONG_ANSWERS, False))
    for kind, of_kind in cases.items()
    for case in of_kind
]
ASKED = [pair for pair, _ in PAIRS]


def check(verdicts: list[bool | None], pairs: list[Asked] = PAIRS) -> None:
    found = zip(pairs, verdicts, strict=True)
    assert [pair for (pair, expected), verdict in found if verdict is not expected] == []


def test_verdicts_are_those_of_a_person_in_the_main_thread() -> None:
    judge = MathJudge()
    try:
        check([judge(*pair).correct for pair in ASKED])
    finally:
        judge.worker.stop()


def test_verdicts_are_the_same_in_a_worker_process() -> None:
    program = (
        "import json, sys, threading\n"
        "from nemo_trd.verifiers.select import verifier\n"
        "verdicts = []\n"
        "def work():\n"
        "    verdicts.extend(verifier('math')(*pair) for pair in json.load(sys.stdin))\n"
        "thread = threading.Thread(target=work)\n"  # where no signal handler would run
        "thread.start(); thread.join()\n"
        "json.dump(verdicts, sys.stdout)\n"
    )
    command = [sys.executable, "-c", program]
    ended = subprocess.run(
        command, input=json.dumps(ASKED), capture_output=True, text=True, timeout=240, check=True
    )
    check(json.loads(ended.stdout))


DEGENERATE = [
    "9^{9^{9^9}}",
    "9^9^9^9",
    "10^{10^{10}}",
    "2**(10**10)",
    "2^{-10^{10}}",
    "x^{10^{10}}",
    "10¹⁰⁰⁰⁰⁰⁰",
    "1000000!",
    "(x+1)^{99999}",
    "(x+1)^{100}" * 9,
    "(x+y+z+w)^{300}",
    r"\sqrt{10^{9999}+1}",
    r"\cos(\cos(\cos(\cos(\cos(1)))))",
    "9!!!!",
    "(10^{9})!",
    r"\binom{10^9}{5\cdot 10^8}",
    r"\prod_{k=1}^{10^9} k",
    "a" * 20_000,
    "1" * 20_000,
    "1+" * 10_000 + "1",
    "(" * 40 + "1" + ")" * 40,
    r"\frac{1}{1+" * 40 + "1" + "}" * 40,
    r"\sqrt{" * 500 + "2" + "}" * 500,
    r"\begin{pmatrix}" + r"1&2\\" * 1000 + r"\end{pmatrix}",
    "{" * 20_000,
]


def test_degenerate_answers_are_refused_by_their_size_before_they_are_parsed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judge = MathJudge()
    monkeypatch.setattr(judge.worker, "compare", None)  # whoever calls it raises TypeError
    boxed = [rf"\boxed{{{answer}}}" for answer in DEGENERATE[:-1]] + [r"\boxed" + DEGENERATE[-1]]
    announced = [f"The answer is ${answer}$." for answer in DEGENERATE[:17]]
    started = time.process_time()
    reasons = [judge(text, "5").reason for text in boxed + announced]
    assert time.process_time() - started < 2.0
    assert reasons == ["too_large"] * 42
    assert judge(r"\boxed{10^{10^{10}}}", "10^{10^{10}}") == RIGHT
    assert judge(r"\boxed{10^{10^{10}}+1}", "10^{10^{10}}").correct is not True


@contextmanager
def busy_machine() -> Iterator[None]:
    """Three times as many processes that only compute as there are cores."""
    command = [sys.executable, "-c", "while True: pass"]
    hogs = [subprocess.Popen(command) for _ in range(3 * (os.cpu_count() or 1))]
    try:
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


def test_verdicts_are_the_same_under_load() -> None:
    overrides = ["model.path=x", "benchmark=gsm8k", "verification.math_timeout_seconds=1"]
    config = compose_as(EvaluationConfig, overrides, "evaluate")
    asked = PAIRS[::5]  # of every kind some; each takes the longer the busier the machine
    found: dict[int, bool | None] = {}
    with busy_machine(), JudgePool(config) as pool:
        for number, (pair, _) in enumerate(asked):

            def keep(judgement: Judgement, number: int = number) -> None:
                found[number] = judgement.correct

            pool.submit("math", *pair, keep)
        pool.finish(progress=False)
    check([found[number] for number in range(len(asked))], asked)


def compare_while_stopped(
    worker: MathWorker, seconds: float, clock_to_cpu: int = math_worker.CLOCK_TO_CPU
) -> Judgement:
    """What comes of a comparison whose process gets no processor for the first `seconds`.

    `clock_to_cpu`: as `math_worker.CLOCK_TO_CPU`, for this comparison alone.
    """
    assert worker.compare("$x + x$", "$2x$") == RIGHT
    assert worker._process is not None
    stopped = worker._process
    stopped.send_signal(signal.SIGSTOP)
    timer = threading.Timer(seconds, lambda: stopped.send_signal(signal.SIGCONT))
    timer.start()
    started = time.monotonic()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(math_worker, "CLOCK_TO_CPU", clock_to_cpu)
            verdict = worker.compare("$x + x$", "$2x$")
        assert time.monotonic() - started >= 1.0  # it did wait
        return verdict
    finally:
        timer.cancel()
        timer.join()


def test_a_comparison_that_waits_for_a_processor_is_not_late() -> None:
    worker = MathWorker(timeout_s=0.5)
    try:
        assert compare_while_stopped(worker, 1.5) == RIGHT
    finally:
        worker.stop()


def test_a_comparison_that_waits_for_ever_is_given_up() -> None:
    worker = MathWorker(timeout_s=0.5)
    try:
        assert compare_while_stopped(worker, 60.0, clock_to_cpu=3) == Judgement(None, "timeout")
        assert worker.compare("$x + x$", "$2x$") == RIGHT
    finally:
        worker.stop()
