"""Decides whether a generated program passes the tests of its problem.

Programs run in `nemo_trd.verifiers.sandbox`, and expected outputs never enter it: the programs'
outputs come out as text or plain data and are compared here. Tests that are programs themselves
run in a second sandbox, and only the arguments and results of calls pass between the two. So
nothing that a generated program does to its own interpreter can turn into a verdict.

Whatever goes wrong once the program has been given to its sandbox counts against it. There is no
verdict only where the sandbox or the tests themselves fail.
"""

from __future__ import annotations

import json
import logging
import math
import re
import signal
import textwrap
import time
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from pathlib import Path
from typing import Any

from nemo_trd.config.schema import Sandbox
from nemo_trd.verifiers import code_script
from nemo_trd.verifiers.code_tests import CodeTests, read_tests
from nemo_trd.verifiers.judgement import Judgement
from nemo_trd.verifiers.sandbox import SandboxBroken, SandboxedPython, Stopped
from nemo_trd.verifiers.thoughts import without_thoughts

log = logging.getLogger(__name__)

SCRIPT = Path(code_script.__file__).read_text()
FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([^\s`]*)[^\n]*$", re.MULTILINE)
CPU_LIMIT = 128 + signal.SIGXCPU  # exit status
LANGUAGES = ("", "python", "python3", "py")
FLOAT_TOLERANCE = {"rel_tol": 1e-7, "abs_tol": 1e-6}  # for outputs of a reference solution


class TestsBroken(Exception):
    """The problem's tests do not work, so there is no verdict on the program."""


class _Failed(Exception):
    """The program failed; the message is the reason of the judgement."""


def judge_code(text: str, answer: str, limits: Sandbox) -> Judgement:
    """Run the program in `text` on the tests in `answer` (see `code_tests`).

    Reasons of a wrong verdict: no_code, wrong_answer, runtime_error, time_limit, memory_limit,
    output_limit. No verdict, reason "error", where the sandbox or the tests fail.
    """
    try:
        tests = read_tests(answer)
    except ValueError as error:
        return _no_verdict(error)
    code = extract_code(text, tests.entry_point)
    if code is None:
        return Judgement(False, "no_code")
    code = textwrap.dedent(code)  # a block below an item of a list is indented
    run = {"stdin": _run_stdin, "functions": _run_functions, "program": _run_program}[tests.kind]
    try:
        run(code, tests, limits)
    except _Failed as failure:
        return Judgement(False, str(failure))
    except (SandboxBroken, TestsBroken) as error:
        return _no_verdict(error)
    except (ValueError, RecursionError, OverflowError):  # its results cannot even be compared
        return Judgement(False, "wrong_answer")
    return Judgement(True, "right")


def _no_verdict(error: Exception) -> Judgement:
    log.warning("no verdict on a program: %s", error)
    return Judgement(None, "error")


def extract_code(text: str, entry_point: str = "") -> str | None:
    """Last complete fenced block of Python outside thoughts.

    Blocks that are tagged as Python go before those without a tag, which may show its output.
    Where blocks name the entry point, the last of those.
    """
    text = without_thoughts(text)
    blocks: list[tuple[bool, str]] = []  # whether it is tagged
    opened: re.Match[str] | None = None
    for fence in FENCE.finditer(text):
        if opened is None:
            opened = fence
        elif fence[1].startswith(opened[1]) and not fence[2]:
            if opened[2].lower() in LANGUAGES:
                blocks.append((bool(opened[2]), text[opened.end() + 1 : fence.start()]))
            opened = None
    naming = [block for block in blocks if entry_point and entry_point in block[1]]
    candidates = naming or blocks
    tagged = [block for block in candidates if block[0]]
    return (tagged or candidates)[-1][1] if candidates else None


# --- programs that read stdin ---


def _run_stdin(code: str, tests: CodeTests, limits: Sandbox) -> None:
    clock = _Clock(limits)
    for stdin, expected in zip(tests.inputs, tests.outputs, strict=True):
        with SandboxedPython(SCRIPT, ["program"], limits) as program:
            data = _with_length(code) + stdin.encode()
            try:
                output = program.exchange(data, "end", clock.next_case())
            except Stopped as stopped:
                raise _Failed(_how(stopped, program)) from None
            if program.status:
                raise _Failed(_how(None, program))
        if not same_output(output.decode(errors="replace"), expected):
            raise _Failed("wrong_answer")


def same_output(output: str, expected: str) -> bool:
    """Compare outputs line by line, without white space around them; numbers by exact value."""
    lines = [[line.strip() for line in text.strip().split("\n")] for text in (output, expected)]
    if len(lines[0]) != len(lines[1]):
        return False
    return all(a == b or _same_numbers(a, b) for a, b in zip(*lines, strict=True))


def _same_numbers(output: str, expected: str) -> bool:
    try:
        expected_numbers = [Decimal(word) for word in expected.split()]
        return [Decimal(word) for word in output.split()] == expected_numbers
    except InvalidOperation:
        return False


# --- functions ---


class _Functions:
    """Functions of a program, called in a sandbox."""

    def __init__(self, code: str, limits: Sandbox, clock: _Clock) -> None:
        self._python = SandboxedPython(SCRIPT, ["functions"], limits)
        self._code, self._clock = code, clock

    def __enter__(self) -> _Functions:
        self._python.__enter__()
        try:
            self._read(_with_length(self._code))
        except BaseException:
            self._python.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._python.kill()

    def call(self, name: str, arguments: list[Any]) -> Any:
        """Call a function of the program.

        Raises:
            _Failed: "runtime_error" when the function raises anything; or a limit.
        """
        reply = self.forward([name, code_script.encode(arguments), code_script.encode({})])
        if "error" in reply:
            raise _Failed("runtime_error")
        return _decode(reply)

    def forward(self, call: Any) -> dict[str, Any]:
        """Reply to an encoded call: {"value": ...} or {"error": [type, message]}."""
        return self._read(json.dumps(call).encode() + b"\n", raising=False)

    def _read(self, data: bytes, raising: bool = True) -> dict[str, Any]:
        try:
            line = self._python.exchange(data, "line", self._clock.next_case())
        except Stopped as stopped:
            raise _Failed(_how(stopped, self._python)) from None
        try:
            reply = json.loads(line)
            if isinstance(reply, dict) and "value" in reply:
                return {"value": reply["value"]}
            kind, message = reply["error"]
            reply = {"error": [str(kind), str(message)]}
        except (ValueError, TypeError, KeyError, RecursionError):  # not written by our script
            raise _Failed("runtime_error") from None
        if raising:
            raise _Failed("runtime_error")
        return reply


def _decode(reply: dict[str, Any]) -> Any:
    try:
        return code_script.decode(reply["value"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _Failed("runtime_error") from None


def _run_functions(code: str, tests: CodeTests, limits: Sandbox) -> None:
    expected = tests.outputs
    if tests.reference is not None:
        followed = [tests.reference, tests.entry_point, tests.inputs]
        expected = _reference_outputs(json.dumps(followed), limits)
    with _Functions(code, limits, _Clock(limits)) as functions:
        for arguments, expected_result in zip(tests.inputs, expected, strict=True):
            result = functions.call(tests.entry_point, arguments)
            if tests.reference is not None:
                same = same_value(result, expected_result, tests.tolerance)
            else:
                result = _as_json(result)
                same = result == expected_result or [result] == expected_result
            if not same:
                raise _Failed("wrong_answer")


@lru_cache(maxsize=1024)
def _reference_outputs(tests: str, limits: Sandbox) -> tuple[Any, ...]:
    """Results of the reference solution; `tests` is JSON of [solution, entry point, inputs]."""
    reference, entry_point, inputs = json.loads(tests)
    try:
        with _Functions(reference, limits, _Clock(limits)) as functions:
            return tuple(functions.call(entry_point, arguments) for arguments in inputs)
    except _Failed as failure:
        raise TestsBroken(f"the reference solution of {entry_point} fails: {failure}") from None


def same_value(result: Any, expected: Any, tolerance: float) -> bool:
    """Compare types and values; floats up to `tolerance`, or up to rounding errors."""
    if isinstance(expected, float) and isinstance(result, int | float):
        if isinstance(result, bool):
            return False
        limits = FLOAT_TOLERANCE | ({"abs_tol": tolerance} if tolerance else {})
        try:
            both_nan = math.isnan(expected) and math.isnan(result)
            return both_nan or math.isclose(result, expected, **limits)
        except OverflowError:  # an int beyond all floats
            return False
    if isinstance(expected, list | tuple):
        return (
            type(result) is type(expected)
            and len(result) == len(expected)
            and all(same_value(a, b, tolerance) for a, b in zip(result, expected, strict=True))
        )
    if isinstance(expected, dict):
        return (
            isinstance(result, dict)
            and result.keys() == expected.keys()
            and all(same_value(result[key], expected[key], tolerance) for key in expected)
        )
    return result == expected


def _as_json(value: Any) -> Any:
    """Turn tuples into lists and keys into texts, as in expected values from JSON."""
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items()}
    return value


# --- tests that are programs ---


def _run_program(code: str, tests: CodeTests, limits: Sandbox) -> None:
    calls, message = 0, _with_length(tests.test)
    with (
        SandboxedPython(SCRIPT, ["tests", tests.entry_point], limits) as judge,
        _Functions(code, limits, _Clock(limits)) as functions,
    ):
        clock = _Clock(limits)
        while True:
            try:
                request = json.loads(judge.exchange(message, "line", clock.left()))
            except Stopped as stopped:
                raise _blame(calls, _how(stopped, judge), stopped.reason) from None
            except ValueError:
                raise TestsBroken("they write into the channel of their verdict") from None
            if "call" not in request:
                break
            message = json.dumps(functions.forward(request["call"])).encode() + b"\n"
            calls += 1
    if "broken" in request:
        raise TestsBroken(request["broken"])
    if not request["passed"]:
        raise _blame(calls, "wrong_answer", request["error"])


def _blame(calls: int, reason: str, cause: str) -> Exception:
    """Error for failed tests; before their first call they have failed by themselves."""
    return _Failed(reason) if calls else TestsBroken(f"the tests fail by themselves: {cause}")


def _how(stopped: Stopped | None, python: SandboxedPython) -> str:
    """Reason of a verdict on a program that was stopped, or ended by itself."""
    if stopped is not None and stopped.reason != "ended":
        return stopped.reason
    return "time_limit" if python.status == CPU_LIMIT else "runtime_error"


class _Clock:
    """Seconds left for the next step of one program."""

    def __init__(self, limits: Sandbox) -> None:
        self._case = limits.case_seconds
        self._end = time.monotonic() + limits.total_seconds

    def left(self) -> float:
        return self._end - time.monotonic()

    def next_case(self) -> float:
        return min(self._case, self.left())


def _with_length(code: str) -> bytes:
    data = code.encode(errors="replace")
    return len(data).to_bytes(8, "big") + data
