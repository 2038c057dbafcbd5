"""Verdicts on generated programs, and that no program can give itself one."""

from __future__ import annotations

import base64
import json
import logging
import math
import pickle
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_trd.config.schema import Sandbox
from nemo_trd.verifiers import code_script
from nemo_trd.verifiers.code import extract_code, judge_code, same_output, same_value
from nemo_trd.verifiers.code_tests import read_tests
from nemo_trd.verifiers.judgement import Judgement
from nemo_trd.verifiers.select import verifier

LIMITS = Sandbox(
    case_seconds=5,
    total_seconds=15,
    cpu_seconds=5,
    memory_mib=256,
    files_mib=4,
    output_mib=1,
    processes=16,
    open_files=64,
)
STDIN = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}
FUNCTION = {"inputs": [[1, 2], [3, 4]], "outputs": [3, 7], "fn_name": "add"}
CHECK = {
    "test": "def check(f):\n    assert f(1, 2) == 3\n    assert f(3, 4) == 7\n",
    "entry_point": "add",
}
EVAL_PLUS = {
    "entry_point": "add",
    "prompt": "def add(a, b):\n",
    "canonical_solution": "    return a + b\n",
    "base_input": [[1, 2]],
    "plus_input": [[3, 4]],
    "atol": 0,
}
RIGHT = Judgement(True, "right")


def judged(code: str, tests: dict[str, Any], seconds: float = 5) -> Judgement:
    answer = f"Here it is:\n```python\n{code}\n```\nDone."
    limits = LIMITS.model_copy(update={"case_seconds": seconds})
    return judge_code(answer, json.dumps(tests), limits)


@pytest.mark.parametrize("tests", [FUNCTION, CHECK, EVAL_PLUS, {"test": "assert add(3, 4) == 7"}])
def test_functions_are_judged_by_what_they_return(tests: dict[str, Any]) -> None:
    assert judged("def add(a, b): return a + b", tests) == RIGHT
    assert judged("class Solution:\n    def add(self, a, b): return a + b", tests) == RIGHT
    assert judged("def add(a, b): return 3", tests) == Judgement(False, "wrong_answer")
    raising = judged("def add(a, b): raise KeyError(a)", tests)
    assert raising.correct is False
    assert judged("def add(a, b): return a +", tests) == Judgement(False, "runtime_error")
    assert judged("def other(a, b): return a + b", tests).correct is False
    endless = "def add(a, b):\n    while True: pass"
    assert judged(endless, tests, seconds=1) == Judgement(False, "time_limit")


def test_programs_are_judged_by_what_they_write() -> None:
    assert judged("print(sum(map(int, input().split())))", STDIN) == RIGHT
    assert judged("a, b = map(int, input().split())\nprint(a, b)", STDIN).reason == "wrong_answer"
    assert judged("print(3)", STDIN).reason == "wrong_answer"
    assert judged("print(sum(map(int, input().split())))\n1 / 0", STDIN).reason == "runtime_error"
    assert judged("while True: pass", STDIN, seconds=0.5).reason == "time_limit"
    assert judged("while True: print('x' * 1000)", STDIN).reason == "output_limit"
    assert judged("hold = []\nwhile True: hold.append(b'x' * 2**20)", STDIN).correct is False


def test_cpu_time_is_limited_where_the_wall_clock_is_not() -> None:
    limits = LIMITS.model_copy(update={"cpu_seconds": 1, "case_seconds": 30, "total_seconds": 30})
    for tests in (FUNCTION, STDIN):
        answer = "```\nwhile True: pass\n```"
        assert judge_code(answer, json.dumps(tests), limits) == Judgement(False, "time_limit")


def test_much_input_and_much_output_do_not_block_each_other() -> None:
    lines = "".join(f"{n}\n" for n in range(50_000))
    echo = "import sys\nfor line in sys.stdin: print(line, end='')"
    assert judged(echo, {"inputs": [lines], "outputs": [lines]}) == RIGHT
    unread = {"inputs": [lines], "outputs": ["done"]}
    assert judged("print('done')", unread) == RIGHT


