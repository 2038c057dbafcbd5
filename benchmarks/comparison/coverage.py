"""How many right derivations of a problem the samples of a model hold."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from math import log
from pathlib import Path
from statistics import fmean
from typing import Any

from nemo_trd.evaluate.accuracy import pass_at_k
from nemo_trd.toy.derivations import ORDERS, derivation
from nemo_trd.toy.task import read_problem

RIGHT = 16  # right samples of a problem that are compared where accuracy is to count for nothing


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
        """Right derivations, of whatever order."""
        return sum(self.derivations)


@dataclass(frozen=True)
class Sampled:
    """A model after some steps of one run, and what its samples are."""

    name: str
    seed: int
    step: int
    generated_tokens: int  # by student and teacher since the run began
    seconds: float  # of the steps so far
    problems: tuple[Counts, ...]


@dataclass(frozen=True)
class Results:
    """What came out. It is a JSON file, of which all tables and plots are made."""

    seeds: list[int]
    excluded: dict[str, list[str]]  # by seed: the gates that its models missed
    samples: int  # of each problem
    chosen: dict[str, dict[str, Any]]  # by method: lr, steps, development_avg
    models: dict[str, dict[str, float | None]]  # by seed: what student and teacher can do
    sampled: list[Sampled]
    minutes: float  # of the last start alone
    machine: str

    @classmethod
    def read(cls, file: Path) -> Results:
        fields = json.loads(file.read_text())
        sampled = [
            Sampled(*rest, tuple(Counts(n, answers, tuple(by)) for n, answers, by in problems))
            for *rest, problems in fields.pop("sampled")
        ]
        return cls(**fields, sampled=sampled)

    def write(self, file: Path) -> None:
        """One line for each model."""
        fields = {**self.__dict__}
        lines = ",\n".join(
            json.dumps(astuple(one), separators=(",", ":")) for one in fields.pop("sampled")
        )
        text = json.dumps(fields, indent=1).removesuffix("\n}")
        file.write_text(f'{text},\n "sampled": [\n{lines}\n]\n}}\n')

    def of(self, name: str) -> list[Sampled]:
        """The models of this name, in the order of the seeds."""
        return [one for seed in self.seeds for one in self.sampled if _is(one, name, seed)]


def _is(one: Sampled, name: str, seed: int) -> bool:
    return (one.name, one.seed) == (name, seed)


def read_samples(evaluation: Path, problems: Path) -> tuple[Counts, ...]:
    """Counts of every problem, in the order of the problems.

    Args:
        evaluation: output of nemo_trd.evaluate on `problems`, a file of toy problems.
    """
    samples: dict[int, list[dict[str, Any]]] = {}
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
    return tuple(counts)


def rewrites(run_dir: Path) -> dict[str, float | None]:
    """What the teacher made of the rollouts that a run recorded; None where there were none.

    order_kept: share of the rewrites of right derivations that are right in the same order.
    repaired: share of the rewrites of all other rollouts that are right derivations.
    """
    kept: list[bool] = []
    repaired: list[bool] = []
    for file in sorted((run_dir / "samples").glob("*.jsonl")):
        for sample in map(json.loads, file.read_text().splitlines()):
            factors = read_problem(sample["problem"])
            assert factors is not None
            if sample["refinement"] is None or sample["refinement"].get("text") is None:
                continue
            before = derivation(factors, sample["rollout"]["text"])
            after = derivation(factors, sample["refinement"]["text"])
            if before is None:
                repaired.append(after is not None)
            else:
                kept.append(after == before)
    shares = {"order_kept": kept, "repaired": repaired}
    return {name: fmean(values) if values else None for name, values in shares.items()}


def expected_distinct(counts: Sequence[int], samples: int, k: int) -> float:
    """Expected number of kinds among k of the samples, drawn without replacement.

    Rarefaction (Hurlbert 1971), unbiased and exact.

    Args:
        counts: samples of each kind; together at most `samples`, the others are of none.
    """
    return sum(pass_at_k(samples, count, k) for count in counts)


def entropy(counts: Sequence[int]) -> float:
    """Of the shares of the counts, in nats. Biased towards zero where there are few."""
    total = sum(counts)
    return -sum(n / total * log(n / total) for n in counts if n)


def up_to(samples: int) -> list[int]:
    """1, 2, 4, ... and the number of samples itself."""
    return sorted({2**power for power in range(samples.bit_length())} | {samples})


def figures(problems: Sequence[Counts]) -> dict[str, float]:
    """Means over the problems, by name; a name is missing where no problem bears it.

    pass@k: a right derivation is among k samples. answer@k: a right answer is, by whatever steps.
    distinct@k: number of right derivations among k samples. distinct_of_right@k: among k right
    samples, k to `RIGHT`, over the problems that have `RIGHT` of them; enough: share of these.
    entropy: of the right derivations of a problem. common: share of a problem's right derivations
    that have the first order. guessed: share of its right answers that no right derivation has.
    """
    found: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    for one in problems:
        for k in up_to(one.samples):
            add(f"pass@{k}", pass_at_k(one.samples, one.right, k))
            add(f"answer@{k}", pass_at_k(one.samples, one.answers, k))
            add(f"distinct@{k}", expected_distinct(one.derivations, one.samples, k))
        add("enough", float(one.right >= RIGHT))
        for k in up_to(RIGHT) if one.right >= RIGHT else ():
            add(f"distinct_of_right@{k}", expected_distinct(one.derivations, one.right, k))
        if one.right:
            add("entropy", entropy(one.derivations))
            add("common", one.derivations[0] / one.right)
        if one.answers:
            add("guessed", 1 - one.right / one.answers)
    return {name: fmean(values) for name, values in found.items()}


def order_shares(problems: Sequence[Counts]) -> list[float]:
    """Share of each of `ORDERS` in all right derivations; zeros where there are none."""
    totals = [sum(column) for column in zip(*(one.derivations for one in problems), strict=True)]
    return [total / max(1, sum(totals)) for total in totals]
