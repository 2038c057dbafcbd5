"""Takes what a prompt needs out of one row of a dataset."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from nemo_trd.chat import ROLES, Message
from nemo_trd.config import ConfigError
from nemo_trd.templates import PLACEHOLDER, fill_template
from nemo_trd.verifiers.code_tests import read_tests


@dataclass(frozen=True)
class RowReader:
    """Takes values out of one row. Every method raises ConfigError that names the place."""

    where: str
    row: dict[str, Any]
    field: str  # of the dataset, as in "data.train"

    def value(self, key: str, column: str) -> Any:
        if column not in self.row:
            raise ConfigError(
                f"{self.where}: no column {column!r}, which {self.field}.columns.{key} names. "
                f"Fix: name one of {', '.join(map(repr, self.row))}, or correct the row."
            )
        return self.row[column]

    def text(self, key: str, column: str) -> str:
        value = self.value(key, column)
        if not isinstance(value, str) or not value.strip():
            raise self.broken(column, value, "it must be a text that is not empty")
        return value

    def number_or_text(self, key: str, column: str) -> str:
        value = self.value(key, column)
        if isinstance(value, str) and value.strip():
            return value
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise self.broken(column, value, "it must be a number or a text that is not empty")
        return str(value)

    def filled(self, template: str, problem: str) -> str:
        """The template with the problem and whatever other columns it names."""
        names = set(PLACEHOLDER.findall(template)) - {"problem"}
        values = {name: self.value("problem", name) for name in names}
        for name, value in values.items():
            lines = value if isinstance(value, list) else [value]
            if not all(isinstance(line, str) for line in lines):
                rule = f"{self.field}.template puts it in: it must be a text, or a list of lines"
                raise self.broken(name, value, rule)
            values[name] = "\n".join(lines)
        return fill_template(template, problem=problem, **values)

    def tests(self, column: str | list[str]) -> str:
        """The tests of a program as JSON; several columns, without their nulls, form an object."""
        if isinstance(column, list):
            values = {name: self.value("answer", name) for name in column}
            held: Any = {name: value for name, value in values.items() if value is not None}
        else:
            held = self.value("answer", column)
        text = held if isinstance(held, str) else json.dumps(held)
        try:
            read_tests(text)
        except ValueError as error:
            raise self.broken(str(column), held, str(error)) from None
        return text

    def search(self, pattern: str, text: str) -> str:
        matches = list(re.finditer(pattern, text))
        answer = matches[-1][1] if matches else None
        if answer is None or not answer.strip():
            raise ConfigError(
                f"{self.where}: {self.field}.answer_pattern = {pattern!r} finds no answer in "
                f"{_shown(text)}. Fix: correct the pattern, or the row."
            )
        return answer.strip()

    def messages(self, column: str) -> list[Message]:
        value = self.value("messages", column)
        if not isinstance(value, list) or not value:
            raise self.broken(column, value, "it must be a list of messages that is not empty")
        messages = []
        for position, message in enumerate(value):
            if not isinstance(message, dict) or message.get("role") not in ROLES:
                rule = f"message {position} must be an object whose role is one of {ROLES}"
                raise self.broken(column, value, rule)
            if message["role"] == "system" and position > 0:
                raise self.broken(column, value, "only the first message may be from the system")
            content = message.get("content")
            if not isinstance(content, str) or not content.strip():
                rule = f"the content of message {position} must be a text that is not empty"
                raise self.broken(column, value, rule)
            # Parquet gives every message every key; a null stands for a key that is not there.
            messages.append({key: item for key, item in message.items() if item is not None})
        if messages[-1]["role"] != "user":
            raise self.broken(column, value, "the last message must be from the user")
        return messages

    def broken(self, column: str, value: object, rule: str) -> ConfigError:
        return ConfigError(
            f"{self.where}, column {column!r} = {_shown(value)}: {rule}. "
            "Fix: correct the row, or leave it out."
        )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