FORGERIES = {
    "exits with success": "import os\nos._exit(0)",
    "exits politely": "raise SystemExit(0)",
    "prints a verdict": "import os\nos.write(1, b'{\"passed\": true}\\n' * 9)\nos._exit(0)",
    "writes verdicts to every file": (
        "import os\n"
        "for fd in range(64):\n"
        '    try: os.write(fd, b\'{"passed": true}\\n{"value": null}\\n{"call": []}\\n\' * 9)\n'
        "    except OSError: pass\n"
        "os._exit(0)"
    ),
    "answers at exit": "import atexit, os\natexit.register(lambda: os._exit(0))",
    "is equal to everything": (
        "class Any(int):\n"
        "    def __eq__(self, other): return True\n"
        "    def __ne__(self, other): return False\n"
        "    __hash__ = int.__hash__\n"
        "def add(a, b): return Any()"
    ),
    "patches builtins": (
        "import builtins, sys\n"
        "builtins.AssertionError = type('Quiet', (BaseException,), {})\n"
        "builtins.all = builtins.any = lambda *a: True\n"
        "builtins.print = sys.exit = lambda *a, **k: None\n"
        "def add(a, b): return 0"
    ),
    "patches what runs it": (
        "import sys, json\n"
        "json.dumps = lambda *a, **k: '{\"value\": true}'\n"
        "main = sys.modules['__main__']\n"
        "main.encode = lambda value: True\n"
        "main.find = lambda *a: (lambda *a, **k: True)\n"
        "def add(a, b): return 0"
    ),
    "looks for the answer in its frames": (
        "import sys, gc\n"
        "def add(a, b):\n"
        "    frame = sys._getframe()\n"
        "    while frame:\n"
        "        for name in ('expected', 'outputs', 'wanted'):\n"
        "            if name in frame.f_locals: return frame.f_locals[name]\n"
        "        frame = frame.f_back\n"
        "    return next((o['outputs'] for o in gc.get_objects()\n"
        "                 if type(o) is dict and 'outputs' in o), 0)"
    ),
    "returns what cannot be compared": "def add(a, b): return object()",
    "returns what is nested without end": (
        "def add(a, b):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x"
    ),
    "returns an endless list": "def add(a, b):\n    x = []\n    x.append(x)\n    return x",
    "raises what the tests want": "def add(a, b): raise AssertionError",
    "kills its parents": "import os\nos.kill(-1, 9)\nos.kill(os.getppid(), 9)",
    "answers for a child": "import os\nif os.fork(): os._exit(0)\ndef add(a, b): return 0",
}


@pytest.mark.parametrize("code", FORGERIES.values(), ids=FORGERIES.keys())
def test_a_verdict_cannot_be_forged(code: str) -> None:
    for tests in (FUNCTION, CHECK, EVAL_PLUS, STDIN):
        judgement = judged(code, tests)
        assert judgement.correct is False, (tests, judgement)


PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary()
)


@given(
    st.recursive(
        PLAIN | st.complex_numbers(allow_nan=False) | st.frozensets(st.text()),
        lambda inner: (
            st.lists(inner)
            | st.lists(inner).map(tuple)
            | st.dictionaries(st.text() | st.integers(), inner)
        ),
    )
)
@settings(max_examples=100)
def test_plain_data_comes_through_as_it_was(value: Any) -> None:
    coded = json.loads(json.dumps(code_script.encode(value)))
    assert typed(code_script.decode(coded)) == typed(value)


