"""Fits a teacher context into its token budget, by shortening texts with a visible notice.

Problem and instructions are never cut. The rule for the rest: the remaining budget is shared by
rollout and reference solution. A text that is no longer than half of it stays whole, and the other
one gets the remainder; where both are longer, each gets half.

Every text is tokenized once, to know where its tokens begin and end: whatever its length, it is
cut in one step. Lengths are then measured on the rendered token ids, since the token counts of
parts do not add up to that of the whole.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_trd.config.schema import RefinementConfig
from nemo_trd.data.types import TokenIds

Texts = Mapping[str, str]  # placeholder of the template -> text in its place
Render = Callable[[Texts], TokenIds]

LONGEST_WORD = 32  # characters; see _word_border
ATTEMPTS = 6  # while a result exceeds the budget, or leaves more than CLOSE of it
CLOSE = 8  # tokens


@dataclass(frozen=True)
class Measured:
    """Text with the begin and end of each of its tokens, in characters."""

    text: str
    starts: list[int]
    ends: list[int]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.ends)


Shorten = Callable[[Measured, int], str]  # (text, tokens to keep beside the notice)


def fit(
    texts: Texts, render: Render, refinement: RefinementConfig, tokenizer: Any
) -> tuple[TokenIds | None, tuple[str, ...]]:
    """Render at most `refinement.max_context_tokens` tokens, by the rule at the top.

    A text that is no longer than the notice which would replace it stays whole. Of the budget no
    more than some ten tokens and a word are left unused.

    Returns:
        The token ids, None when they do not fit, and the names of the shortened texts.
    """
    budget = refinement.max_context_tokens
    token_ids = render(texts)
    if len(token_ids) <= budget:
        return token_ids, ()
    if refinement.on_overflow == "refuse":
        return None, ()
    measured = {name: measure(texts[name], tokenizer) for name in SHORTEN if name in texts}
    notice = _count(f"\n{_notice(len(token_ids))}\n", tokenizer)

    def attempt(room: int) -> tuple[TokenIds, tuple[str, ...]]:
        shares = _shares({name: text.tokens for name, text in measured.items()}, room)
        cut = {
            name: SHORTEN[name](text, max(0, shares[name] - notice))
            for name, text in measured.items()
            if text.tokens > max(shares[name], notice)
        }
        return render({**texts, **cut}), tuple(cut)

    best: tuple[TokenIds, tuple[str, ...]] | None = None
    room = budget - len(render({**texts, **dict.fromkeys(measured, "")}))
    for _ in range(ATTEMPTS):
        fitted = attempt(max(room, 0))
        slack = budget - len(fitted[0])
        if slack >= 0 and (best is None or len(fitted[0]) > len(best[0])):
            best = fitted
        if 0 <= slack <= CLOSE or (slack < 0 and room <= 0):
            break
        room += slack
    if best is None:
        fitted = attempt(0)
        return fitted if len(fitted[0]) <= budget else (None, ())
    return best


def _shares(lengths: Mapping[str, int], room: int) -> dict[str, int]:
    """Number of tokens, of `room`, that each of at most two texts gets."""
    shares, remaining = {}, room
    for position, name in enumerate(sorted(lengths, key=lambda name: lengths[name])):
        shares[name] = min(lengths[name], remaining // (len(lengths) - position))
        remaining -= shares[name]
    return shares


def keep_head(measured: Measured, tokens: int) -> str:
    """Keep the beginning of a rollout: the first error decides, the rest is built on it.

    The rewrite keeps the right part before that error, and an end without its middle would
    invite the teacher to copy a result whose derivation it cannot see.
    """
    return _with_notice(measured, _head(measured, tokens), len(measured.text))


def keep_both_ends(measured: Measured, tokens: int) -> str:
    """Keep three quarters beginning, one quarter end: a reference solution ends with its answer."""
    tail = tokens // 4
    end = measured.starts[-tail] if tail else len(measured.text)
    return _with_notice(
        measured, _head(measured, tokens - tail), _word_border_after(measured.text, end)
    )


SHORTEN: dict[str, Shorten] = {"rollout": keep_head, "reference_solution": keep_both_ends}


def measure(text: str, tokenizer: Any) -> Measured:
    """Tokenize a text once.

    A tokenizer that is not a fast one cannot tell where its tokens are: they are taken for
    equally long.
    """
    options = {"add_special_tokens": False, "verbose": False}
    if getattr(tokenizer, "is_fast", False):
        offsets = tokenizer(text, return_offsets_mapping=True, **options)["offset_mapping"]
        return Measured(text, [start for start, _ in offsets], [end for _, end in offsets])
    count = len(tokenizer(text, **options)["input_ids"])
    borders = [len(text) * position // max(count, 1) for position in range(count + 1)]
    return Measured(text, borders[:-1], borders[1:])


def _head(measured: Measured, tokens: int) -> int:
    return _word_border(measured.text, measured.ends[tokens - 1]) if tokens else 0


def _with_notice(measured: Measured, start: int, end: int) -> str:
    """Replace [start, end) of a text by a notice of the number of tokens left out."""
    head, tail = measured.text[:start].rstrip(), measured.text[end:].lstrip()
    first = bisect_right(measured.ends, start)
    omitted = bisect_left(measured.starts, end) - first
    return "\n".join(part for part in (head, _notice(max(omitted, 1)), tail) if part)


def _notice(omitted: int) -> str:
    return f"[... {omitted} tokens left out ...]"


def _word_border(text: str, end: int) -> int:
    """Position <= `end` that cuts no word: "12" must not become "1"."""
    if end >= len(text) or text[end].isspace():
        return end
    start = max(0, end - LONGEST_WORD)
    for position in range(end, start, -1):
        if text[position - 1].isspace():
            return position
    return end if start else 0  # text without spaces is cut anywhere


def _word_border_after(text: str, start: int) -> int:
    """Position >= `start` that cuts no word."""
    if start <= 0 or text[start - 1].isspace():
        return start
    end = min(len(text), start + LONGEST_WORD)
    for position in range(start, end):
        if text[position].isspace():
            return position
    return start if end < len(text) else end


def _count(text: str, tokenizer: Any) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
