"""Texts that end a completion: where they begin, and which tokens lie before them.

A text of `Sampling.stop` is looked for in what the completion decodes to, special tokens included,
after every token; a completion that an EOS token has ended first is not searched. Of those that
one token completes, the one that ends first counts, as in vLLM. The completion keeps the tokens
that lie wholly before it, as they were sampled: no token is made up, and no EOS is added. What
a token that also holds the beginning of the stop has before it is kept as text, `tail`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_trd.data.types import TokenIds
from nemo_trd.models.read import read_tokenizer

Decode = Callable[[Sequence[int]], str]
CONTEXT_TOKENS = 4  # of the prompt: some tokenizers drop the space before a text's first token


@dataclass(frozen=True)
class Cut:
    """The part of a completion before the text that has ended it."""

    token_ids: TokenIds
    tail: str


class StopStrings:
    """The texts of `stop`, looked for with one tokenizer's `decode`."""

    def __init__(self, stop: Sequence[str], decode: Decode) -> None:
        self._stop = stop
        self._decode = decode
        # A token has a byte or more, so that no stop is spread over more tokens than this.
        self._reach = max((len(text.encode()) for text in stop), default=0)

    def ends(self, prompt: TokenIds, token_ids: Sequence[int]) -> bool:
        """Whether the last token completes one of them, where none was complete before."""
        # A few tokens more, as a character may be cut in two where the window begins.
        window = self._decode(token_ids[-self._reach - CONTEXT_TOKENS :])
        return self._found(window) is not None and self.cut(prompt, token_ids) is not None

    def cut(self, prompt: TokenIds, token_ids: Sequence[int]) -> Cut | None:
        """The part before the first one that is complete; None where there is none."""
        context = prompt[-CONTEXT_TOKENS:]
        if self._decode(context).endswith("\ufffd"):  # a character that the completion goes on with
            context = ()
        skipped = len(self._decode(context))

        def decoded(count: int) -> str:
            return self._decode([*context, *token_ids[:count]])[skipped:]

        def text(count: int) -> str:
            """The first `count` tokens as text, without a last character that is not whole yet."""
            return decoded(count).rstrip("\ufffd")

        if self._found(text(len(token_ids))) is None:
            return None
        without, with_it = 0, len(token_ids)  # tokens that do not, and that do, complete one
        while with_it - without > 1:
            middle = (without + with_it) // 2
            if self._found(text(middle)) is None:
                without = middle
            else:
                with_it = middle
        whole = text(with_it)
        begin = self._found(whole)
        assert begin is not None
        kept = with_it
        while kept and not whole[:begin].startswith(decoded(kept)):
            kept -= 1
        return Cut(tuple(token_ids[:kept]), whole[len(decoded(kept)) : begin])

    def _found(self, text: str) -> int | None:
        """Where the one begins that ends first; equal ends: the first of the list."""
        places = [(text.find(stop), stop) for stop in self._stop]
        return min(
            ((place + len(stop), place) for place, stop in places if place >= 0),
            default=(0, None),
            key=lambda end_and_place: end_and_place[0],
        )[1]


def decoder(path: str, trust_remote_code: bool) -> Decode:
    """Decode with the tokenizer of a model's directory, which is read when it is first needed.

    Decoding raises ConfigError where transformers cannot read it.
    """
    tokenizers: list[Any] = []

    def decode(token_ids: Sequence[int]) -> str:
        if not tokenizers:
            tokenizers.append(read_tokenizer(path, trust_remote_code))
        return tokenizers[0].decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    return decode
