"""The command line of an experiment: carries it out or reads a kept one; writes what it shows."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

QUICK_HELP = "untrained models, 1 seed, few steps; in OUTPUT/quick"


class Outcome(Protocol):
    """What came out of an experiment."""

    minutes: float  # of the last start alone

    def write(self, file: Path) -> None: ...


Found = TypeVar("Found", bound=Outcome)


def command(
    arguments: Sequence[str] | None,
    description: str,
    name: str,
    seeds: int,
    run: Callable[[Path, int, bool], Found],
    read: Callable[[Path], Found],
    write: Callable[[Found, Path], None],
) -> None:
    """Parse arguments, run or read, and write.

    Args:
        seeds: the default.
        run: directory, number of seeds and whether it is quick -> what came out.
        read: what `Outcome.write` wrote.
        write: tables.md and whatever else belongs into a directory.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    output = Path(f"runs/prefix_{name}")
    parser.add_argument("--output", type=Path, default=output, help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=seeds, metavar="N", help=f"(default: {seeds})")
    parser.add_argument("--json", type=Path, help=f"(default: OUTPUT/{name}.json)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", action="store_true", help=QUICK_HELP)
    kind.add_argument("--from", type=Path, dest="kept", metavar="FILE", help="run nothing")
    given = parser.parse_args(arguments)
    out = (given.output / "quick" if given.quick else given.output).resolve()
    if given.kept:
        found = read(given.kept)
    else:
        found = run(out, 1 if given.quick else given.seeds, given.quick)
        found.write(given.json or out / f"{name}.json")
    out.mkdir(parents=True, exist_ok=True)
    write(found, out)
    print((out / "tables.md").read_text())
    print(f"{found.minutes} minutes. Everything is in {out}")
