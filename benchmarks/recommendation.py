"""Which method to take: the rule of docs/comparison.md, carried out on the kept results.

    python benchmarks/recommendation.py     # writes docs/comparison/recommendation.md

A run of yours is made once, in a condition that nobody has measured. So a method counts for what
one more run would reach if it went badly: the lower end of the 95 % prediction interval of avg@k,
by Student's t over seeds, after as many generated tokens as all others have. Of these the mean is
taken over conditions, and once more over experiments, which have one condition or several. A
method takes part if it was run in every condition.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

from scipy import stats

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:  # where this file is imported and not run
    sys.path.insert(0, str(HERE))

from comparison.figures import markdown  # noqa: E402
from comparison.sweep import METHODS  # noqa: E402

KEPT = HERE.parent / "docs" / "comparison"
# What differs between the conditions of an experiment: a column of its points.csv, or nothing.
EXPERIMENTS = {"methods": None, "dose": "noticed"}


def ends(file: Path, column: str | None) -> dict[str, dict[str, list[float]]]:
    """By condition and method: avg@k of each seed at the end of its run."""
    last: dict[tuple[str, str, str], tuple[int, float]] = {}
    with file.open(newline="") as opened:
        for row in csv.DictReader(opened):
            condition = f"{column} {float(row[column]):g}" if column else file.parent.name
            run = condition, row["method"], row["seed"]
            point = int(row["step"]), float(row["avg"])
            last[run] = max(last.get(run, point), point)
    found: dict[str, dict[str, list[float]]] = {}
    for (condition, method, _), (_, avg) in last.items():
        found.setdefault(condition, {}).setdefault(method, []).append(avg)
    return found


def prediction(values: Sequence[float]) -> float:
    """The lower end of the 95 % interval of one more value like these, two or more."""
    n = len(values)
    return fmean(values) - float(stats.t.ppf(0.975, n - 1)) * stdev(values) * sqrt(1 + 1 / n)


def table(experiments: Sequence[dict[str, dict[str, list[float]]]]) -> str:
    """In Markdown, in percent: the methods that every condition has."""
    conditions = {name: one for found in experiments for name, one in found.items()}
    means = ["mean of conditions", "mean of experiments"]
    lines = [["one more run, at least", *conditions, *means]]
    lines.append(["---", *["---:"] * (len(conditions) + 2)])
    for method in sorted(set.intersection(*map(set, conditions.values()))):
        by_experiment = [
            [prediction(one[method]) for one in found.values()] for found in experiments
        ]
        lows = [low for found in by_experiment for low in found]
        numbers = [*lows, fmean(lows), fmean(map(fmean, by_experiment))]
        lines.append([METHODS[method]["title"], *(f"{100 * number:.1f}" for number in numbers)])
    return markdown([*lines[:2], *sorted(lines[2:], key=lambda line: -float(line[-2]))])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=KEPT / "recommendation.md")
    given = parser.parse_args(arguments)
    found = [ends(KEPT / name / "points.csv", column) for name, column in EXPERIMENTS.items()]
    given.output.write_text(table(found) + "\n")
    print(given.output.read_text())


if __name__ == "__main__":
    main()