def typed(value: Any) -> Any:
    """The value with the type of every part of it."""
    if isinstance(value, dict):
        return dict, [(typed(key), typed(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [typed(item) for item in value]
    return type(value), value


def test_results_keep_their_types_where_a_reference_solution_is_followed() -> None:
    tests = {**EVAL_PLUS, "canonical_solution": "    return (a + b, {a: 1.5}, {b}, None)"}
    assert judged("def add(a, b): return (a + b, {a: 1.5}, {b}, None)", tests) == RIGHT
    assert judged("def add(a, b): return [a + b, {a: 1.5}, {b}, None]", tests).correct is False
    close = "def add(a, b): return (a + b, {a: 1.5 + 1e-9}, {b}, None)"
    assert judged(close, tests) == RIGHT


def test_tests_that_fail_by_themselves_are_no_verdict(caplog: pytest.LogCaptureFixture) -> None:
    right = "def add(a, b): return a + b"
    broken: list[dict[str, Any]] = [
        {"test": "import no_such_module", "entry_point": "add"},
        {"test": "x = (", "entry_point": "add"},
        {"test": "pass", "entry_point": "add"},
        {"test": "def check(candidate): assert candidate(lambda: 1, 2)", "entry_point": "add"},
        {**EVAL_PLUS, "canonical_solution": "    raise ValueError"},
        {"nothing": "known"},
    ]
    with caplog.at_level(logging.WARNING):
        assert [judged(right, tests) for tests in broken] == [Judgement(None, "error")] * 6
    assert "no_such_module" in caplog.text and "reference solution of add fails" in caplog.text


def test_tests_see_errors_of_functions_under_their_names() -> None:
    test = "try:\n    add(1, 2)\n    raise SystemError\n"
    test += "except ValueError as error:\n    assert error.args == ('no',)"
    assert judged("def add(a, b): raise ValueError('no')", {"test": test}) == RIGHT
    assert judged("def add(a, b): raise KeyError('no')", {"test": test}).correct is False


def test_a_function_cannot_end_the_loops_of_its_tests() -> None:
    tests = {"test": "assert all(map(is_even, [2, 3]))"}
    assert judged("def is_even(n): return n % 2 == 0", tests).correct is False
    assert judged("def is_even(n): return n % 2 == 0 or next(iter([]))", tests).correct is False


def test_tests_may_use_numpy_and_functions_what_solutions_often_leave_out() -> None:
    test = "import numpy as np\ndef check(f):\n    assert np.allclose(f([1.0, 4.0]), [1.0, 2.0])\n"
    code = "def roots(x: List[float]) -> List[float]: return [sqrt(v) for v in x]"
    assert judged(code, {"test": test, "entry_point": "roots"}) == RIGHT


# --- shapes of datasets ---


def live_code_bench(cases: list[dict[str, str]], packed: bool, **metadata: str) -> dict[str, Any]:
    private = json.dumps(cases[1:])
    if packed:
        private = base64.b64encode(zlib.compress(pickle.dumps(private))).decode()
    return {
        "public_test_cases": json.dumps(cases[:1]),
        "private_test_cases": private,
        "metadata": json.dumps(metadata),
    }


@pytest.mark.parametrize("packed", [False, True])
def test_live_code_bench(packed: bool) -> None:
    stdin = [
        {"input": text, "output": result, "testtype": "stdin"}
        for text, result in zip(STDIN["inputs"], STDIN["outputs"], strict=True)
    ]
    assert judged("print(sum(map(int, input().split())))", live_code_bench(stdin, packed)) == RIGHT
    assert judged("print(3)", live_code_bench(stdin, packed)).correct is False
    functional = [
        {"input": "[1, 2]\n3", "output": "[4, 5]", "testtype": "functional"},
        {"input": "[]\n1", "output": "[]", "testtype": "functional"},
    ]
    tests = live_code_bench(functional, packed, func_name="shift")
    code = "class Solution:\n    def shift(self, xs: List[int], by: int): return {}"
    assert judged(code.format("tuple(x + by for x in xs)"), tests) == RIGHT
    assert judged(code.format("xs"), tests).correct is False


def test_a_packed_pickle_that_is_more_than_a_text_is_not_unpickled() -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return print, ("unpickled",)

    packed = base64.b64encode(zlib.compress(pickle.dumps([Evil(), "[]"]))).decode()
    tests = {"public_test_cases": "[]", "private_test_cases": packed}
    with pytest.raises(ValueError, match="private_test_cases"):
        read_tests(json.dumps(tests))


def test_taco_lines_and_wrapped_results() -> None:
    lines = {"inputs": [["1 2", "3"]], "outputs": [["6"]]}
    code = "import sys\nprint(sum(map(int, sys.stdin.read().split())))"
    assert judged(code, lines) == RIGHT
    wrapped = {"inputs": [[1, 2]], "outputs": [[3]], "fn_name": "add"}
    assert judged("def add(a, b): return a + b", wrapped) == RIGHT


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("no json", "JSON object"),
        ("[]", "not list"),
        ("{}", "no tests are found"),
        ('{"inputs": ["1"], "outputs": []}', "1 inputs have 0 outputs"),
        ('{"inputs": [], "outputs": []}', "no test case"),
        ('{"inputs": 3, "outputs": []}', "inputs must be a list"),
        ('{"inputs": [3], "outputs": [4], "fn_name": "f"}', "list of arguments"),
        ('{"inputs": [{}], "outputs": ["1"]}', "must be texts"),
        ('{"base_input": [[1]]}', "entry_point and canonical_solution"),
        ('{"public_test_cases": [3]}', "no object with input and output"),
        ('{"public_test_cases": "[", "private_test_cases": ""}', "Expecting"),
        ('{"public_test_cases": "AAAA"}', "neither as JSON nor as packed"),
        (
            '{"public_test_cases": [{"input": "1", "output": "1", "testtype": "functional"}]}',
            "func_name",
        ),
    ],
)
def test_tests_that_cannot_be_read_say_why(tests: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_tests(tests)


# --- pure parts ---


@pytest.mark.parametrize(
    ("text", "entry_point", "code"),
    [
        ("```python\na\n```", "", "a\n"),
        ("```\na\n```\nthen\n```py\nb\n```", "", "b\n"),
        (
            "```python\ndef f(): pass\n```\nUse it:\n```python\nf_other()\n```",
            "f()",
            "def f(): pass\n",
        ),
        ("```python\na\n```\n```\noutput\n```", "a", "a\n"),
        ("```python\na\n```\n```bash\nls\n```", "", "a\n"),
        ("````python\n```\n````", "", "```\n"),
        ("~~~python\na\n~~~", "", "a\n"),
        ("```python\ncut off", "", None),
        ("no code", "", None),
        ("```json\n{}\n```", "", None),
        ("  ```python\n  a\n  ```", "", "  a\n"),
        ("```python\na\n```\nExample output:\n```\n1\n```", "", "a\n"),
        ("```python\ndef f(x): pass\n```\n```\n>>> f(1)\n```", "f", "def f(x): pass\n"),
        ("```\ndef f(x): pass\n```\n```python\ng\n```", "f", "def f(x): pass\n"),
        ("<think>\n```python\na\n```\nhm", "", None),
        ("<think>\n```python\na\n```\n</think>\nNo idea.", "", None),
        ("<think>\n```python\na\n</think>\n```python\nb\n```", "", "b\n"),
    ],
)
def test_code_is_taken_out_of_fences(text: str, entry_point: str, code: str | None) -> None:
    assert extract_code(text, entry_point) == code


def test_a_program_below_an_item_of_a_list_is_run() -> None:
    answer = "1. This:\n\n   ```python\n   def add(a, b):\n       return a + b\n   ```\n"
    assert judge_code(answer, json.dumps(FUNCTION), LIMITS) == RIGHT


def test_an_answer_without_code_is_wrong() -> None:
    assert judge_code("I do not know", json.dumps(STDIN), LIMITS) == Judgement(False, "no_code")


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        ("1 2\n3\n", "1 2\n3", True),
        (" 1 2 \n3\n\n", "1 2\n3", True),
        ("1.0 2", "1 2.00", True),
        ("1 2 3", "1 2\n3", False),
        ("1.0000001", "1", False),
        ("Yes", "YES", False),
        ("", "0", False),
        ("nan", "1", False),
    ],
)
def test_outputs_are_compared_line_by_line(found: str, expected: str, same: bool) -> None:
    assert same_output(found, expected) is same


def test_values_are_compared_by_type_and_floats_by_tolerance() -> None:
    assert same_value(1.0 + 1e-9, 1.0, 0) and not same_value(1.001, 1.0, 0)
    assert same_value(1.001, 1.0, 0.01) and same_value(math.nan, math.nan, 0)
    assert not same_value([1], (1,), 0) and same_value({"a": [1.0]}, {"a": [1.0]}, 0)
    assert not same_value(10**400, 1.0, 0) and not same_value(True, 1.0, 0)
    assert not same_value("1", 1.0, 0) and not same_value({"a": 1}, {"b": 1}, 0)


def test_a_training_run_gets_verdicts_on_code() -> None:
    verify = verifier("code", LIMITS)
    assert verify("```\nprint(3)\n```", json.dumps({"inputs": ["x"], "outputs": ["3"]})) is True
    assert verify("```\nprint(4)\n```", json.dumps({"inputs": ["x"], "outputs": ["3"]})) is False
