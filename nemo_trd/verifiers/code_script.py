"""Script that runs inside the sandbox: generated programs, and tests of them.

Modes: `program` runs the code as a main program with the rest of stdin. `functions` answers calls
of the code's functions. `tests` runs a dataset's tests, whose calls of generated functions are
answered by another sandbox: generated code never shares a process with its judge.

Its parent writes 8 bytes of length and then the code. Calls and results are JSON lines of
plain data (`encode`), which the harness decodes too.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

# Names that solutions of programming problems often use without importing them.
PREAMBLE = """
import bisect, collections, copy, datetime, functools, heapq, io, itertools, json, math
import operator, os, random, re, string, sys, typing
from bisect import *; from collections import *; from copy import *; from datetime import *
from functools import *; from heapq import *; from itertools import *; from math import *
from operator import *; from random import *; from re import *; from string import *
from typing import *
from builtins import *
"""


def encode(value: Any) -> Any:
    """Encode plain data as JSON that keeps tuples, sets, bytes and the like apart.

    Raises:
        TypeError: the value is no plain data.
    """
    if value is None or isinstance(value, (bool, str)):
        return value if value is None or isinstance(value, bool) else str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    for kind, name in ((list, "l"), (tuple, "t"), (frozenset, "f"), (set, "s")):
        if isinstance(value, kind):
            return {name: [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"d": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, bytes):
        return {"b": value.hex()}
    if isinstance(value, complex):
        return {"c": [value.real, value.imag]}
    if type(value).__module__ == "numpy":
        return encode(value.tolist())
    raise TypeError(f"{type(value).__name__} is no plain data")


def decode(coded: Any) -> Any:
    """Undo `encode`.

    Raises:
        ValueError, TypeError, KeyError: `encode` did not write this.
    """
    if not isinstance(coded, (dict, list)):
        return coded
    pairs: list[tuple[str, Any]] = list(coded.items()) if isinstance(coded, dict) else []
    ((name, content),) = pairs
    if name in ("l", "t", "f", "s"):
        kinds: dict[str, Any] = {"l": list, "t": tuple, "f": frozenset, "s": set}
        return kinds[name](decode(item) for item in content)
    if name == "d":
        return {decode(key): decode(item) for key, item in content}
    if name == "b":
        return bytes.fromhex(content)
    if name == "c":
        return complex(*content)
    raise ValueError("no such kind of data")


def read_code() -> str:
    """Read the code from stdin: 8 bytes of length, then UTF-8."""

    def read(count: int) -> bytes:
        received = b""
        while len(received) < count:
            part = os.read(0, count - len(received))
            if not part:
                os._exit(1)
            received += part
        return received

    return read(int.from_bytes(read(8), "big")).decode()


def run_program(code: str) -> None:
    """Run the code as a main program."""
    namespace = new_namespace("__main__")
    sys.argv = ["solution.py"]
    exec(compile(code, "solution.py", "exec"), namespace)


def new_namespace(name: str) -> dict[str, Any]:
    """Make a module with the names of `PREAMBLE`; return its namespace."""
    module = type(sys)(name)
    sys.modules[name] = module
    exec(PREAMBLE, module.__dict__)
    return module.__dict__


def open_channel() -> tuple[TextIO, TextIO]:
    """Take over stdin and stdout as (lines in, lines out); the code's own lead to /dev/null."""
    lines, replies = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    return lines, replies


def serve_calls(code: str) -> None:
    """Reply {"value": ...} or {"error": [type, message]} to each call [name, args, kwargs].

    The first reply says whether the code itself could be run.
    """
    lines, replies = open_channel()
    namespace = new_namespace("solution")
    preamble = dict(namespace)

    def attempt(action: Callable[[], Any]) -> None:
        try:
            reply = {"value": encode(action())}
            text = json.dumps(reply)
        except BaseException as error:
            message = [type(error).__name__, str(error)[:500]]
            text = json.dumps({"error": message})
        replies.write(text + "\n")
        replies.flush()

    attempt(lambda: exec(compile(code, "solution.py", "exec"), namespace))
    for line in lines:
        name, args, kwargs = json.loads(line)
        attempt(lambda: find(namespace, preamble, name)(*decode(args), **decode(kwargs)))  # noqa: B023


def find(namespace: dict[str, Any], preamble: dict[str, Any], name: str) -> Any:
    """Find a function of the code itself, or the method of that name of its class Solution."""
    solution = namespace.get("Solution")
    if solution is not None and hasattr(solution, name):
        return getattr(solution(), name)
    function = namespace[name]
    if function is preamble.get(name):
        raise KeyError(name)
    return function


def run_tests(code: str, entry_point: str) -> None:
    """Run a dataset's tests; the last line that it writes is the verdict.

    Lines out: {"call": [name, args, kwargs]}, answered as above, and at last {"passed": ...,
    "error": ...}, or {"broken": ...} where arguments cannot be passed on.
    """
    import ast
    import builtins

    lines, replies = open_channel()
    calls = 0

    def tell(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    def stand_in(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            try:
                coded = [encode(args), encode(kwargs)]
            except TypeError as error:
                tell({"broken": f"an argument that the tests give to {name}: {error}"})
                os._exit(1)
            tell({"call": [name, *coded]})
            reply = json.loads(lines.readline())
            if "value" in reply:
                return decode(reply["value"])
            kind = getattr(builtins, reply["error"][0], None)
            is_builtin = isinstance(kind, type) and issubclass(kind, Exception)
            if kind in (StopIteration, StopAsyncIteration):  # it would end loops of the tests
                is_builtin = False
            raised: Any = kind if is_builtin else RuntimeError
            raise raised(reply["error"][1])

        call.__name__ = name
        return call

    namespace: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}
    try:
        tree = ast.parse(code)
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        bound = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
        bound |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        defined = (ast.FunctionDef, ast.ClassDef, ast.alias)
        for node in ast.walk(tree):
            if isinstance(node, defined):
                bound.add(getattr(node, "asname", None) or node.name)
        unknown = {node.id for node in names} - bound - set(vars(builtins)) - set(namespace)
        namespace.update({name: stand_in(name) for name in unknown | {entry_point} if name})
        exec(compile(tree, "tests.py", "exec"), namespace)
        if entry_point and "check" in namespace and "check" in bound:
            namespace["check"](namespace[entry_point])
        verdict = {"passed": calls > 0, "error": "they call nothing"}
    except BaseException as error:
        verdict = {"passed": False, "error": f"{type(error).__name__}: {error}"[:500]}
    tell(verdict)


if __name__ == "__main__":
    sys.path.append("/opt/packages")
    sys.set_int_max_str_digits(0)
    os.write(1, b"ready\n")
    mode = sys.argv[1]
    if mode == "program":
        run_program(read_code())
    elif mode == "functions":
        serve_calls(read_code())
    else:
        run_tests(read_code(), sys.argv[2])
