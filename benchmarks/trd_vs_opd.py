"""Trajectory-refined distillation beside plain on-policy distillation, on the toy task.

    python benchmarks/trd_vs_opd.py                  # 5 seeds; what docs/comparison.md quotes
    python benchmarks/trd_vs_opd.py --quick          # every method, few steps: does it run?
    python benchmarks/trd_vs_opd.py --tune           # choose learning rate and steps of each method
    python benchmarks/trd_vs_opd.py --from FILE      # tables and plots of kept results

Every seed has a student and a teacher of its own (comparison/models.py), which all methods
(comparison/methods.yaml) share, as they share prompts, optimizer, schedule and batch. A method that
rewrites samples two answers a prompt and runs for 60 steps; one that does not samples one and runs
for twice as many. So their ends compare at equal tokens, and 60 steps at equal steps.
avg@16 and pass@16 are of 200 test problems.

    chosen        learning rate and steps of each method (comparison/chosen.yaml): the best of the
                  evaluated steps on 200 other problems, with models of two seeds that the
                  comparison does not have: four learning rates on the first, the two best on both
    intervals     95 % over seeds, Student's t
    p             paired t-test over seeds of TRD minus the method
    adjusted p    for the number of rows of its column (Holm)

Everything is written to `--output`: models, runs, methods.json (of which tables and plots are
made), tables.md, points.csv, methods.svg and pass.svg. The tables begin with what each seed's
models can do and how its teacher takes the errors in rollouts (nemo_trd.prefix_failure). A run that
is there is kept. Two runs at a time, one thread each; wall time is that of the steps, in the
fastest of the seeds. A method without a learning rate of its own (`untuned_as` in
comparison/chosen.yaml) runs where `--methods` names it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NoReturn

import yaml

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:  # where this file is imported and not run
    sys.path.insert(0, str(HERE))

from comparison.command import QUICK_HELP  # noqa: E402
from comparison.figures import (  # noqa: E402
    models_table,
    pairs_table,
    plot,
    seeds_table,
    table,
)
from comparison.jobs import (  # noqa: E402
    TUNING_SEEDS,
    Condition,
    Methods,
    at_once,
    make_models,
    measure_prefixes,
    missed_gates,
    run_job,
    tune,
)
from comparison.models import World, write_problems  # noqa: E402
from comparison.results import (  # noqa: E402
    Interval,
    Point,
    as_csv,
    differences,
    holm,
    interval,
    read_models,
    write_fields,
)

PROBLEMS = {"development": 200, "test": 200}
METHODS = HERE / "comparison" / "methods.yaml"
CHOSEN = HERE / "comparison" / "chosen.yaml"
REFERENCE = "trd"
PAIRS = {
    "TRD − OPD, reverse KL": ("trd_reverse_kl", "opd_reverse_kl"),
    "TRD − OPD, JSD": ("trd_jsd", "opd_jsd"),
    "TRD-OPSD − OPSD": ("trd_opsd", "opsd"),
    "y_r of wrong, y_o of right − TRD, forward KL": ("trd_mixed", "trd"),
    "y_r of wrong, y_o of right − TRD, JSD": ("trd_jsd_mixed", "trd_jsd"),
}


def _at(points: Sequence[Point], method: str, step: int) -> list[Point]:
    return [p for p in points if (p.method, p.step) == (method, step)]


def _end(methods: Methods, budget: int, method: str) -> int:
    """Steps of a run."""
    return budget if methods[method].get("refines") else 2 * budget


def rows_of(
    points: Sequence[Point], methods: Methods, chosen: dict[str, Any], budget: int
) -> list[dict[str, Any]]:
    """What the table has of each method."""
    at, end = partial(_at, points), partial(_end, methods, budget)

    def steps_of_chosen(method: str) -> int:
        steps = {p.step for p in points if p.method == method}
        return chosen[method]["steps"] if chosen[method]["steps"] in steps else end(method)

    moments: dict[str, Callable[[str], int]] = {
        "equal_steps": lambda method: budget,
        "equal_tokens": end,
        "chosen_steps": steps_of_chosen,
    }
    rows = []
    for method, description in methods.items():
        last = at(method, end(method))
        row: dict[str, Any] = {
            "method": method,
            "title": description["title"],
            "variant": description.get("variant", False),
            "lr": chosen[method]["lr"],
            "steps": steps_of_chosen(method),
            "start": interval([p.avg for p in at(method, 0)]),
            "passed": interval([p.passed for p in last]),
            "tokens": fmean(p.generated_tokens for p in last),
            "seconds": min(p.seconds for p in last),  # a run may have been disturbed
        }
        for name, step in moments.items():
            row[name] = interval([p.avg for p in at(method, step(method))])
            row[f"trd_minus_{name}"] = None
            if method != REFERENCE and REFERENCE in methods:
                pairs = at(REFERENCE, step(REFERENCE)), at(method, step(method))
                row[f"trd_minus_{name}"] = interval(differences(*pairs), of_difference=True)
        rows.append(row)
    for name in moments:
        column = [row[f"trd_minus_{name}"] for row in rows]
        tested = [i for i, one in enumerate(column) if one is not None and one.p is not None]
        for i, adjusted in zip(tested, holm([column[i].p for i in tested]), strict=True):
            rows[i][f"holm_p_{name}"] = adjusted
    return rows


@dataclass(frozen=True)
class Results:
    """What came out. It is a JSON file, of which all tables and plots are made."""

    methods: list[str]
    seeds: list[int]
    budget: int  # steps of a method that rewrites
    k: int
    chosen: dict[str, Any]  # by method
    models: dict[str, dict[str, float | None]]  # by seed
    points: list[list[Any]]  # fields of `Point`
    minutes: float  # of the last start alone
    machine: str

    @classmethod
    def read(cls, file: Path) -> Results:
        return cls(**json.loads(file.read_text()))


def compare(methods: Methods, seeds: Sequence[int], condition: Condition, quick: bool) -> Results:
    """Run all methods, and measure the prefixes in the runs of `REFERENCE`."""
    started = time.monotonic()
    chosen = yaml.safe_load(CHOSEN.read_text())
    jobs = [
        condition.job(method, methods[method], seed, chosen[method]["lr"])
        for seed in seeds
        for method in methods
    ]
    points = [p for its_points in at_once(run_job, jobs, "methods") for p in its_points]
    models = {}
    if not quick:  # untrained models have nothing to measure
        references = [one for one in jobs if one.method == REFERENCE]
        at_once(lambda one: measure_prefixes(one.directory), references, "prefix failure")
        models = {str(one.seed): read_models(one.models, one.directory) for one in references}
    return Results(
        methods=[*methods],
        seeds=[*seeds],
        budget=condition.budget,
        k=condition.k,
        chosen={method: chosen[method] for method in methods},
        models=models,
        points=[[*astuple(point)] for point in points],
        minutes=round((time.monotonic() - started) / 60, 1),
        machine=f"{os.cpu_count()} cores, {platform.machine()}",
    )


def pairs_of(points: Sequence[Point], methods: Methods, budget: int) -> dict[str, list[Interval]]:
    """What one method of a pair has more than the other, at equal steps and at equal tokens."""
    at, end = partial(_at, points), partial(_end, methods, budget)
    return {
        title: [
            interval(differences(at(a, steps_a), at(b, steps_b)), of_difference=True)
            for steps_a, steps_b in ((budget, budget), (end(a), end(b)))
        ]
        for title, (a, b) in PAIRS.items()
        if a in methods and b in methods
    }


def write(results: Results, out: Path) -> None:
    """`out`/tables.md, points.csv, methods.svg and pass.svg."""
    known = yaml.safe_load(METHODS.read_text())
    methods = {name: known[name] for name in results.methods}
    points = [Point(*fields) for fields in results.points]
    rows = rows_of(points, methods, results.chosen, results.budget)
    tables = [models_table(results.models)] if results.models else []
    tables += [table(rows, results.k), pairs_table(pairs_of(points, methods, results.budget))]
    ends = {
        methods[method]["title"]: _at(points, method, _end(methods, results.budget, method))
        for method in methods
    }
    starts = {"student at the start": _at(points, results.methods[0], 0)}
    tables.append(seeds_table({**starts, **ends}, results.k))
    (out / "tables.md").write_text("\n\n".join(tables) + "\n")
    (out / "points.csv").write_text(as_csv(points))
    kinds = [[row for row in rows if row["variant"] == variant] for variant in (False, True)]
    titles = [{row["method"]: row["title"] for row in kind} for kind in kinds if kind]
    plot(points, titles, results.k, "avg", out / "methods.svg")
    plot(points, titles, results.k, "passed", out / "pass.svg")


def chosen_methods(
    names: Sequence[str] | None, quick: bool, error: Callable[[str], NoReturn]
) -> Methods:
    """Those of `names`; without names those that were tuned, or all where nothing is measured."""
    methods = yaml.safe_load(METHODS.read_text())
    if unknown := [name for name in names or () if name not in methods]:
        error(f"no method {', '.join(unknown)}: choose from {', '.join(methods)}")
    if names is None:
        chosen = yaml.safe_load(CHOSEN.read_text())
        names = [m for m in methods if quick or "untuned_as" not in chosen[m]]
    return {name: methods[name] for name in names}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/trd_vs_opd"), help="(default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="(default: all tuned ones)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="(default: OUTPUT/methods.json)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", action="store_true", help=QUICK_HELP)
    kind.add_argument("--tune", action="store_true", help=f"write {CHOSEN.name}")
    kind.add_argument("--from", type=Path, dest="kept", metavar="FILE", help="run nothing")
    given = parser.parse_args(arguments)
    methods = chosen_methods(given.methods, given.quick, parser.error)
    root = (given.output / "quick" if given.quick else given.output).resolve()
    condition, seeds = Condition(root), given.seeds
    if given.kept:
        results = Results.read(given.kept)
    else:
        if given.quick:
            seeds, condition = [0], replace(condition, budget=condition.evaluations, k=2)
        if given.tune:
            seeds = TUNING_SEEDS
        write_problems(root / "models", PROBLEMS)
        world = World().untrained() if given.quick else World()
        at_once(lambda seed: make_models(world, seed, condition.models(seed)), seeds, "warm starts")
        missed = {seed: gates for seed in seeds if (gates := missed_gates(condition.models(seed)))}
        if missed:
            sys.exit(f"models that missed their gates, by seed: {missed}. Fix: other --seeds")
        if given.tune:
            known = yaml.safe_load(CHOSEN.read_text()) if CHOSEN.exists() else {}
            chosen = {**known, **tune(methods, {"": condition})[""]}
            CHOSEN.write_text(yaml.safe_dump(chosen, sort_keys=False))
            print(CHOSEN.read_text())
            return
        results = compare(methods, seeds, condition, given.quick)
        write_fields(results.__dict__, given.json or root / "methods.json")
    root.mkdir(parents=True, exist_ok=True)
    write(results, root)
    print((root / "tables.md").read_text())
    print(f"{results.minutes} minutes. Everything is in {root}")


if __name__ == "__main__":
    main()
