"""Changes from y_o to y_r, in tokens: pure functions of token ids and of samples."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import zip_longest
from math import fsum
from typing import NamedTuple

from nemo_trd.data.types import Completion, Refinement, Rollout, TokenIds


@dataclass(frozen=True)
class Change:
    """Difference between y_r and y_o, in tokens. Its means are recorded for every step.

    `kept_share` counts the tokens of y_o that stand in y_r in the same order (their longest common
    subsequence). An empty y_o has lost nothing: its shares are 1.
    """

    first_difference: int | None  # position, from 0, where they part; None where they do not
    first_difference_share: float | None  # the same as a share of y_o's length
    kept_share: float  # common tokens as a share of y_o's length
    rollout_tokens: int  # a terminating EOS included, as everywhere here
    refinement_tokens: int
    unchanged: int  # 1 where both are the same


def change(rollout: Sequence[int], refinement: Sequence[int]) -> Change:
    """Compare the token ids of y_o and y_r."""
    position = first_difference(rollout, refinement)
    length = len(rollout)
    return Change(
        first_difference=position,
        first_difference_share=None if position is None else position / length if length else 1.0,
        kept_share=common_length(rollout, refinement) / length if length else 1.0,
        rollout_tokens=length,
        refinement_tokens=len(refinement),
        unchanged=int(position is None),
    )


def first_difference(a: Sequence[object], b: Sequence[object]) -> int | None:
    """First position, from 0, at which the tokens differ; None where they never do."""
    pairs = enumerate(zip_longest(a, b))
    return next((position for position, (one, other) in pairs if one != other), None)


class Kept(NamedTuple):
    """Marks, one a token: whether it belongs to a longest common subsequence."""

    rollout: list[bool]
    refinement: list[bool]


def kept_tokens(rollout: Sequence[int], refinement: Sequence[int]) -> Kept:
    """Mark the tokens of y_o that y_r keeps, and those of y_r that come from y_o."""
    marks = Kept([False] * len(rollout), [False] * len(refinement))
    rows = list(_rows(rollout, refinement))
    i, j = len(rollout), len(refinement)
    while i and j:
        if rows[j] >> (i - 1) & 1:  # without token i - 1 of y_o it is as long
            i -= 1
        elif not rows[j - 1] >> (i - 1) & 1:  # without token j - 1 of y_r, too
            j -= 1
        else:
            i, j = i - 1, j - 1
            marks.rollout[i] = marks.refinement[j] = True
    return marks


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common subsequence."""
    (last,) = deque(_rows(a, b), maxlen=1)
    return len(a) - last.bit_count()


def _rows(a: Sequence[int], b: Sequence[int]) -> Iterator[int]:
    """Table of the longest common subsequences of all beginnings of `a` and `b`, row by row.

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
    """Token ids (y_o, y_r) of the accepted rewrites."""
    return [
        (refinement.request.rollout.completion.token_ids, refinement.completion.token_ids)
        for refinement in refinements
        if refinement.rejection is None and refinement.completion is not None
    ]


def mean_change(changes: Sequence[Change]) -> dict[str, float]:
    """Mean of each field of `Change`, over the changes that have a value for it."""
    means = {}
    for field in fields(Change):
        recorded = [getattr(change, field.name) for change in changes]
        values = [value for value in recorded if value is not None]
        if values:
            means[field.name] = fsum(values) / len(values)
    return means


def rollout_nll(rollouts: Iterable[Rollout]) -> dict[str, float]:
    """Student's mean NLL per token of y_o, in nats, under the key "rollout_nll".

    A by-product of sampling where the generator returns log-probabilities (vLLM does); an empty
    dictionary where it does not.
    """
    sampled = [r.completion.logprobs for r in rollouts if r.completion.logprobs]
    tokens = sum(len(logprobs) for logprobs in sampled)
    if not tokens:
        return {}
    return {"rollout_nll": -fsum(value for logprobs in sampled for value in logprobs) / tokens}


def draft_metrics(rewrites: Iterable[Completion]) -> dict[str, float]:
    """How well drafts of y_r did, where the teacher's servers check some: else nothing.

    "draft_acceptance" is the share of the drafted tokens that were accepted;
    "tokens_per_decode_step" the tokens of the rewrites over the steps in which they were computed:
    each gives one token and the accepted ones.
    """
    told = [(len(r.token_ids), *r.drafts) for r in rewrites if r.drafts is not None]
    tokens, drafted, accepted = (sum(figures[i] for figures in told) for i in range(3))
    if not tokens:
        return {}
    share = {"draft_acceptance": accepted / drafted} if drafted else {}
    return share | {"tokens_per_decode_step": tokens / max(1, tokens - accepted)}
