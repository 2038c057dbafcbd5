"""Mathematical equality of final answers, by math-verify in a process of its own.

Symbolic comparison can run for ever or eat the memory, in C code that no signal handler interrupts,
and math-verify's own limit (signal.alarm) works in the main thread only. So plain numbers and equal
texts are compared here, and all else in a worker process that the kernel ends at its limit. The
limit is processor time: a busy machine changes no verdict.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import resource
import selectors
import signal
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

from nemo_trd.verifiers.judgement import Judgement

log = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0  # importing sympy from a cold network file system
CLOCK_TO_CPU = 60  # a comparison that waits, and does not compute, ends after so many limits
MEMORY_LIMIT_BYTES = 4 * 2**30

RIGHT, WRONG = Judgement(True, "right"), Judgement(False, "wrong_answer")
NO_ANSWER = Judgement(False, "no_answer")
NUMBER = re.compile(r"[-+]?(\d{1,3}(,\d{3})+|\d+)?(\.\d+)?([eE][-+]?\d{1,3})?(/\d+)?")
EXPONENT = re.compile(r"([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d{1,3})")  # as programs write numbers
SPACE_IN_NUMBER = re.compile(r"(?<=\d)(?:\\[,;:! ]|~)(?=\d{3}(?!\d))")
PERCENT = re.compile(r"(?<=[\d)}])\s*\\?%$")
UNITS = re.compile(r"(?<=\d)( [A-Za-z]{3,})+$")  # "18 eggs", but not "18 x" or "2 pi"
WORDS = re.compile(r"[A-Za-z]+( [A-Za-z]+)*")
SYNONYMS = {  # what math-verify reads in one way of writing only
    r"\varnothing": r"\emptyset",
    "∅": r"\emptyset",
    "∞": r"\infty ",
    "·": r"\cdot ",
}
TEXT_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}")


class MathJudge:
    """Judges final answers, one at a time, with a worker process of its own."""

    def __init__(self, timeout_s: float = 5.0) -> None:
        self.worker = MathWorker(timeout_s)
        atexit.register(self.worker.stop)

    def __call__(self, text: str, answer: str) -> Judgement:
        """Whether the final answer of `text` equals `answer` as mathematics.

        The final answer is the last \\boxed{...}, or else the line after the last "####", or else
        what math-verify finds in the text: an announced answer, a last formula, a last number.
        A text without any answer is wrong, for the reason "no_answer". Units are not compared. With
        a percent sign on one side only, both 50 and 0.5 equal 50 %.

        There is no verdict, and a warning in the log, when the comparison raised or its process
        died ("error"), when it was stopped after `timeout_s` ("timeout"), or when `answer` is not
        something that can be compared ("error").
        """
        text, answer = _normalised(text), _normalised(answer)
        final = final_answer(text)
        raw_answer = final_answer(answer) or answer
        wanted = _plain(raw_answer)
        given = _plain(final if final is not None else text)
        if not given:
            return NO_ANSWER
        if WORDS.fullmatch(wanted):  # as a formula a word is a product of its letters
            if final is None:
                given = " ".join(given.split()[-len(wanted.split()) :])
            if given.casefold() == wanted.casefold():
                return RIGHT
            if len(wanted) > 1:
                return WRONG
        if final is None:
            return self.worker.compare(text, f"${_undollared(raw_answer)}$")
        if given == wanted:
            return RIGHT
        judgement = self._compare(given, wanted)
        if judgement == WRONG:
            per_cent = [bool(PERCENT.search(side)) for side in (given, wanted)]
            if per_cent == [True, False]:
                judgement = self._compare(_hundredth(given), wanted)
            elif per_cent == [False, True]:
                judgement = self._compare(given, _hundredth(wanted))
        return judgement

    def _compare(self, given: str, wanted: str) -> Judgement:
        numbers = _number(UNITS.sub("", given)), _number(UNITS.sub("", wanted))
        if numbers[0] is not None and numbers[1] is not None:
            return RIGHT if numbers[0] == numbers[1] else WRONG
        return self.worker.compare(f"${_as_formula(given)}$", f"${_as_formula(wanted)}$")


def final_answer(text: str) -> str | None:
    """What stands in the last complete \\boxed{...}, else after the last "####" on its line."""
    for start in reversed([m.end() for m in re.finditer(r"\\f?boxed\s*\{", text)]):
        depth = 1
        for position in range(start, len(text)):
            character = text[position]
            if text[position - 1] != "\\":
                depth += (character == "{") - (character == "}")
            if depth == 0:
                return text[start:position]
    marked = re.findall(r"####[ \t]*(\S[^\n]*)", text)
    return marked[-1] if marked else None


def _normalised(text: str) -> str:
    for written, meant in SYNONYMS.items():
        text = text.replace(written, meant)
    return SPACE_IN_NUMBER.sub("", text)


def _hundredth(percentage: str) -> str:
    return rf"\frac{{{PERCENT.sub('', percentage)}}}{{100}}"


def _as_formula(answer: str) -> str:
    number = EXPONENT.fullmatch(answer)
    return rf"{number[1]} \times 10^{{{number[2]}}}" if number else answer


def _undollared(answer: str) -> str:
    return answer.replace("\\$", "").replace("$", "").strip()


def _plain(answer: str) -> str:
    """Without what does not change the meaning: dollar signs, spaces, \\text, a full stop."""
    words = " ".join(_undollared(answer).split()).rstrip(".").strip()
    only_text = TEXT_COMMAND.fullmatch(words)
    return only_text[1].strip() if only_text else words


def _number(answer: str) -> Fraction | None:
    if not NUMBER.fullmatch(answer) or len(answer) > 100:
        return None
    numerator, _, denominator = answer.replace(",", "").partition("/")
    try:
        return Fraction(numerator) / Fraction(denominator or 1)
    except (ValueError, ZeroDivisionError):  # no digit at all, or n/0
        return None


class MathWorker:
    """A process that compares one pair at a time. Started when first needed, again when killed.

    `timeout_s` is processor time of one comparison.
    """

    def __init__(self, timeout_s: float = 5.0) -> None:
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def compare(self, text: str, answer: str) -> Judgement:
        """Whether an answer found in `text` equals `answer`, both in math-verify's notation.

        Raises:
            RuntimeError: the worker process does not start; its own message is on stderr.
        """
        with self._lock:
            if self._process is None:
                self._start()
            reply = self._ask(text, answer)
        if reply is None:
            return NO_ANSWER
        if isinstance(reply, bool):
            return RIGHT if reply else WRONG
        reason, told = reply
        log.warning("no verdict on the answer %r: %s", answer, told)
        return Judgement(None, reason)

    def stop(self) -> None:
        with self._lock:
            self._kill()

    def _start(self) -> None:
        package_root = str(Path(__file__).parents[2])
        inherited = os.environ.get("PYTHONPATH")
        path = package_root if not inherited else os.pathsep.join((package_root, inherited))
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from nemo_trd.verifiers.math import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the run alone, which finishes its step first
        )
        try:
            self._read(START_TIMEOUT_S)
        except (TimeoutError, EOFError) as error:
            self._kill()
            raise RuntimeError(
                "the process that compares mathematical answers did not start"
            ) from error

    def _ask(self, text: str, answer: str) -> bool | None | tuple[str, str]:
        """The verdict (None: no answer in the text), or why there is none and what happened."""
        assert self._process is not None and self._process.stdin is not None
        line = memoryview(json.dumps([text, answer, self.timeout_s]).encode() + b"\n")
        try:
            while line:  # an unbuffered pipe may take a part only
                line = line[self._process.stdin.write(line) :]
            reply = self._read(CLOCK_TO_CPU * self.timeout_s)
        except TimeoutError:
            self._kill()
            return "timeout", f"stopped after {CLOCK_TO_CPU * self.timeout_s:g} s"
        except (EOFError, BrokenPipeError):
            process = self._process
            self._kill()
            if process.returncode == -signal.SIGPROF:
                return "timeout", f"stopped after {self.timeout_s:g} s of processor time"
            return "error", f"its process died, perhaps out of {MEMORY_LIMIT_BYTES >> 30} GiB"
        return ("error", reply) if isinstance(reply, str) else reply

    def _read(self, timeout_s: float) -> bool | str | None:
        """One reply.

        Raises:
            TimeoutError: there is none in time.
            EOFError: the process has ended.
        """
        assert self._process is not None and self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                raise TimeoutError
        line = self._process.stdout.readline()
        if not line:
            raise EOFError
        return json.loads(line)

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def serve() -> None:
    """The worker: text, answer and limit as JSON a line on stdin; true, false, null or an error
    text a line on stdout. At the limit it dies of SIGPROF.

    It ends with its stdin, so it never outlives the process that asks.
    """
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)  # nothing that a library prints may pass for a reply
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # "timeout is disabled": it is
        _compare("$x$", "$2x$")  # imports and tables belong to the start, not to a limit
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # who asks may use a profiler
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
        print("true", file=replies, flush=True)
        for line in sys.stdin:
            text, answer, timeout_s = json.loads(line)
            signal.setitimer(signal.ITIMER_PROF, timeout_s)
            try:
                reply: bool | str | None = _compare(text, answer)
            except Exception as error:  # the process border: whatever it was goes to the caller
                reply = f"{type(error).__name__}: {error}"[:500]
            signal.setitimer(signal.ITIMER_PROF, 0)
            print(json.dumps(reply), file=replies, flush=True)


def _compare(text: str, answer: str) -> bool | None:
    """None: there is no answer in the text."""
    from math_verify import parse, verify

    gold = parse(answer, parsing_timeout=None, raise_on_error=True)
    if all(isinstance(reading, str) for reading in gold):
        raise ValueError("math-verify cannot read the expected answer")
    found = parse(text, parsing_timeout=None, raise_on_error=True)
    if not found:
        return None
    return verify(
        gold, found, timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True
    )
