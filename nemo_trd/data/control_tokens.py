"""Tokenizes rendered chats so that only the template, never a message, writes control tokens.

Control tokens are those that transformers calls so: the special tokens of a tokenizer, and its
other added tokens that its chat template writes (`<think>`). transformers' own way of sparing them,
`apply_chat_template(sanitize_control_tokens=True)`, cuts the text at every one of them and knows no
tokenizer whose model spells them, as that of the toy does. Here the whole text goes at one time
through a copy of the tokenizer in which control tokens have names that nobody else can write.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer

from nemo_trd.data.types import TokenIds

Message = dict[str, Any]  # {"role": ..., "content": ...}
RenderText = Callable[[Sequence[Message]], str]

_PRIVATE = range(0xF0000, 0x10FFFE)  # code points that Unicode gives no meaning
_SECRET = f"Q{secrets.token_hex(8)}x"  # no text holds it
_NAME = re.compile(rf"{_SECRET}N\d+Q")


def encode_chat(
    messages: Sequence[Message], render: RenderText, tokenizer: Any, template: str
) -> TokenIds:
    """Token ids of a rendered conversation; messages count as text, whatever they spell.

    Where no message spells a control token, these are the ids of the rendered text.

    Args:
        render: puts messages through `template`, the tokenizer's chat template.
    """
    controls = control_tokens(tokenizer, template)
    if not any(controls.spelled_in(message) for message in messages):
        return _encode(tokenizer, render(messages))
    marks = _marks(messages, controls, template)
    hidden = render(_hide(messages, render, controls, marks))
    # Pieces alternate: text of the template, the mark of a token in data, text of the template ...
    pieces = re.split(f"([{''.join(marks.values())}])", hidden) if marks else [hidden]
    data = [_show(mark, marks) for mark in pieces[1::2]]
    if tokenizer.is_fast:
        return _renamed(tokenizer, template).encode(pieces[::2], data)
    # A tokenizer written in Python takes no new names: cut what data spell behind its first letter.
    parts = [""]
    for piece, spelt in zip(pieces[::2], [*data, ""], strict=True):
        parts[-1] += piece + spelt[:1]
        parts += [spelt[1:]] if spelt else []
    return tuple(token for part in parts if part for token in _encode(tokenizer, part))


def _encode(tokenizer: Any, text: str) -> TokenIds:
    # The template has written the special tokens; the tokenizer must not add a second BOS.
    # `verbose` off: the caller checks lengths and reports them with numbers.
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


# --- the control tokens of a tokenizer, and where a message spells one ---


@dataclass(frozen=True)
class ControlTokens:
    """Control tokens of a tokenizer with a chat template."""

    strings: tuple[str, ...]
    numbers: Mapping[str, int]  # position in `strings`
    special: frozenset[str]  # tokens that no template reads in a message
    pattern: re.Pattern[str]  # matches the longest of them at a place
    normalize: Callable[[str], str] | None  # applied before the tokenizer looks for them

    def spelled_in(self, value: Any) -> bool:
        """Whether any text in a message, its role excepted, spells one."""
        if isinstance(value, str):
            match = self.pattern.search(value)
            if not match and self.normalize:
                match = self.pattern.search(self.normalize(value))
            return match is not None
        return any(map(self.spelled_in, _inner(value)))

    def tokens_in(self, value: Any) -> set[str]:
        """Control tokens that the texts of a message spell."""
        if isinstance(value, str):
            return set(self.pattern.findall(value))
        return set().union(*map(self.tokens_in, _inner(value)))

    def hide(self, value: Any, marks: Mapping[str, str]) -> Any:
        """Put marks in the place of the control tokens that a message spells; others stay."""
        if isinstance(value, str):
            return self.pattern.sub(lambda match: marks.get(match[0], match[0]), value)
        if isinstance(value, Mapping):
            return {k: v if k == "role" else self.hide(v, marks) for k, v in value.items()}
        return [self.hide(v, marks) for v in value] if isinstance(value, list) else value


def _inner(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [item for key, item in value.items() if key != "role"]
    return value if isinstance(value, list) else []


@lru_cache(maxsize=8)
def control_tokens(tokenizer: Any, template: str) -> ControlTokens:
    """Find the control tokens of a tokenizer with a chat template."""
    added = tokenizer.added_tokens_decoder.values()
    # transformers lets a tokenizer name its control tokens.
    chat_tokens = getattr(tokenizer, "chat_control_tokens", None)

    def in_template(token: str) -> bool:
        return token in (template if chat_tokens is None else chat_tokens) and not token.isspace()

    controls = [token for token in added if token.special or in_template(token.content)]
    strings = tuple(dict.fromkeys(token.content for token in controls if token.content))
    late = any(token.normalized for token in controls) and tokenizer.is_fast
    normalizer = tokenizer.backend_tokenizer.normalizer if late else None
    return ControlTokens(
        strings=strings,
        numbers={token: number for number, token in enumerate(strings)},
        special=frozenset(token.content for token in controls if token.special),
        pattern=re.compile(_any_of(strings) if strings else "(?!)"),
        normalize=normalizer.normalize_str if normalizer else None,
    )


def _any_of(strings: Iterable[str]) -> str:
    """Regular expression for the longest of these; some tokenizers have thousands of them."""
    words = sorted(strings)
    branches = [
        re.escape(first) + _any_of(word[1:] for word in group)
        for first, group in groupby((w for w in words if w), key=lambda word: word[0])
    ]
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)})" + ("?" if "" in words else "")


def _marks(messages: Sequence[Message], controls: ControlTokens, template: str) -> dict[str, str]:
    """Choose a mark for each control token that the messages spell: a character used nowhere else.

    One character, since a template that cuts texts, or writes them in other letters, would leave
    a piece of anything longer in the prompt.
    """
    characters = {*template, *json.dumps(list(messages), ensure_ascii=False, default=str)}
    free = (mark for mark in map(chr, _PRIVATE) if mark not in characters)
    return dict(zip(sorted(controls.tokens_in(list(messages))), free, strict=False))


def _show(text: str, marks: Mapping[str, str]) -> str:
    return text.translate({ord(mark): token for token, mark in marks.items()})


def _hide(
    messages: Sequence[Message],
    render: RenderText,
    controls: ControlTokens,
    marks: Mapping[str, str],
) -> list[Message]:
    """Put marks in the place of the control tokens that messages spell.

    Tokens that the template itself looks for in an assistant's turn stay, as the `</think>` up to
    which Qwen3's leaves an earlier turn out: the template decides what becomes of them.
    """
    turns = [message for message in messages if message["role"] == "assistant"]
    spelt = controls.tokens_in(turns) - controls.special

    def hiding(one: str) -> list[Message]:
        mark = {one: marks[one]}
        return [controls.hide(m, mark) if m["role"] == "assistant" else m for m in messages]

    template_tokens: set[str] = set()
    if spelt:
        try:
            whole = render(messages)
            template_tokens = {one for one in spelt if _show(render(hiding(one)), marks) != whole}
        except TemplateError:  # it refuses a turn that spells them; as text they are none
            template_tokens = set()
    turn_marks = {token: mark for token, mark in marks.items() if token not in template_tokens}
    return [controls.hide(m, turn_marks if m["role"] == "assistant" else marks) for m in messages]


# --- a tokenizer that knows control tokens under other names ---


@dataclass(frozen=True)
class Renamed:
    """Copy of a tokenizer that knows control tokens by other names.

    It treats the names as the original treats the tokens; the spellings of the tokens are plain
    text to it.
    """

    core: Tokenizer
    names: Mapping[str, str]
    pattern: re.Pattern[str]  # matches a control token
    ids: Mapping[int, int]  # ids of added tokens: in the copy -> in the original

    def encode(self, pieces: Sequence[str], data: Sequence[str]) -> TokenIds:
        """Token ids of the template's pieces, with the texts of `data` between them."""
        renamed = [self.pattern.sub(lambda match: self.names[match[0]], text) for text in pieces]
        text = renamed[0] + "".join(map("".join, zip(data, renamed[1:], strict=True)))
        encoded = self.core.encode(text, add_special_tokens=False)
        spans = [
            span
            for token, span in zip(encoded.ids, encoded.offsets, strict=True)
            if self.core.id_to_token(token) in self.tokens
        ]
        if len(spans) < text.count(_SECRET):  # it passes some over, as the original does
            text = _NAME.sub(
                lambda match: (
                    match[0]
                    if any(a <= match.start() and match.end() <= b for a, b in spans)
                    else self.tokens[match[0]]
                ),
                text,
            )
            encoded = self.core.encode(text, add_special_tokens=False)
        return tuple(self.ids.get(token, token) for token in encoded.ids)

    @cached_property
    def tokens(self) -> dict[str, str]:
        """Control token of each name."""
        return {name: token for token, name in self.names.items()}


