"""How many right derivations of a problem a model's samples hold. Pure functions of the samples."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from statistics import fmean

from nemo_trd.evaluate.accuracy import pass_at_k
from nemo_trd.toy.derivations import ORDERS, derivation
from nemo_trd.toy.task import read_problem

RIGHT = 16  # right samples that are compared where accuracy is to count for nothing


@dataclass(frozen=True)
class Counts:
    """The samples of one problem.

    answers: with the right answer. derivations: that are right derivations, by `ORDERS`.
    """

    samples: int
    answers: int
    derivations: tuple[int, ...]

    @property
    def right(self) -> int:
        """Right derivations of whatever order."""
        return sum(self.derivations)


def read_samples(evaluation: Path, problems: Path) -> list[Counts]:
    """Counts of every problem, in the order of the problems.

    Args:
        evaluation: output of nemo_trd.evaluate on `problems`, a file of nemo_trd.toy.
    """
    samples: dict[int, list[dict]] = {}
    for line in (evaluation / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        samples.setdefault(sample["problem"], []).append(sample)
    counts = []
    for index, line in enumerate(problems.read_text().splitlines()):
        factors = read_problem(json.loads(line)["problem"])
        assert factors is not None
        orders = Counter(derivation(factors, sample["text"]) for sample in samples[index])
        answers = sum(sample["correct"] is True for sample in samples[index])
        by_order = tuple(orders[order] for order in ORDERS)
        counts.append(Counts(len(samples[index]), answers, by_order))
    return counts


def expected_distinct(counts: Sequence[int], samples: int, k: int) -> float:
    """Expected number of kinds among k of the samples, drawn without replacement.

    Rarefaction (Hurlbert 1971), unbiased and exact. A sample may be of no kind.

    Args:
        counts: samples of each kind; together at most `samples`.
    """
    return sum(pass_at_k(samples, count, k) for count in counts)


def entropy(counts: Sequence[int]) -> float:
    """Of the shares of the counts, in nats. Biased towards zero where there are few."""
    total = sum(counts)
    return -sum(n / total * log(n / total) for n in counts if n)


def figures(problems: Sequence[Counts], ks: Sequence[int]) -> dict[str, float]:
    """Means over the problems, by name; a name is missing where no problem bears it.

    pass@k: a right derivation is among k samples. answer@k: a right answer is, by whatever steps.
    distinct@k: number of right derivations among k samples. distinct_of_right@k: among k right
    samples, k to `RIGHT`, over the problems that have `RIGHT` of them.
    entropy: of the right derivations of a problem. common: share of a problem's right samples that
    have the first order. guessed: share of its right answers that no right derivation leads to.
    orders: share of each order, in the samples that are right derivations.
    """
    found: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    for one in problems:
        for k in ks:
            add(f"pass@{k}", pass_at_k(one.samples, one.right, k))
            add(f"answer@{k}", pass_at_k(one.samples, one.answers, k))
            add(f"distinct@{k}", expected_distinct(one.derivations, one.samples, k))
            if k <= RIGHT <= one.right:
                add(f"distinct_of_right@{k}", expected_distinct(one.derivations, one.right, k))
        if one.right:
            add("entropy", entropy(one.derivations))
            add("common", one.derivations[0] / one.right)
        if one.answers:
            add("guessed", 1 - one.right / one.answers)
    return {name: fmean(values) for name, values in found.items()}
