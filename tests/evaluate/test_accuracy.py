from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Sequence
from itertools import combinations
from statistics import mean, stdev

import numpy as np
import pytest

from nemo_trd.config.schema import Evaluation, Sampling
from nemo_trd.data.types import Completion, GenerationRequest, Prompt
from nemo_trd.evaluate.accuracy import Accuracy, Score, accuracy, bootstrap, estimates, pass_at_k
from nemo_trd.evaluate.in_run import evaluate

SAMPLING = Sampling(temperature=1, top_p=1, top_k=0, max_tokens=4)


def settings(samples: int) -> Evaluation:
    return Evaluation(
        at_start=False, at_end=False, interval=None, samples_per_problem=samples, sampling=SAMPLING
    )


def prompts(count: int) -> list[Prompt]:
    return [Prompt(3 * i, f"problem {i}", (i,), answer=str(i % 4)) for i in range(count)]


def answer_by_seed(
    requests: Sequence[GenerationRequest], sampling: Sampling, description: str
) -> list[Completion]:
    """A generator whose answer is a function of the request alone."""
    return [Completion((random.Random(r.seed).randrange(4),), "stop", 0) for r in requests]


class Numbers:
    """A tokenizer whose tokens are numbers."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, token_ids))


def same(text: str, answer: str) -> bool:
    return text == answer


def test_pass_at_k_equals_enumeration() -> None:
    for decided in range(1, 7):
        for correct in range(decided + 1):
            samples = [True] * correct + [False] * (decided - correct)
            for k in range(1, decided + 1):
                subsets = [any(chosen) for chosen in combinations(samples, k)]
                assert pass_at_k(decided, correct, k) == pytest.approx(mean(subsets))


@pytest.mark.parametrize(("decided", "correct", "k"), [(3, 1, 4), (3, 4, 1), (3, 1, 0)])
def test_undefined_pass_at_k_is_refused(decided: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(decided, correct, k)


def test_figures_equal_those_of_statistics() -> None:
    scores = [Score(i, correct, 8 - correct, 0) for i, correct in enumerate([0, 3, 8, 1, 0])]
    result = accuracy(scores, 8)
    rates = [0, 3 / 8, 1, 1 / 8, 0]
    assert result.avg_at_k == pytest.approx(mean(rates))
    assert result.stderr == pytest.approx(stdev(rates) / math.sqrt(5))
    assert result.pass_at_k == pytest.approx(3 / 5)
    assert result.summary() == {
        "avg@8": result.avg_at_k,
        "pass@8": result.pass_at_k,
        "problems": 5,
        "stderr": result.stderr,
        "undecided_samples": 0,
        "undecided_problems": 0,
    }
    assert str(result) == "avg@8 0.300 ± 0.188, pass@8 0.600 (5 problems)"


def test_samples_without_a_verdict_are_neither_right_nor_wrong() -> None:
    scores = [Score(0, 1, 1, 2), Score(1, 0, 4, 0), Score(2, 0, 0, 4), Score(3, 2, 2, 0)]
    result = accuracy(scores, 4)
    assert result.avg_at_k == pytest.approx((1 / 2 + 0 + 1 / 2) / 3)
    assert result.pass_at_k == pytest.approx(2 / 3)
    assert (result.problems, result.undecided_samples, result.undecided_problems) == (3, 6, 1)
    assert "no verdict on 6 samples, 1 problems left out" in str(result)


def test_nothing_decided_is_not_zero() -> None:
    result = accuracy([Score(0, 0, 0, 4)], 4)
    assert math.isnan(result.avg_at_k) and math.isnan(result.pass_at_k)
    assert math.isnan(result.stderr) and result.problems == 0


def test_one_problem_has_no_standard_error() -> None:
    assert math.isnan(accuracy([Score(0, 1, 3, 0)], 4).stderr)


def test_every_problem_is_sampled_k_times_with_seeds_of_its_own() -> None:
    asked: list[GenerationRequest] = []

    def generate(
        requests: Sequence[GenerationRequest], sampling: Sampling, description: str
    ) -> list[Completion]:
        assert sampling is not None and description == "evaluation"
        asked.extend(requests)
        return answer_by_seed(requests, sampling, description)

    result = evaluate(generate, prompts(10), settings(8), 5, same, Numbers())
    assert len({r.seed for r in asked}) == 80
    assert [r.prompt_token_ids for r in asked] == [(i,) for i in range(10) for _ in range(8)]
    assert [score.prompt_index for score in result.scores] == [3 * i for i in range(10)]
    assert all(score.decided == 8 for score in result.scores)
    expected = mean(random.Random(r.seed).randrange(4) == r.prompt_token_ids[0] % 4 for r in asked)
    assert result.avg_at_k == pytest.approx(expected)


def test_order_of_problems_changes_nothing() -> None:
    def figures(result: Accuracy) -> tuple[dict[str, float], set[Score]]:
        return result.summary(), set(result.scores)

    straight = evaluate(answer_by_seed, prompts(30), settings(4), 5, same, Numbers())
    backwards = evaluate(answer_by_seed, prompts(30)[::-1], settings(4), 5, same, Numbers())
    assert figures(straight) == figures(backwards)
    assert straight != evaluate(answer_by_seed, prompts(30), settings(4), 6, same, Numbers())


def test_aborted_samples_and_problems_without_answer_have_no_verdict() -> None:
    def half_aborted(
        requests: Sequence[GenerationRequest], sampling: Sampling, description: str
    ) -> list[Completion]:
        return [
            Completion((), "abort", 0)
            if i % 2
            else Completion((r.prompt_token_ids[0] % 4,), "stop", 0)
            for i, r in enumerate(requests)
        ]

    unanswered = Prompt(100, "open problem", (7,))
    result = evaluate(half_aborted, [*prompts(3), unanswered], settings(4), 0, same, Numbers())
    assert (result.avg_at_k, result.problems) == (1.0, 3)
    assert (result.undecided_samples, result.undecided_problems) == (3 * 2 + 4, 1)


def test_a_verifier_without_verdict_is_counted() -> None:
    result = evaluate(
        answer_by_seed, prompts(3), settings(2), 0, lambda text, answer: None, Numbers()
    )
    assert result.undecided_samples == 6 and result.problems == 0


def test_evaluation_without_any_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="none of the 1 problems"):
        evaluate(answer_by_seed, [Prompt(0, "open", (1,))], settings(2), 0, same, Numbers())


# --- intervals ---


def test_estimates_hold_avg_and_every_pass_at_k() -> None:
    scores = [Score(i, c, 4 - c, 0) for i, c in enumerate([0, 1, 4, 2, 0, 3])]
    found = estimates(scores, 4, resamples=50, confidence=0.9, seed=0)
    assert list(found) == ["avg@4", "pass@1", "pass@2", "pass@3", "pass@4"]
    for k in range(1, 5):
        enumerated = [
            mean(any(chosen) for chosen in combinations([True] * c + [False] * (4 - c), k))
            for c in [0, 1, 4, 2, 0, 3]
        ]
        assert found[f"pass@{k}"].value == pytest.approx(mean(enumerated))
    assert found["avg@4"].value == pytest.approx(found["pass@1"].value)
    assert all(figure.low <= figure.value <= figure.high for figure in found.values())


def test_undecided_samples_leave_estimates_as_accuracy_has_them() -> None:
    scores = [Score(0, 1, 1, 2), Score(1, 0, 4, 0), Score(2, 0, 0, 4), Score(3, 2, 2, 0)]
    found, known = estimates(scores, 4, 10, 0.9, 0), accuracy(scores, 4)
    assert found["avg@4"].value == known.avg_at_k and found["pass@4"].value == known.pass_at_k
    nothing = estimates([Score(0, 0, 0, 4)], 4, 10, 0.9, 0)
    assert all(math.isnan(figure.value) for figure in nothing.values())


def test_bootstrap_intervals_are_those_of_resampling_one_by_one() -> None:
    """Against the definition: rows drawn with replacement, one resample at a time."""
    random = np.random.default_rng(1)
    values = random.random((40, 2)) ** 2
    low, high = bootstrap(values, 20_000, 0.9, seed=0)
    drawn = [values[random.integers(0, 40, 40)].mean(0) for _ in range(20_000)]
    assert np.allclose([low, high], np.quantile(drawn, [0.05, 0.95], axis=0), atol=0.003)
    again = bootstrap(values, 20_000, 0.9, seed=0)
    assert np.array_equal(again, (low, high))
    assert not np.array_equal(bootstrap(values, 20_000, 0.9, seed=1), (low, high))


def test_bootstrap_intervals_cover_the_truth_as_often_as_they_say() -> None:
    random, truth, covered = np.random.default_rng(2), 0.3, 0
    for seed in range(400):
        low, high = bootstrap((random.random((100, 1)) < truth) * 1.0, 500, 0.9, seed)
        covered += low[0] <= truth <= high[0]
    assert covered / 400 == pytest.approx(0.9, abs=0.045)  # three standard errors


def test_many_resamples_of_many_problems_do_not_fill_the_memory() -> None:
    low, high = bootstrap(np.ones((2_000, 1)), 12_000, 0.95, seed=0)  # two blocks
    assert low == high == 1


@pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="scipy is not installed")
def test_bootstrap_agrees_with_scipy() -> None:
    from scipy import stats

    values = np.random.default_rng(3).random(60)
    low, high = bootstrap(values[:, None], 20_000, 0.95, seed=0)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert (low[0], high[0]) == pytest.approx((theirs.low, theirs.high), abs=0.003)
