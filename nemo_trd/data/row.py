"""Takes the values that a prompt needs out of one row of a dataset."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from nemo_trd.config.errors import ConfigError
from nemo_trd.data.templates import PLACEHOLDER, fill_template
from nemo_trd.verifiers.answer_text import final_answer
from nemo_trd.verifiers.boxes import boxed, last_boxed
from nemo_trd.verifiers.code_tests import read_tests

# In the place of a pattern: the content of the last \boxed{...}, or of those enumerated with it.
BOXED = "boxed"
EXACT_FLOATS = 2**53  # below this every whole number is a float


class BadRow(ConfigError):
    """A row that cannot be used.

    Args:
        reason: one word, under which such rows are counted.
        problem: place in the dataset and the rule that it breaks.
    """

    def __init__(self, reason: str, problem: str, fix: str) -> None:
        super().__init__(f"{problem}. Fix: {fix}.")
        self.reason = reason
        self.problem = problem
        self.fix = fix


# (place, for messages; columns, or the error for a row that cannot be read)
Row = tuple[str, dict[str, Any] | BadRow]


@dataclass(frozen=True)
class RowReader:
    """Reader of the values of one row. Every method raises BadRow, which names the place.

    `key` is the purpose of a value (problem, answer, ...); the reason of a BadRow is missing_KEY
    or bad_KEY.
    """

    where: str
    row: dict[str, Any]
    field: str  # setting of the dataset, as in "data.train"

    def value(self, key: str, column: str) -> Any:
        """Value of a column, or, where none has that name, at a path of names with dots."""
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
            steps = list(value) if isinstance(value, dict) else []
            names += [f"{name}.{step}" for step in steps] or [name]
        setting = {
            "template": f"{self.field}.template",
            "rollout": "generation.stored.rollout",
            "refinement": "generation.stored.refinement",
        }.get(key, f"{self.field}.columns.{key}")
        columns = ", ".join(map(repr, names[:20])) + (", ..." if len(names) > 20 else "")
        return BadRow(
            f"missing_{key}",
            f"{self.where}: no column {column!r}, which {setting} names; there are "
            f"{columns or 'none'}",
            "name one of these, or correct the row",
        )

    def text(self, key: str, column: str) -> str:
        """Text of a column that is not empty."""
        return self._text(key, column, self.value(key, column))

    def _text(self, key: str, column: str, value: Any) -> str:
        if isinstance(value, str) and value.strip():
            return self.valid(key, column, value)
        raise self.bad(key, column, value, "it must be a text that is not empty")

    def valid(self, key: str, column: str, text: str) -> str:
        """Return the text; refuse half of a surrogate pair, which tokenizers do not take."""
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
        """System prompt of the row; None for a null or an empty text."""
        value = self.value("system", column)
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        return self._text("system", column, value)

    def reference(self, column: str) -> str:
        """Worked solution; the first one of a list, which may be written as JSON."""
        value = self.value("reference_solution", column)
        solutions = listed(value)
        if solutions is None:
            return self._text("reference_solution", column, value)
        for solution in solutions:
            if not isinstance(solution, str) or solution.strip():
                return self._text("reference_solution", column, solution)
        rule = "it must be a text that is not empty, and this list holds none"
        raise self.bad("reference_solution", column, None if not solutions else value, rule)

    def answers(self, column: str) -> list[str]:
        """Answers: one, or those of a list, which may be written as JSON if it is one of texts.

        Numbers become texts: 4.0 is "4".
        """
        value = self.value("answer", column)
        entries = listed(value) or value  # "[]" is a text
        if not isinstance(entries, list):
            return [self._number_or_text(column, entries)]
        if not entries:
            raise self.bad("answer", column, None, "it must hold an answer, and the list is empty")
        return [self._number_or_text(column, answer) for answer in entries]

    def _number_or_text(self, column: str, value: Any) -> str:
        if isinstance(value, str) and value.strip():
            return self.valid("answer", column, value)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole and not (isinstance(value, float | Decimal) and math.isfinite(value)):
            rule = "it must be a number or a text that is not empty, or a list of these"
            raise self.bad("answer", column, value, rule)
        return _written(value)

    def filled(self, template: str, problem: str) -> str:
        """Template filled with the problem and the other columns that it names."""
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
        """Tests of a program as JSON; several columns, without their nulls, form an object."""
        if isinstance(column, list):
            values = {name: self.value("answer", name) for name in column}
            code_tests: Any = {name: value for name, value in values.items() if value is not None}
        else:
            code_tests = self.value("answer", column)
        try:
            text = code_tests if isinstance(code_tests, str) else json.dumps(code_tests)
            read_tests(text)
        except (ValueError, TypeError) as error:
            raise self.bad("answer", str(column), code_tests, str(error)) from None
        return self.valid("answer", str(column), text)

    def search(self, pattern: str, text: str) -> str:
        """Answer in a text: group 1 of the pattern's last match; with BOXED the last boxes."""
        if pattern == BOXED:
            answer = final_answer(text) if boxed(text) else last_boxed(text)
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
        """Error for a value that breaks `rule`."""
        missing = value is None or (isinstance(value, str) and not value.strip())
        return BadRow(
            f"{'missing' if missing else 'bad'}_{key}",
            f"{self.where}, column {column!r} = {shown(value)}: {rule}",
            "correct the row, or leave it out",
        )


def listed(value: Any) -> list[Any] | None:
    """List in a value, also one of texts that is written as JSON; None where it is no list."""
    if isinstance(value, list):
        return value
    if not isinstance(value, str) or (value.strip()[:1], value.strip()[-1:]) != ("[", "]"):
        return None
    try:
        entries = json.loads(value)
    except ValueError:
        return None
    return entries if all(isinstance(entry, str) for entry in entries) else None


def _written(number: int | float | Decimal) -> str:
    if isinstance(number, int):
        return str(number)
    if -EXACT_FLOATS < number < EXACT_FLOATS and number == int(number):
        return str(int(number))
    return str(number)


def shown(value: object) -> str:
    """Value as error messages show it, at most 200 characters."""
    try:
        text = repr(value)
    except RecursionError:
        return "(nested too deeply to be shown)"
    return text if len(text) <= 200 else f"{text[:200]}..."
