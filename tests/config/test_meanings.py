"""The meaning of every setting stands beside it in the schema, where conf/ sends its reader."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import pytest

from nemo_trd.config import evaluation, schema

SETTINGS = 200  # there are more; a reader of the source that finds fewer reads it wrongly


def comments(source: str) -> dict[int, str]:
    """Line number -> text of the comment in it."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.strip("# ") for t in tokens if t.type == tokenize.COMMENT}


def settings(source: str) -> dict[str, str]:
    """Section.field -> meaning: `Field(description=)`, or the comment in its lines or above."""
    lines, notes, meanings = source.splitlines(), comments(source), {}
    for section in ast.parse(source).body:
        if not isinstance(section, ast.ClassDef):
            continue
        for field in section.body:
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            assert field.end_lineno is not None
            above = field.lineno - 1
            own_line = lines[above - 1].strip().startswith("#")
            places = [*([above] if own_line else []), *range(field.lineno, field.end_lineno + 1)]
            texts = [notes.get(place, "") for place in places] + descriptions(field)
            meanings[f"{section.name}.{field.target.id}"] = " ".join(texts).strip()
    return meanings


def descriptions(field: ast.AnnAssign) -> list[str]:
    return [
        keyword.value.value
        for keyword in ast.walk(field)
        if isinstance(keyword, ast.keyword) and keyword.arg == "description"
        if isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, str)
    ]


def test_every_setting_has_a_meaning() -> None:
    meanings = {}
    for module in (schema, evaluation):
        meanings |= settings(Path(str(module.__file__)).read_text())
    assert len(meanings) >= SETTINGS
    silent = [name for name, meaning in meanings.items() if not any(map(str.isalpha, meaning))]
    assert not silent, f"no comment beside or above, no description: {silent}"


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("a: int", False),
        ("a: int  # seconds", True),
        ("# seconds\n    a: int", True),
        ("# of something else\n\n    a: int", False),
        ("b: int  # of b\n    a: int", False),
        ("a: int = Field(description='seconds')", True),
        ("a: tuple[\n        int,  # seconds\n    ]", True),
        ("a: str = '#'", False),
    ],
)
def test_a_comment_belongs_to_the_field_that_it_touches(field: str, said: bool) -> None:
    assert bool(settings(f"class S:\n    {field}\n")["S.a"]) == said
