"""Takes what a prompt needs out of one row of a dataset."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from nemo_trd.config.errors import ConfigError
from nemo_trd.data.templates import PLACEHOLDER, fill_template
from nemo_trd.verifiers.boxes import last_boxed
from nemo_trd.verifiers.code_tests import read_tests

BOXED = "boxed"  # in the place of a pattern: what stands in the last \boxed{...}
EXACT_FLOATS = 2**53  # below this every whole number is a float


class BadRow(ConfigError):
    """A row that cannot be used: for which reason, in one word, and what is wrong with it where."""

    def __init__(self, reason: str, told: str, fix: str) -> None:
        super().__init__(f"{told}. Fix: {fix}.")
        self.reason = reason
        self.told = told
        self.fix = fix


# Where it stands, for messages; its columns, or why it cannot be read.
Row = tuple[str, dict[str, Any] | BadRow]


@dataclass(frozen=True)
class RowReader:
    """Takes values out of one row. Every method raises BadRow, which names the place.

    `key` is what a value is for (problem, answer, ...); the reason of a BadRow says missing_KEY or
    bad_KEY.
    """

    where: str
    row: dict[str, Any]
    field: str  # of the dataset, as in "data.train"

    def value(self, key: str, column: str) -> Any:
        """What stands in a column, or, where none has that name, at a path of names with dots."""
        if column in self.row:
            return self.row[column]
        value: Any = self.row
        for step in column.split("."):
            if isinstance(value, dict) and step in value:
                value = value[step]
            elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
                value = value[int(step)]
            else:
                raise self._no_column(key, column)
        return value

    def _no_column(self, key: str, column: str) -> BadRow:
        names = []
        for name, value in self.row.items():
            inner = list(value) if isinstance(value, dict) else []
            names += [f"{name}.{step}" for step in inner] or [name]
        setting = "template" if key == "template" else f"columns.{key}"
        known = ", ".join(map(repr, names[:20])) + (", ..." if len(names) > 20 else "")
        return BadRow(
            f"missing_{key}",
            f"{self.where}: no column {column!r}, which {self.field}.{setting} names; there are "
            f"{known or 'none'}",
            "name one of these, or correct the row",
        )

    def text(self, key: str, column: str) -> str:
        return self._text(key, column, self.value(key, column))

    def _text(self, key: str, column: str, value: Any) -> str:
        if isinstance(value, str) and value.strip():
            return self.valid(key, column, value)
        raise self.bad(key, column, value, "it must be a text that is not empty")

    def valid(self, key: str, column: str, text: str) -> str:
        """The text, unless it holds half of a surrogate pair, which tokenizers do not take."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            rule = (
                f"character {error.start + 1} is {ascii(text[error.start])}, half of a surrogate "
                "pair or a byte that is no UTF-8"
            )
            raise self.bad(key, column, text, rule) from None
        return text

    def system(self, column: str) -> str | None:
        """A system prompt; a null or an empty text is none."""
        value = self.value("system", column)
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        return self._text("system", column, value)

    def reference(self, column: str) -> str:
        """A worked solution; of a list of them, also one written as JSON, the first."""
        value = self.value("reference_solution", column)
        held = listed(value)
        if held is None:
            return self._text("reference_solution", column, value)
        for solution in held:
            if not isinstance(solution, str) or solution.strip():
                return self._text("reference_solution", column, solution)
        rule = "it must be a text that is not empty, and this list holds none"
        raise self.bad("reference_solution", column, None if not held else value, rule)

    def answers(self, column: str) -> list[str]:
        """The answer, or those of a list of answers. Numbers become texts: 4.0 is "4"."""
        value = self.value("answer", column)
        if not isinstance(value, list):
            return [self._number_or_text(column, value)]
        if not value:
            raise self.bad("answer", column, None, "it must hold an answer, and the list is empty")
        return [self._number_or_text(column, answer) for answer in value]

    def _number_or_text(self, column: str, value: Any) -> str:
        if isinstance(value, str) and value.strip():
            return self.valid("answer", column, value)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole and not (isinstance(value, float | Decimal) and math.isfinite(value)):
            rule = "it must be a number or a text that is not empty, or a list of these"
            raise self.bad("answer", column, value, rule)
        return _written(value)

    def filled(self, template: str, problem: str) -> str:
        """The template with the problem and whatever other columns it names."""
        names = set(PLACEHOLDER.findall(template)) - {"problem"}
        values = {name: self.value("template", name) for name in names}
        for name, value in values.items():
            lines = value if isinstance(value, list) else [value]
            if not all(isinstance(line, str) for line in lines):
                rule = f"{self.field}.template puts it in: it must be a text, or a list of lines"
                raise self.bad("template", name, value, rule)
            values[name] = self.valid("template", name, "\n".join(lines))
        return fill_template(template, problem=problem, **values)

    def tests(self, column: str | list[str]) -> str:
        """The tests of a program as JSON; several columns, without their nulls, form an object."""
        if isinstance(column, list):
            values = {name: self.value("answer", name) for name in column}
            held: Any = {name: value for name, value in values.items() if value is not None}
        else:
            held = self.value("answer", column)
        try:
            text = held if isinstance(held, str) else json.dumps(held)
            read_tests(text)
        except (ValueError, TypeError) as error:
            raise self.bad("answer", str(column), held, str(error)) from None
        return self.valid("answer", str(column), text)

    def search(self, pattern: str, text: str) -> str:
        """Group 1 of the last match, or what BOXED stands for."""
        if pattern == BOXED:
            answer = last_boxed(text)
        else:
            matches = list(re.finditer(pattern, text))
            answer = matches[-1][1] if matches else None
        if answer is None or not answer.strip():
            raise BadRow(
                "answer_not_found",
                f"{self.where}: {self.field}.answer_pattern = {pattern!r} finds no answer in "
                f"{shown(text)}",
                "correct the pattern, or the row",
            )
        return answer.strip()

    def bad(self, key: str, column: str, value: object, rule: str) -> BadRow:
        missing = value is None or (isinstance(value, str) and not value.strip())
        return BadRow(
            f"{'missing' if missing else 'bad'}_{key}",
            f"{self.where}, column {column!r} = {shown(value)}: {rule}",
            "correct the row, or leave it out",
        )


def listed(value: Any) -> list[Any] | None:
    """A list, also one of texts that is written as JSON in a text; None where it is no list."""
    if isinstance(value, list):
        return value
    if not isinstance(value, str) or (value.strip()[:1], value.strip()[-1:]) != ("[", "]"):
        return None
    try:
        held = json.loads(value)
    except ValueError:
        return None
    return held if all(isinstance(entry, str) for entry in held) else None


def _written(number: int | float | Decimal) -> str:
    if isinstance(number, int):
        return str(number)
    if -EXACT_FLOATS < number < EXACT_FLOATS and number == int(number):
        return str(int(number))
    return str(number)


def shown(value: object) -> str:
    """As messages show it."""
    try:
        text = repr(value)
    except RecursionError:
        return "(nested too deeply to be shown)"
    return text if len(text) <= 200 else f"{text[:200]}..."
