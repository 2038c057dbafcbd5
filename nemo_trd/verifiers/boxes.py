r"""Reads the contents of \boxed{...} and \fbox{...}."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"\\f?boxed\s*\{|\\fbox\s*\{|\\.|[{}]", re.DOTALL)
_BARE = re.compile(r"\\boxed\s+([^\s{}$]+)")  # "\boxed 7", as some solutions have it


def boxed(text: str) -> list[str]:
    """Contents of all boxes that are closed, in the order of their beginnings.

    In one pass, however many are left open.
    """
    open_braces: list[int | None] = []  # begin of a box, None for any other brace
    boxes: list[tuple[int, str]] = []
    for token in _TOKEN.finditer(text):
        if token[0] == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None:
                boxes.append((start, text[start : token.start()]))
        elif token[0].endswith("{") and token[0] != r"\{":
            open_braces.append(token.end() if len(token[0]) > 1 else None)
    return [content for _, content in sorted(boxes)]


def last_boxed(text: str) -> str | None:
    """Content of the last box that is closed; else the word behind a \\boxed without braces."""
    contents = boxed(text)
    if contents:
        return contents[-1]
    bare = _BARE.findall(text)
    return bare[-1] if bare else None
