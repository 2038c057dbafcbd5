"""Trajectory-refined distillation beside plain on-policy distillation, on the toy task.

    python benchmarks/trd_vs_opd.py                  # 5 seeds; what docs/comparison.md quotes
    python benchmarks/trd_vs_opd.py --quick          # every method, few steps: does it run?
    python benchmarks/trd_vs_opd.py --tune           # choose learning rate and steps of each method

Every seed has a student and a teacher of its own (comparison/models.py), which all methods
(comparison/methods.yaml) share, as they share prompts, optimizer, schedule and batch. A method that
rewrites samples two answers a prompt and runs for 60 steps; one that does not samples one and runs
for twice as many. So their ends compare at equal tokens, and 60 steps at equal steps.
avg@16 and pass@16 are of 200 test problems.

    chosen        learning rate and steps of each method (comparison/chosen.yaml): the best of the
                  evaluated steps on 200 other problems, with models of two seeds that the
                  comparison does not have: four learning rates on the first, the two best on both
    intervals     95 % over seeds, Student's t
    p             paired t-test over seeds of TRD minus the method, not adjusted; the JSON file has
                  Holm's adjustment over all rows of a column

Everything is written to `--output`: runs, points.csv, results.json, table.md, avg.svg, pass.svg,
and models.md, which has what each seed's models can do and how its teacher takes the errors in
rollouts (nemo_trd.prefix_failure). A run that is there is kept. Two runs at a time, one thread
each; wall time is that of the steps, in the fastest of the seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:  # where this file is imported and not run
    sys.path.insert(0, str(HERE))

from comparison.figures import models_table, plot, table  # noqa: E402
from comparison.jobs import (  # noqa: E402
    TUNING_SEEDS,
    Condition,
    Job,
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
    Point,
    as_csv,
    differences,
    holm,
    interval,
    read_models,
)

PROBLEMS = {"development": 200, "test": 200}
METHODS = HERE / "comparison" / "methods.yaml"
CHOSEN = HERE / "comparison" / "chosen.yaml"
REFERENCE = "trd"


def rows_of(
    points: Sequence[Point], methods: Methods, chosen: dict[str, Any], budget: int
) -> list[dict[str, Any]]:
    """What the table has of each method."""

    def at(method: str, step: int) -> list[Point]:
        return [p for p in points if (p.method, p.step) == (method, step)]

    def end(method: str) -> int:
        return budget if methods[method].get("refines") else 2 * budget

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


def compare(
    methods: Methods, seeds: Sequence[int], condition: Condition
) -> tuple[list[Job], list[Point], list[dict[str, Any]]]:
    """The runs of all methods, their points, and a row for each method."""
    chosen = yaml.safe_load(CHOSEN.read_text())
    jobs = [
        condition.job(method, methods[method], seed, chosen[method]["lr"])
        for seed in seeds
        for method in methods
    ]
    points = [p for its_points in at_once(run_job, jobs, "methods") for p in its_points]
    return jobs, points, rows_of(points, methods, chosen, condition.budget)


def measure_models(jobs: Sequence[Job]) -> dict[int, dict[str, float | None]]:
    """By seed: what its models can do, and the prefix failure in its run of `REFERENCE`."""
    references = [one for one in jobs if one.method == REFERENCE]
    at_once(lambda one: measure_prefixes(one.directory), references, "prefix failure")
    return {one.seed: read_models(one.models, one.directory) for one in references}


def write(
    root: Path,
    json_file: Path | None,
    points: Sequence[Point],
    rows: Sequence[dict[str, Any]],
    models: dict[int, dict[str, float | None]],
    minutes: float,
    k: int,
) -> None:
    results = {
        "minutes": minutes,
        "machine": {"processor": platform.machine(), "cpus": os.cpu_count()},
        "models": models,
        "rows": rows,
        "points": points,
    }
    text = json.dumps(results, indent=2, default=asdict)
    (json_file or root / "results.json").write_text(text + "\n")
    (root / "points.csv").write_text(as_csv(points))
    (root / "table.md").write_text(table(rows, k) + "\n")
    if models:
        (root / "models.md").write_text(models_table(models) + "\n")
    kinds = [[row for row in rows if row["variant"] == variant] for variant in (False, True)]
    titles = [{row["method"]: row["title"] for row in kind} for kind in kinds if kind]
    plot(points, titles, k, "avg", root / "avg.svg")
    plot(points, titles, k, "passed", root / "pass.svg")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, help="(default: runs/trd_vs_opd, with --quick _quick)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="(default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="(default: OUTPUT/results.json)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", action="store_true", help="untrained models, 1 seed, few steps")
    kind.add_argument("--tune", action="store_true", help=f"write {CHOSEN.name}")
    given = parser.parse_args(arguments)
    methods = yaml.safe_load(METHODS.read_text())
    if unknown := [name for name in given.methods or () if name not in methods]:
        parser.error(f"no method {', '.join(unknown)}: choose from {', '.join(methods)}")
    methods = {name: methods[name] for name in given.methods or methods}
    started = time.monotonic()
    name = "trd_vs_opd_quick" if given.quick else "trd_vs_opd"
    root = (given.output or Path("runs") / name).resolve()
    condition, seeds = Condition(root), given.seeds
    if given.quick:
        seeds, condition = [0], replace(condition, budget=condition.evaluations, k=2)
    if given.tune:
        seeds = TUNING_SEEDS
    write_problems(root / "models", PROBLEMS)
    world = World().untrained() if given.quick else World()
    at_once(lambda seed: make_models(world, seed, condition.models(seed)), seeds, "warm starts")
    if missed := {seed: gates for seed in seeds if (gates := missed_gates(condition.models(seed)))}:
        sys.exit(f"models that missed their gates, by seed: {missed}. Fix: other --seeds")
    if given.tune:
        known = yaml.safe_load(CHOSEN.read_text()) if CHOSEN.exists() else {}
        chosen = {**known, **tune(methods, {name: condition})[name]}
        CHOSEN.write_text(yaml.safe_dump(chosen, sort_keys=False))
        print(CHOSEN.read_text())
        return
    jobs, points, rows = compare(methods, seeds, condition)
    # Untrained models have nothing to measure.
    measured = {} if given.quick else measure_models(jobs)
    minutes = (time.monotonic() - started) / 60
    write(root, given.json, points, rows, measured, minutes, condition.k)
    print(table(rows, condition.k))
    print(f"\n{len(seeds)} seeds, {minutes:.0f} minutes. Everything is in {root}")


if __name__ == "__main__":
    main()
