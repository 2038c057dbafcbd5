"""The tests of a programming problem, from the shapes in which datasets have them.

What `data.columns.answer` names holds a JSON object, or, with several columns named, they form
one. Understood are the keys of

    TACO, APPS         inputs, outputs, fn_name
    LiveCodeBench      public_test_cases, private_test_cases, metadata
    EvalPlus           entry_point, prompt, canonical_solution, base_input, plus_input, atol
    HumanEval, MBPP+   test (a program that asserts), entry_point
"""

from __future__ import annotations

import base64
import binascii
import json
import pickletools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

LARGEST_TESTS = 2**30  # bytes, unpacked


@dataclass(frozen=True)
class CodeTests:
    """What a right program does.

    kind "stdin": it writes `outputs[i]` when it reads `inputs[i]`. "functions": its `entry_point`
    returns `outputs[i]` for the arguments `inputs[i]`; where `reference` is given, what that
    program returns. "program": `test` runs without an error.
    """

    kind: Literal["stdin", "functions", "program"]
    inputs: tuple[Any, ...] = ()
    outputs: tuple[Any, ...] = ()
    entry_point: str = ""
    reference: str | None = None
    test: str = ""
    tolerance: float = 0.0


@lru_cache(maxsize=1024)
def read_tests(answer: str) -> CodeTests:
    """The tests in an answer.

    Raises:
        ValueError: what is wrong with them.
    """
    try:
        given = json.loads(answer)
    except ValueError as error:
        raise ValueError(f"tests must be a JSON object, and this is none: {error}") from None
    if not isinstance(given, Mapping):
        raise ValueError(f"tests must be a JSON object, not {type(given).__name__}")
    if "inputs" in given:
        tests = _taco(given)
    elif "public_test_cases" in given:
        tests = _live_code_bench(given)
    elif "base_input" in given:
        tests = _eval_plus(given)
    elif isinstance(given.get("test"), str) and given["test"].strip():
        return CodeTests("program", entry_point=given.get("entry_point") or "", test=given["test"])
    else:
        raise ValueError(f"no tests are found under the keys {', '.join(given) or 'none'}")
    if not tests.inputs:
        raise ValueError("there is no test case")
    if tests.reference is None and len(tests.inputs) != len(tests.outputs):
        raise ValueError(f"{len(tests.inputs)} inputs have {len(tests.outputs)} outputs")
    if tests.kind == "stdin" and not all(
        isinstance(text, str) for text in (*tests.inputs, *tests.outputs)
    ):
        raise ValueError("inputs and outputs of a program must be texts")
    return tests


def _taco(given: Mapping[str, Any]) -> CodeTests:
    inputs, outputs = _list(given, "inputs"), _list(given, "outputs")
    if given.get("fn_name"):
        if not all(isinstance(arguments, list) for arguments in inputs):
            raise ValueError("with fn_name each of inputs must be a list of arguments")
        # Some rows wrap the one result in a list, and nothing tells which: both are accepted.
        return CodeTests("functions", tuple(inputs), tuple(outputs), given["fn_name"])

    def text(lines: Any) -> Any:
        return "\n".join(map(str, lines)) if isinstance(lines, list) else lines

    return CodeTests("stdin", tuple(map(text, inputs)), tuple(map(text, outputs)))


def _live_code_bench(given: Mapping[str, Any]) -> CodeTests:
    cases: list[Mapping[str, Any]] = []
    for key in ("public_test_cases", "private_test_cases"):
        held = given.get(key) or []
        cases += held if isinstance(held, list) else _unpacked(held, key)
    metadata = given.get("metadata") or "{}"
    name = (json.loads(metadata) if isinstance(metadata, str) else metadata).get("func_name")
    try:
        pairs = [(case["input"], case["output"]) for case in cases]
        types = {case.get("testtype", "stdin") for case in cases}
        if types == {"stdin"}:
            return CodeTests("stdin", tuple(i for i, _ in pairs), tuple(o for _, o in pairs))
        if types != {"functional"} or not name:
            raise ValueError(f"test types {sorted(types)} with metadata.func_name = {name!r}")
        arguments = [[json.loads(line) for line in text.split("\n")] for text, _ in pairs]
        results = [json.loads(text) for _, text in pairs]
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"a test case is no object with input and output: {error!r}") from None
    return CodeTests("functions", tuple(arguments), tuple(results), name)


def _unpacked(text: str, key: str) -> list[Any]:
    """JSON, or what LiveCodeBench makes of it: base64 of zlib of a pickled text.

    Nothing is unpickled: of the pickle only the text that it holds is taken.
    """
    if not text.lstrip().startswith("["):
        try:
            unpacker = zlib.decompressobj()
            packed = unpacker.decompress(base64.b64decode(text, validate=True), LARGEST_TESTS)
            if unpacker.unconsumed_tail:
                raise ValueError(f"{key} unpacks to more than {LARGEST_TESTS >> 20} MiB")
            (text,) = (
                value for _, value, _ in pickletools.genops(packed) if isinstance(value, str)
            )
        except (binascii.Error, zlib.error, ValueError) as error:
            raise ValueError(f"{key} can be read neither as JSON nor as packed: {error}") from None
    cases = json.loads(text)
    if not isinstance(cases, list):
        raise ValueError(f"{key} must hold a list of test cases")
    return cases


def _eval_plus(given: Mapping[str, Any]) -> CodeTests:
    missing = [key for key in ("entry_point", "canonical_solution") if not given.get(key)]
    if missing:
        raise ValueError(f"beside base_input there must be {' and '.join(missing)}")
    solution = given["canonical_solution"]
    if f"def {given['entry_point']}" not in solution:  # only the body, as HumanEval has it
        solution = (given.get("prompt") or "") + solution
    inputs = _list(given, "base_input") + (given.get("plus_input") or [])
    if not all(isinstance(arguments, list) for arguments in inputs):
        raise ValueError("each of base_input and plus_input must be a list of arguments")
    return CodeTests(
        "functions",
        tuple(inputs),
        entry_point=given["entry_point"],
        reference=solution,
        tolerance=given.get("atol") or 0.0,
    )


def _list(given: Mapping[str, Any], key: str) -> list[Any]:
    value = given.get(key)
    if not isinstance(value, list):
        raise ValueError(f"{key} must be a list")
    return value
