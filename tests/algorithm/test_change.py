"""What rewriting did to rollouts, against brute force."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_trd.algorithm.change import (
    Change,
    change,
    draft_metrics,
    first_difference,
    kept_tokens,
    mean_change,
    rewritten,
    rollout_nll,
)
from nemo_trd.data.types import Completion, Prompt, Refinement, RefinementPrompt, Rollout

few_tokens = st.lists(st.sampled_from([0, 1, 151_935, 2]), max_size=9)


def longest_common_subsequence(a: list[int], b: list[int]) -> int:
    """By trying every subsequence of `a`, longest first."""

    def within(wanted: tuple[int, ...]) -> bool:
        rest = iter(b)
        return all(token in rest for token in wanted)

    lengths = range(len(a), -1, -1)
    return next(n for n in lengths if any(within(choice) for choice in combinations(a, n)))


@given(few_tokens, few_tokens)
def test_the_kept_share_is_the_longest_common_subsequence(a: list[int], b: list[int]) -> None:
    longest = longest_common_subsequence(a, b)
    assert change(a, b).kept_share == (longest / len(a) if a else 1)
    kept = kept_tokens(a, b)
    assert (len(kept.rollout), len(kept.refinement)) == (len(a), len(b))
    taken = [token for token, keep in zip(a, kept.rollout, strict=True) if keep]
    assert taken == [token for token, keep in zip(b, kept.refinement, strict=True) if keep]
    assert len(taken) == longest


@given(few_tokens, few_tokens)
def test_both_are_the_same_before_the_first_difference_only(a: list[int], b: list[int]) -> None:
    position = first_difference(a, b)
    if position is None:
        assert a == b
    else:
        assert a[:position] == b[:position] and a[position : position + 1] != b[position:][:1]


def test_changes_by_hand() -> None:
    assert change([1, 2, 3, 9], [1, 5, 3, 9, 9]) == Change(1, 0.25, 0.75, 4, 5, 0)
    assert change([1, 2], [1, 2]) == Change(None, None, 1.0, 2, 2, 1)
    assert change([1, 2], [1, 2, 3]) == Change(2, 1.0, 1.0, 2, 3, 0)
    assert change([1, 2], []) == Change(0, 0.0, 0.0, 2, 0, 0)
    assert change([], [4]) == Change(0, 1.0, 1.0, 0, 1, 0)


def test_responses_of_the_longest_kind_are_compared() -> None:
    """16k tokens, the length of the paper's responses."""
    rollout = [token % 977 for token in range(16_000)]
    refinement = rollout[:8000] + [-1] * 50 + rollout[8050:]
    found = change(rollout, refinement)
    assert found.first_difference == 8000 and found.kept_share == pytest.approx(15_950 / 16_000)


def test_means_are_over_the_changes_that_have_a_value() -> None:
    means = mean_change([change([1, 2, 3, 9], [1, 5, 3, 9, 9]), change([1, 2], [1, 2])])
    assert means == {
        "first_difference": 1,
        "first_difference_share": 0.25,
        "kept_share": 0.875,
        "rollout_tokens": 3,
        "refinement_tokens": 3.5,
        "unchanged": 0.5,
    }
    assert "first_difference" not in mean_change([change([1], [1])])
    assert mean_change([]) == {}


def refinement(rejection: Any, logprobs: tuple[float, ...] | None = None) -> Refinement:
    rollout = Rollout(Prompt(0, "?", (1,)), 0, Completion((7, 2), "stop", 0, logprobs), "", None)
    asked = rejection not in ("subset", "context_overflow")
    request = RefinementPrompt(rollout, (1,) if asked else None, None if asked else rejection)
    return Refinement(
        request, Completion((8, 2), "stop", 0) if asked else None, "", None, rejection
    )


def test_only_accepted_rewrites_are_compared() -> None:
    given = [refinement(r) for r in ("subset", None, "truncated", "context_overflow")]
    assert rewritten(given) == [((7, 2), (8, 2))]


def test_drafts_are_counted_over_the_rewrites_that_had_some() -> None:
    def rewrite(tokens: int, drafts: tuple[int, int] | None) -> Completion:
        return Completion((8,) * tokens, "stop", 0, drafts=drafts)

    metrics = draft_metrics([rewrite(10, (8, 6)), rewrite(4, (2, 0)), rewrite(50, None)])
    assert metrics == {"draft_acceptance": 6 / 10, "tokens_per_decode_step": 14 / 8}
    assert draft_metrics([rewrite(3, (0, 0))]) == {"tokens_per_decode_step": 1}
    assert draft_metrics([rewrite(50, None)]) == {}


def test_the_nll_of_rollouts_is_a_mean_over_tokens_where_log_probabilities_are_known() -> None:
    rollouts = [
        refinement(None, logprobs).request.rollout for logprobs in ((-1.0, -0.5), None, (-3.0, 0.0))
    ]
    assert rollout_nll(rollouts) == {"rollout_nll": 4.5 / 4}
    assert rollout_nll(rollouts[1:2]) == {}