@lru_cache(maxsize=8)
def _renamed(tokenizer: Any, template: str) -> Renamed:
    controls = control_tokens(tokenizer, template)
    names = {token: f"{_SECRET}N{number}Q" for token, number in controls.numbers.items()}
    copied = json.loads(tokenizer.backend_tokenizer.to_str())
    copied["truncation"] = copied["padding"] = copied["post_processor"] = None
    for token in copied["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    _rename_in_model(copied["model"], names)
    core = Tokenizer.from_str(json.dumps(copied))
    added = tokenizer.added_tokens_decoder.items()
    theirs = {index: core.token_to_id(names.get(t.content, t.content)) for index, t in added}
    ids = {their: index for index, their in theirs.items() if their is not None}
    return Renamed(core, names, controls.pattern, ids)


def _rename_in_model(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename the control tokens in the vocabulary of a tokenizer's model (tokenizer.json).

    So it spells none of them as one piece. The unknown token keeps its name.
    """
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [piece, score]
        for index, (piece, score) in enumerate(vocabulary):
            if index != model.get("unk_id"):
                vocabulary[index] = [names.get(piece, piece), score]
        return
    pieces = {t for t in names if t in vocabulary and t != model.get("unk_token")}
    model["vocab"] = {names[t] if t in pieces else t: i for t, i in vocabulary.items()}
    if pieces and model.get("merges"):
        pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        model["merges"] = [p for p in pairs if pieces.isdisjoint((*p, "".join(p)))]
