"""Reads the tests of a programming problem, in the formats of public datasets.

The column `data.columns.answer` holds a JSON object; several columns together form one. Formats:

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
    """Behaviour of a right program.

    kind "stdin": it writes `outputs[i]` when it reads `inputs[i]`. "functions": its `entry_point`
    returns `outputs[i]` for the arguments `inputs[i]`; where `reference` is set, the
    results of that program. "program": `test` runs without an error.
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
    """Read the tests in an expected answer.

    Raises:
        ValueError: they are malformed; the message says how.
    """
    try:
        fields = json.loads(answer)
    except ValueError as error:
        raise ValueError(f"tests must be a JSON object, and this is none: {error}") from None
    if not isinstance(fields, Mapping):
        raise ValueError(f"tests must be a JSON object, not {type(fields).__name__}")
    if "inputs" in fields:
        tests = _taco(fields)
    elif "public_test_cases" in fields:
        tests = _live_code_bench(fields)
    elif "base_input" in fields:
        tests = _eval_plus(fields)
    elif isinstance(fields.get("test"), str) and fields["test"].strip():
        return CodeTests(
            "program", entry_point=fields.get("entry_point") or "", test=fields["test"]
        )
    else:
        raise ValueError(f"no tests are found under the keys {', '.join(fields) or 'none'}")
    if not tests.inputs:
        raise ValueError("there is no test case")
    if tests.reference is None and len(tests.inputs) != len(tests.outputs):
        raise ValueError(f"{len(tests.inputs)} inputs have {len(tests.outputs)} outputs")
    if tests.kind == "stdin" and not all(
        isinstance(text, str) for text in (*tests.inputs, *tests.outputs)
    ):
        raise ValueError("inputs and outputs of a program must be texts")
    return tests


def _taco(fields: Mapping[str, Any]) -> CodeTests:
    inputs, outputs = _list(fields, "inputs"), _list(fields, "outputs")
    if fields.get("fn_name"):
        if not all(isinstance(arguments, list) for arguments in inputs):
            raise ValueError("with fn_name each of inputs must be a list of arguments")
        # Some rows wrap the one result in a list, and nothing tells which: both are accepted.
        return CodeTests("functions", tuple(inputs), tuple(outputs), fields["fn_name"])

    def text(lines: Any) -> Any:
        return "\n".join(map(str, lines)) if isinstance(lines, list) else lines

    return CodeTests("stdin", tuple(map(text, inputs)), tuple(map(text, outputs)))


def _live_code_bench(fields: Mapping[str, Any]) -> CodeTests:
    cases: list[Mapping[str, Any]] = []
    for key in ("public_test_cases", "private_test_cases"):
        packed = fields.get(key) or []
        cases += packed if isinstance(packed, list) else _unpacked(packed, key)
    metadata = fields.get("metadata") or "{}"
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
    """Unpack test cases: JSON, or as LiveCodeBench packs it, base64 of zlib of a pickled text.

    Nothing is unpickled: only the text inside the pickle is read.
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


def _eval_plus(fields: Mapping[str, Any]) -> CodeTests:
    missing = [key for key in ("entry_point", "canonical_solution") if not fields.get(key)]
    if missing:
        raise ValueError(f"beside base_input there must be {' and '.join(missing)}")
    solution = fields["canonical_solution"]
    if f"def {fields['entry_point']}" not in solution:  # only the body, as HumanEval has it
        solution = (fields.get("prompt") or "") + solution
    inputs = _list(fields, "base_input") + (fields.get("plus_input") or [])
    if not all(isinstance(arguments, list) for arguments in inputs):
        raise ValueError("each of base_input and plus_input must be a list of arguments")
    return CodeTests(
        "functions",
        tuple(inputs),
        entry_point=fields["entry_point"],
        reference=solution,
        tolerance=fields.get("atol") or 0.0,
    )


def _list(fields: Mapping[str, Any], key: str) -> list[Any]:
    value = fields.get(key)
    if not isinstance(value, list):
        raise ValueError(f"{key} must be a list")
    return value
