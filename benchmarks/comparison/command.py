"""The command line of a sweep: carries it out or reads a kept one; writes tables and plots."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from comparison.advantage import (
    MOMENTS,
    Moment,
    advantages_table,
    chosen_table,
    levels_table,
    models_table,
    tests_table,
)
from comparison.results import Interval, Point, as_csv
from comparison.sweep import Results

Tests = Callable[[Results], Mapping[str, Interval]]


def tables(results: Results, tests: Tests, moments: Sequence[Moment]) -> str:
    """All tables in Markdown, a blank line between two of them."""
    found = [models_table(results)] if results.models else []
    found += [levels_table(results, moment) for moment in moments]
    found += [advantages_table(results, moments), chosen_table(results)]
    found += [tests_table(tests(results))] if results.models else []
    return "\n\n".join(found) + "\n"


def write(
    results: Results,
    out: Path,
    name: str,
    tests: Tests,
    plot: Callable[[Results, Path], None],
    moments: Sequence[Moment],
) -> None:
    """`out`/tables.md, points.csv and NAME.svg."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.md").write_text(tables(results, tests, moments))
    values = [{results.quantity: value} for value, *_ in results.points]
    (out / "points.csv").write_text(as_csv([Point(*rest) for _, *rest in results.points], values))
    plot(results, out / f"{name}.svg")


def command(
    arguments: Sequence[str] | None,
    description: str,
    name: str,
    run: Callable[[Path, int, bool], Results],
    tests: Tests,
    plot: Callable[[Results, Path], None],
    seeds: int,
    moments: Sequence[Moment] = tuple(MOMENTS),
) -> None:
    """Parse arguments, run or read, and write.

    Args:
        run: directory, number of seeds and whether it is quick -> what came out.
        seeds: the default.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help=f"(default: runs/prefix_{name})")
    parser.add_argument("--seeds", type=int, default=seeds, metavar="N", help=f"(default: {seeds})")
    parser.add_argument("--json", type=Path, help=f"(default: OUTPUT/{name}.json)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", action="store_true", help="untrained models, 1 seed, few steps")
    kind.add_argument("--from", type=Path, dest="kept", metavar="FILE", help="run nothing")
    given = parser.parse_args(arguments)
    directory = f"runs/prefix_{name}_quick" if given.quick else f"runs/prefix_{name}"
    out = (given.output or Path(directory)).resolve()
    if given.kept:
        results = Results.read(given.kept)
    else:
        results = run(out, 1 if given.quick else given.seeds, given.quick)
        results.write(given.json or out / f"{name}.json")
    write(results, out, name, tests, plot, moments)
    print((out / "tables.md").read_text())
    print(f"{len(results.seeds)} seeds, {results.minutes} minutes. Everything is in {out}")
