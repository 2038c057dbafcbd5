"""Changes from y_o to y_r, in tokens: pure functions of token ids and of samples."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import zip_longest
from math import fsum
from typing import NamedTuple

from nemo_trd.data.types import Refinement, Rollout, TokenIds


@dataclass(frozen=True)
class Change:
    """How y_r differs from y_o, in tokens. Means of it are recorded for every step.

    `kept_share` counts the tokens of y_o that stand in y_r in the same order (their longest common
    subsequence). An empty y_o has lost nothing: its shares are 1.
    """

    first_difference: int | None  # position, from 0, where they part; None where they do not
    first_difference_share: float | None  # of y_o's length
    kept_share: float  # of y_o's length
    rollout_tokens: int  # a terminating EOS included, as everywhere here
    refinement_tokens: int
    unchanged: int  # 1 where both are the same


def change(rollout: Sequence[int], refinement: Sequence[int]) -> Change:
    """Compare the token ids of y_o and y_r."""
    parted = first_difference(rollout, refinement)
    length = len(rollout)
    return Change(
        first_difference=parted,
        first_difference_share=None if parted is None else parted / length if length else 1.0,
        kept_share=common_length(rollout, refinement) / length if length else 1.0,
        rollout_tokens=length,
        refinement_tokens=len(refinement),
        unchanged=int(parted is None),
    )


def first_difference(a: Sequence[object], b: Sequence[object]) -> int | None:
    """The first position, from 0, at which one has another token than the other, or none."""
    pairs = enumerate(zip_longest(a, b))
    return next((position for position, (one, other) in pairs if one != other), None)


class Kept(NamedTuple):
    """Which tokens belong to a longest common subsequence."""

    rollout: list[bool]
    refinement: list[bool]


def kept_tokens(rollout: Sequence[int], refinement: Sequence[int]) -> Kept:
    """Mark the tokens of y_o that were kept, and those of y_r that were taken over."""
    kept = Kept([False] * len(rollout), [False] * len(refinement))
    rows = list(_rows(rollout, refinement))
    i, j = len(rollout), len(refinement)
    while i and j:
        if rows[j] >> (i - 1) & 1:  # without token i - 1 of y_o it is as long
            i -= 1
        elif not rows[j - 1] >> (i - 1) & 1:  # without token j - 1 of y_r, too
            j -= 1
        else:
            i, j = i - 1, j - 1
            kept.rollout[i] = kept.refinement[j] = True
    return kept


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common subsequence."""
    (last,) = deque(_rows(a, b), maxlen=1)
    return len(a) - last.bit_count()


def _rows(a: Sequence[int], b: Sequence[int]) -> Iterator[int]:
    """The table of the longest common subsequences of all beginnings of `a` and `b`, row by row.

    Bit i of row j is 0 where that of a[:i+1] and b[:j] is longer than that of a[:i] and b[:j].
    One row is one integer, so 16k tokens take milliseconds (Hyyrö, "Bit-parallel LCS-length
    computation revisited", 2004), without a compiled package that images would have to take.
    """
    places: dict[int, int] = {}
    for position, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << position
    everywhere = row = (1 << len(a)) - 1
    yield row
    for token in b:
        matches = row & places.get(token, 0)
        row = (row + matches | row - matches) & everywhere
        yield row


def rewritten(refinements: Iterable[Refinement]) -> list[tuple[TokenIds, TokenIds]]:
    """(y_o, y_r) of the accepted rewrites."""
    return [
        (refinement.request.rollout.completion.token_ids, refinement.completion.token_ids)
        for refinement in refinements
        if refinement.rejection is None and refinement.completion is not None
    ]


def mean_change(changes: Sequence[Change]) -> dict[str, float]:
    """Means under the names of `Change`'s fields, over the changes that have a value for it."""
    means = {}
    for field in fields(Change):
        found = [getattr(change, field.name) for change in changes]
        values = [value for value in found if value is not None]
        if values:
            means[field.name] = fsum(values) / len(values)
    return means


def rollout_nll(rollouts: Iterable[Rollout]) -> dict[str, float]:
    """`rollout_nll`: the student's mean NLL of a token of y_o, in nats.

    It is a by-product of sampling, where the generator returns log-probabilities (vLLM does);
    nothing where it does not.
    """
    known = [r.completion.logprobs for r in rollouts if r.completion.logprobs]
    tokens = sum(len(logprobs) for logprobs in known)
    if not tokens:
        return {}
    return {"rollout_nll": -fsum(value for logprobs in known for value in logprobs) / tokens}
