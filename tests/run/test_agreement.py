"""Servers that say something else than the trainer are refused, with the tokens."""

from __future__ import annotations

import math

import pytest
from tiny_models import byte_tokenizer

from nemo_trd.data.types import Completion, Prompt, Rollout
from nemo_trd.run import agreement

TOKENS = (70, 71, 72)


def rollout(*logprobs: float, index: int = 0) -> Rollout:
    completion = Completion(TOKENS[: len(logprobs)], "length", 0, tuple(logprobs))
    return Rollout(Prompt(index, "x", (5, 6)), 0, completion, "", None)


def trainer(*logprobs: float) -> agreement.StudentNll:
    return lambda trajectories: {t.name: [-value for value in logprobs] for t in trajectories}


def test_differences_come_largest_first_with_place_and_both_values() -> None:
    found = agreement.differences([rollout(-1.0, -2.0, -3.0)], trainer(-1.1, -2.5, -3.0))
    assert [(d.position, d.token_id, d.server, d.trainer) for d in found] == [
        (1, 71, -2.0, -2.5),
        (0, 70, -1.0, -1.1),
        (2, 72, -3.0, -3.0),
    ]
    assert agreement.metrics(found) == pytest.approx(
        {"logprob_difference": 0.2, "logprob_difference_max": 0.5}
    )


def test_rollouts_without_log_probabilities_are_not_compared() -> None:
    silent = Rollout(Prompt(0, "x", (5,)), 0, Completion(TOKENS, "length", 0), "", None)
    assert agreement.differences([silent], trainer()) == []
    assert agreement.metrics([]) == {}


@pytest.mark.parametrize(
    ("dtype", "allowed", "refused"), [("fp32", 9e-5, 2e-4), ("bf16", 0.04, 0.06)]
)
def test_more_than_rounding_explains_is_refused_with_the_tokens(
    dtype: str, allowed: float, refused: float
) -> None:
    same = agreement.differences([rollout(-1.0, index=3)], trainer(-1.0 - allowed))
    agreement.check(same, dtype, byte_tokenizer())
    other = agreement.differences([rollout(-1.0, index=3)], trainer(-1.0 - refused))
    with pytest.raises(agreement.Disagreement) as caught:
        agreement.check(other, dtype, byte_tokenizer())
    message = str(caught.value)
    token = byte_tokenizer().decode([70])
    assert f"prompt 3 sample 0 (rollout), token 0 {token!r}: server -1.00000" in message
    assert "Fix: " in message


def test_a_value_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(agreement.Disagreement):
        found = agreement.differences([rollout(math.nan)], trainer(-1.0))
        agreement.check(found, "bf16", byte_tokenizer())
