"""Digests of prompts: a run compares its own with those of the checkpoint that it resumes.

A checkpoint keeps 20 bytes for each usable prompt, in their order: its row, and 4 bytes each of
the BLAKE2b of its parts and tokens. So the first difference can be named without the old data.
"""

from __future__ import annotations

import struct
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from nemo_trd.data.types import Prompt

DIGESTS_FILE = "prompts.digest"
PARTS = ("problem", "reference solution", "answer", "tokens")
_ENTRY = struct.Struct("<I4s4s4s4s")
BYTES = _ENTRY.size  # length of one prompt's entry


@dataclass(frozen=True)
class Difference:
    """Difference between the prompts of a checkpoint and the present ones."""

    before: int  # number of prompts in the checkpoint
    now: int  # number of prompts now
    first: int  # position of the first that differs, among the usable ones
    row: int | None  # its row in the data now, from 0; None: the data end before it
    row_before: int | None  # its row in the data before
    parts: tuple[str, ...]  # those of PARTS that differ there, where both have a prompt
    differing: int  # number of positions that both have and that differ
    only_order: bool  # the same prompts, in another order or in other rows
    only_tokens: bool  # the same rows with the same texts, tokenized otherwise


def digests(prompts: Sequence[Prompt]) -> bytes:
    """Digests of prompts, `BYTES` = 20 bytes for each, in their order."""
    return b"".join(
        _ENTRY.pack(
            prompt.index,
            _digest(prompt.problem),
            _digest(prompt.reference_solution),
            _digest(_answers(prompt)),
            blake2b(array("q", prompt.token_ids).tobytes(), digest_size=4).digest(),
        )
        for prompt in prompts
    )


def _answers(prompt: Prompt) -> str | None:
    """The answer to a prompt, and the pair that is stored with it, as one text."""
    if prompt.stored is not None:
        return f"{prompt.answer} {prompt.stored}"
    return None if prompt.answer is None else str(prompt.answer)


def _digest(text: str | None) -> bytes:
    encoded = b"" if text is None else b"=" + text.encode("utf-8", "surrogatepass")
    return blake2b(encoded, digest_size=4).digest()


def difference(before: bytes, now: bytes) -> Difference | None:
    """Compare two results of `digests`; None where they are the same."""
    if before == now:
        return None
    old, new = list(_ENTRY.iter_unpack(before)), list(_ENTRY.iter_unpack(now))
    differing = [i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b]
    first = differing[0] if differing else min(len(old), len(new))
    was, is_now = (entries[first] if first < len(entries) else None for entries in (old, new))
    parts: tuple[str, ...] = ()
    if was is not None and is_now is not None:
        pairs = zip(PARTS, was[1:], is_now[1:], strict=True)
        parts = tuple(part for part, a, b in pairs if a != b)
    return Difference(
        before=len(old),
        now=len(new),
        first=first,
        row=is_now[0] if is_now else None,
        row_before=was[0] if was else None,
        parts=parts,
        differing=len(differing),
        only_order=Counter(e[1:] for e in old) == Counter(e[1:] for e in new),
        only_tokens=[e[:4] for e in old] == [e[:4] for e in new],
    )
