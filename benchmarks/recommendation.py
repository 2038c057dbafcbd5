"""Which method to take: the rule of docs/comparison.md, carried out on the kept results.

    python benchmarks/recommendation.py     # writes docs/comparison/recommendation.md

A run of yours is made once, in a condition that nobody has measured. So a method counts for what it
reaches when a run goes badly: the lower end of the 95 % interval over seeds of its avg@k, after as
many generated tokens as all others; and not in one condition but in the mean of all of them. A
method takes part if it was run in every condition.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:  # where this file is imported and not run
    sys.path.insert(0, str(HERE))

from comparison.figures import markdown  # noqa: E402
from comparison.results import interval  # noqa: E402
from comparison.sweep import METHODS  # noqa: E402

KEPT = HERE.parent / "docs" / "comparison"
# What differs between the conditions of each points.csv: a column, or nothing.
CONDITIONS = {"methods": None, "dose": "noticed"}


def lower_ends(kept: Path) -> dict[str, dict[str, float]]:
    """By condition and method: the lower end of the interval of avg@k at the ends of the runs."""
    ends: dict[str, dict[str, dict[str, tuple[int, float]]]] = {}
    for name, column in CONDITIONS.items():
        with (kept / name / "points.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                condition = f"{column} {float(row[column]):g}" if column else name
                seeds = ends.setdefault(condition, {}).setdefault(row["method"], {})
                point = int(row["step"]), float(row["avg"])
                seeds[row["seed"]] = max(seeds.get(row["seed"], point), point)
    return {
        condition: {
            method: found.mean - (found.half_width or 0.0)
            for method, seeds in methods.items()
            for found in [interval([avg for _, avg in seeds.values()])]
        }
        for condition, methods in ends.items()
    }


def table(found: dict[str, dict[str, float]]) -> str:
    """In Markdown, in percent: the methods that every condition has, the best one first."""
    common = set.intersection(*(set(methods) for methods in found.values()))
    rows = {method: [methods[method] for methods in found.values()] for method in common}
    lines = [["lower end of avg@k", *found, "mean"], ["---", *["---:"] * (len(found) + 1)]]
    for method in sorted(rows, key=lambda method: -fmean(rows[method])):
        cells = (f"{100 * low:.1f}" for low in (*rows[method], fmean(rows[method])))
        lines.append([METHODS[method]["title"], *cells])
    return markdown(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=KEPT / "recommendation.md")
    given = parser.parse_args(arguments)
    given.output.write_text(table(lower_ends(KEPT)) + "\n")
    print(given.output.read_text())


if __name__ == "__main__":
    main()
