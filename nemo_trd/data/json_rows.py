"""Reads rows of JSON files: one object a line, or one array of objects. Both also with gzip."""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nemo_trd.config.errors import ConfigError
from nemo_trd.data.row import BadRow, Row

LONGEST_INTEGER = 4000  # digits; from 4,300 on Python refuses to read or to write one
SPACE = re.compile(r"[ \t\r\n]*")


def _integer(digits: str) -> Any:
    return int(digits) if len(digits) <= LONGEST_INTEGER else digits


DECODER = json.JSONDecoder(parse_int=_integer)


def open_bytes(path: Path) -> io.BufferedIOBase:
    """Open a file, also a gzipped one, for reading its bytes."""
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def line_rows(path: Path) -> Iterator[Row]:
    """Rows of a file with one JSON object a line.

    Blank lines are no rows. Lines end at newlines only, whatever Unicode calls a line end.
    """
    with open_bytes(path) as lines:
        yield from _lines(path, lines)


def _lines(path: Path, lines: Iterable[bytes]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path} line {number}"
            yield where, _row_of_line(where, line)


def _row_of_line(where: str, line: bytes) -> dict[str, Any] | BadRow:
    try:
        # json.loads would take UTF-16 as well; a byte order mark is allowed
        return _object(where, json.loads(line.decode("utf-8-sig"), parse_int=_integer))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        return BadRow(
            "invalid_json",
            f"{where}: not valid JSON ({_reason(error)})",
            "one JSON object a line, in UTF-8; one array of objects belongs into a .json file",
        )
    except RecursionError:
        return BadRow("nested_too_deep", f"{where}: nested too deeply to be read", "correct it")


def _reason(error: ValueError) -> str:
    """Reason of a parse error, without the line number, which json counts within one row."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.colno}"
    return str(error)


def _object(where: str, value: Any) -> dict[str, Any] | BadRow:
    if isinstance(value, dict):
        return value
    return BadRow(
        "no_object",
        f"{where}: a JSON {type(value).__name__}, not an object",
        'one object with named columns for each row, like {"problem": "..."}',
    )


def json_rows(path: Path) -> Iterator[Row]:
    """Rows of a .json file: an array of objects, one object, or one object a line.

    Raises:
        ConfigError: an array that is broken; what stands behind the break cannot be found.
    """
    with open_bytes(path) as file:
        content = file.read()
    # Bytes that are no UTF-8 become halves of surrogate pairs, which only make their row a bad one.
    text = content.decode("utf-8-sig", errors="surrogateescape")
    start = _behind_space(text, 0)
    if text[start : start + 1] == "[":
        yield from _array(path, text, start)
        return
    try:
        value, end = DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        end = start
    if end > start and _behind_space(text, end) == len(text):
        yield str(path), _object(str(path), value)
    else:
        yield from _lines(path, io.BytesIO(content))


def _array(path: Path, text: str, start: int) -> Iterator[Row]:
    """Rows of the array that begins at `start`, each with the line that it begins on."""
    position = _behind_space(text, start + 1)
    line = 1 + text.count("\n", 0, position)
    end = text[position : position + 1] == "]"
    while not end:
        where = f"{path} line {line}"
        try:
            value, behind = DECODER.raw_decode(text, position)
        except ValueError as error:
            raise _broken_array(where, str(error)) from None  # it tells line and column
        except RecursionError:
            raise _broken_array(where, "nested too deeply to be read") from None
        yield where, _object(where, value)
        separator = _behind_space(text, behind)
        end = text[separator : separator + 1] == "]"
        if not end and text[separator : separator + 1] != ",":
            line += text.count("\n", position, separator)
            raise _broken_array(f"{path} line {line}", "there is neither a comma nor the end")
        following = separator if end else _behind_space(text, separator + 1)
        line += text.count("\n", position, following)
        position = following
    if _behind_space(text, position + 1) < len(text):
        raise _broken_array(f"{path} line {line}", "something follows the end of the array")


def _behind_space(text: str, position: int) -> int:
    match = SPACE.match(text, position)
    assert match is not None
    return match.end()


def _broken_array(where: str, reason: str) -> ConfigError:
    return ConfigError(
        f"{where}: the array cannot be read any further ({reason}). "
        "Fix: write the file again; with one object a line (.jsonl) a bad one can be skipped."
    )
