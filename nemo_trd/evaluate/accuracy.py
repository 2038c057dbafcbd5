"""Accuracy on problems with answers: avg@k, pass@k, and how sure they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, fsum, sqrt

import numpy as np

from nemo_trd.algorithm.bootstrap import resampled


def pass_at_k(decided: int, correct: int, k: int) -> float:
    """Probability that k of the `decided` samples, drawn without replacement, hold a right one.

    The unbiased estimate of Chen et al. (arXiv 2107.03374), in exact integers.

    Raises:
        ValueError: fewer samples than k.
    """
    if not 0 <= correct <= decided or not 1 <= k <= decided:
        raise ValueError(f"pass@{k} of {decided} samples, {correct} of them right, is not defined")
    return 1 - comb(decided - correct, k) / comb(decided, k)


@dataclass(frozen=True)
class Score:
    """Verdicts on the samples of one problem, counted."""

    prompt_index: int
    correct: int
    wrong: int
    undecided: int  # the verifier had no verdict, or the generator aborted

    @property
    def decided(self) -> int:
        return self.correct + self.wrong


@dataclass(frozen=True)
class Accuracy:
    """avg@k and pass@k over `problems`.

    Samples without a verdict are neither right nor wrong: a problem is judged by its other
    samples (pass@k by as many of them as there are), one without any is left out of `problems`.
    Both are counted.
    """

    avg_at_k: float
    pass_at_k: float
    k: int
    problems: int
    stderr: float  # of avg_at_k, from the spread over problems; NaN with fewer than two
    undecided_samples: int
    undecided_problems: int
    scores: tuple[Score, ...]  # of every problem, in the order of the prompts

    def summary(self) -> dict[str, float]:
        """The figures under the names that they have in reports and `summary.json`."""
        return {
            f"avg@{self.k}": self.avg_at_k,
            f"pass@{self.k}": self.pass_at_k,
            "problems": self.problems,
            "stderr": self.stderr,
            "undecided_samples": self.undecided_samples,
            "undecided_problems": self.undecided_problems,
        }

    def __str__(self) -> str:
        text = (
            f"avg@{self.k} {self.avg_at_k:.3f} ± {self.stderr:.3f}, "
            f"pass@{self.k} {self.pass_at_k:.3f} ({self.problems} problems)"
        )
        if self.undecided_samples:
            text += (
                f"; no verdict on {self.undecided_samples} samples, "
                f"{self.undecided_problems} problems left out"
            )
        return text


def accuracy(scores: Sequence[Score], k: int) -> Accuracy:
    """Averages over problems; NaN where nothing was decided."""
    judged = [score for score in scores if score.decided]
    rates = [score.correct / score.decided for score in judged]
    passes = [pass_at_k(s.decided, s.correct, min(k, s.decided)) for s in judged]
    mean = _mean(rates)
    spread = fsum((rate - mean) ** 2 for rate in rates)
    number = len(judged)
    return Accuracy(
        avg_at_k=mean,
        pass_at_k=_mean(passes),
        k=k,
        problems=number,
        stderr=sqrt(spread / (number - 1) / number) if number > 1 else float("nan"),
        undecided_samples=sum(score.undecided for score in scores),
        undecided_problems=len(scores) - number,
        scores=tuple(scores),
    )


def _mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values) if values else float("nan")


@dataclass(frozen=True)
class Estimate:
    """A mean over problems, and the bounds of its confidence interval."""

    value: float
    low: float
    high: float


def estimates(
    scores: Sequence[Score], n: int, resamples: int, confidence: float, seed: int
) -> dict[str, Estimate]:
    """avg@n, and pass@k for every k from 1 to n, with bootstrap intervals over problems.

    As in `accuracy`, pass@k of a problem with fewer than k decided samples is judged by those,
    and a problem without any is left out. All are NaN where nothing was decided.
    """
    judged = [score for score in scores if score.decided]
    names = [f"avg@{n}", *(f"pass@{k}" for k in range(1, n + 1))]
    if not judged:
        return dict.fromkeys(names, Estimate(*[float("nan")] * 3))
    rows = [
        [
            score.correct / score.decided,
            *(
                pass_at_k(score.decided, score.correct, min(k, score.decided))
                for k in range(1, n + 1)
            ),
        ]
        for score in judged
    ]
    low, high = bootstrap(np.array(rows), resamples, confidence, seed)
    means = [_mean(column) for column in zip(*rows, strict=True)]
    figures = zip(means, low.tolist(), high.tolist(), strict=True)
    return {name: Estimate(*figure) for name, figure in zip(names, figures, strict=True)}


def bootstrap(
    values: np.ndarray, resamples: int, confidence: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of the percentile bootstrap interval of the mean over the rows of [rows, figures].

    Rows are drawn with replacement, all figures of a row together.
    """
    rows = len(values)
    means = [counts @ values / rows for counts in resampled(rows, resamples, seed)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0)
    return low, high
