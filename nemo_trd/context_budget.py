"""Fit a teacher context into its token budget, by shortening texts with a visible notice.

Problem and instructions are never cut. Lengths are measured on the rendered token ids, since
the token counts of parts do not add up to that of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nemo_trd.config import RefinementConfig
from nemo_trd.types import TokenIds

Texts = Mapping[str, str]  # placeholder of the template -> what is put in its place
Render = Callable[[Texts], TokenIds]
Shorten = Callable[[str, int, Any], str]  # (text, characters to keep, tokenizer)

LONGEST_WORD = 32  # characters; see _word_border


def fit(
    texts: Texts, render: Render, refinement: RefinementConfig, tokenizer: Any
) -> tuple[TokenIds | None, tuple[str, ...]]:
    """Render at most `refinement.max_context_tokens` tokens: y_o is shortened first, then y*.

    Of the one that is shortened last as much is kept as fits. A text that is no longer than the
    notice which would replace it stays whole.

    Returns:
        The token ids, None when they do not fit, and the names of what was shortened.
    """
    budget = refinement.max_context_tokens
    token_ids = render(texts)
    if len(token_ids) <= budget:
        return token_ids, ()
    if refinement.on_overflow == "refuse":
        return None, ()
    shortened: list[str] = []
    for name, shorten in (("rollout", keep_head), ("reference_solution", keep_both_ends)):
        whole = texts.get(name, "")
        nothing = shorten(whole, 0, tokenizer)
        if _length(whole, tokenizer) <= _length(nothing, tokenizer):
            continue
        shortened.append(name)
        fitting = _keep_most(texts, name, shorten, render, tokenizer, budget)
        if fitting is not None:
            return fitting, tuple(shortened)
        texts = {**texts, name: nothing}
    return None, ()


def _keep_most(
    texts: Texts, name: str, shorten: Shorten, render: Render, tokenizer: Any, budget: int
) -> TokenIds | None:
    """Keep as many characters of one text as fit, by bisection; None: not even with none."""

    def attempt(characters: int) -> TokenIds:
        return render({**texts, name: shorten(texts[name], characters, tokenizer)})

    best = attempt(0)
    if len(best) > budget:
        return None
    fits, too_many = 0, len(texts[name])
    while too_many - fits > 1:
        characters = (fits + too_many) // 2
        token_ids = attempt(characters)
        if len(token_ids) <= budget:
            fits, best = characters, token_ids
        else:
            too_many = characters
    return best


def keep_head(text: str, characters: int, tokenizer: Any) -> str:
    """The beginning of a rollout: the first error decides, what follows it is built on it.

    The rewrite keeps what is right before that error, and an end without its middle would
    invite the teacher to copy a result whose derivation it cannot see.
    """
    return _with_notice(text, _word_border(text, characters), len(text), tokenizer)


def keep_both_ends(text: str, characters: int, tokenizer: Any) -> str:
    """Three quarters beginning, one quarter end: a reference solution ends with its answer."""
    tail = _word_border(text[::-1], characters // 4)
    head = _word_border(text, characters - tail)
    return _with_notice(text, head, len(text) - tail, tokenizer)


def _with_notice(text: str, start: int, end: int, tokenizer: Any) -> str:
    """`text` with [start, end) replaced by a notice of how much is missing."""
    head, tail = text[:start], text[end:]
    missing = _length(text, tokenizer) - _length(head, tokenizer) - _length(tail, tokenizer)
    notice = f"[... {max(missing, 1)} tokens left out ...]"
    return "\n".join(part for part in (head.rstrip(), notice, tail.lstrip()) if part)


def _word_border(text: str, characters: int) -> int:
    """At most `characters`, less where that would cut a word: "12" must not become "1"."""
    if characters >= len(text) or text[characters].isspace():
        return characters
    start = max(0, characters - LONGEST_WORD)
    for position in range(characters, start, -1):
        if text[position - 1].isspace():
            return position
    return characters if start else 0  # writing without spaces is cut anywhere


def _length(text: str, tokenizer: Any) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
