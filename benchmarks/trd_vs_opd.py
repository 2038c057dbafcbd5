"""Trajectory-refined distillation beside plain on-policy distillation, on the toy task.

    python benchmarks/trd_vs_opd.py                  # 5 seeds; what docs/comparison.md quotes
    python benchmarks/trd_vs_opd.py --quick          # every method, few steps: does it run?
    python benchmarks/trd_vs_opd.py --tune           # choose learning rate and steps of each method

Every seed has a student and a teacher of its own (comparison/models.py), which all methods
(comparison/methods.yaml) share, as they share prompts, optimizer, schedule and batch. A method that
rewrites samples two answers a prompt and runs for BUDGET steps; one that does not samples one and
runs for twice as many. So their ends compare at equal tokens, and BUDGET steps at equal steps.
avg@16 and pass@16 are of 200 test problems.

    chosen        learning rate and steps of each method (comparison/chosen.yaml): the best of the
                  evaluated steps on 200 other problems, with models of two seeds that the
                  comparison does not have: all LEARNING_RATES on the first, the two best on both
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
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import yaml
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:  # where this file is imported and not run
    sys.path.insert(0, str(HERE))

from comparison.figures import models_table, plot, table  # noqa: E402
from comparison.models import write_problems  # noqa: E402
from comparison.results import (  # noqa: E402
    Point,
    as_csv,
    differences,
    holm,
    interval,
    read_models,
    read_run,
)

BUDGET, EVALUATIONS = 60, 4  # steps of a method that rewrites; evaluations after the first
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
TUNING_SEEDS = (100, 101)
METHODS = HERE / "comparison" / "methods.yaml"
CHOSEN = HERE / "comparison" / "chosen.yaml"
REFERENCE = "trd"
AT_ONCE = 2

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """One run of one method."""

    method: str
    seed: int
    lr: float
    steps: int
    interval: int  # of evaluations
    k: int  # samples of each problem
    problems: str
    directory: Path
    models: Path
    settings: tuple[str, ...]

    def overrides(self) -> list[str]:
        """Settings of the run. All but one part of them are the same for every method."""
        teacher = "model.teacher.path"
        own = (
            []
            if any(s.startswith(teacher) for s in self.settings)
            else [f"{teacher}={self.models / 'teacher'}"]
        )
        return [
            *("experiment=quickstart", f"run.dir={self.directory}", f"run.seed={self.seed}"),
            *(f"model.student.path={self.models / 'student'}", *own),
            f"data.train.path={self.models / 'train.jsonl'}",
            f"data.validation.path={self.models.parent / self.problems}.jsonl",
            *("optimizer.schedule=constant", f"optimizer.lr={self.lr}", "optimizer.min_lr=0"),
            # The same number of steps, whatever the length of the run.
            f"optimizer.warmup_fraction={min(1.0, 6 / self.steps)}",
            *(f"train.num_steps={self.steps}", f"evaluation.interval={self.interval}"),
            *("evaluation.at_end=false", f"evaluation.samples_per_problem={self.k}"),
            *("checkpoint.save_interval=1000000", "checkpoint.export_hf=false"),
            *("logging.tensorboard=false", "logging.progress=false"),
            *(f"logging.samples_interval={self.interval}", "logging.samples_count=32"),
            *self.settings,
        ]

    def command(self) -> list[str]:
        script = [str(HERE / "comparison" / "sft.py")]
        module = script if self.method == "sft" else ["-m", "nemo_trd.train"]
        return [sys.executable, *module, *self.overrides()]


def run(command: Sequence[str], log: Path) -> None:
    """Run a command with one thread, its output in `log`.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    with log.open("w") as output:
        ended = subprocess.run(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
    if ended.returncode:
        last = "\n".join(log.read_text().splitlines()[-5:])
        raise RuntimeError(f"exit code {ended.returncode}, {log}:\n{last}")


def run_job(job: Job) -> list[Point]:
    """The points of a job, which is run unless its command has been before, on these models."""
    job.directory.parent.mkdir(parents=True, exist_ok=True)
    done, log = (job.directory.with_name(job.directory.name + end) for end in (".done", ".log"))
    models = json.loads((job.models / "warm_start.json").read_text())["digest"]
    key = json.dumps({"models": models, "command": job.command()})
    if not done.exists() or done.read_text() != key:
        shutil.rmtree(job.directory, ignore_errors=True)
        run(job.command(), log)
        done.write_text(key)
    return read_run(job.directory, job.method, job.seed, job.k)


def measure_prefixes(job: Job) -> None:
    """What the teacher says along the rollouts of a run."""
    command = [sys.executable, "-m", "nemo_trd.prefix_failure", str(job.directory)]
    run(command, job.directory / "prefix_failure.log")


def make_models(models: Path, seed: int, quick: bool) -> None:
    """Also keeps what is there, if it was made from the same settings."""
    script = str(HERE / "comparison" / "models.py")
    arguments = ["--quick"] if quick else []
    command = [sys.executable, script, str(models / str(seed)), str(seed), *arguments]
    run(command, models / f"{seed}.log")


def at_once(work: Callable[[Item], Result], items: Sequence[Item], what: str) -> list[Result]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(tqdm(pool.map(work, items), desc=what, total=len(items), unit="run"))


def tune(methods: dict[str, Any], root: Path) -> dict[str, dict[str, float]]:
    """Learning rate and steps of each method that are best on the development problems.

    All learning rates on the first seed, then the two best of each method on the second.
    """
    found: dict[str, dict[tuple[float, int], list[float]]] = {method: {} for method in methods}
    rates = {method: list(LEARNING_RATES) for method in methods}
    for seed in TUNING_SEEDS:
        jobs = [
            job(root / "tuning", method, seed, methods[method], lr, BUDGET, 8, "development")
            for method in methods
            for lr in rates[method]
        ]
        points = at_once(run_job, jobs, f"tuning, seed {seed}")
        for one, its_points in zip(jobs, points, strict=True):
            for point in its_points:
                if point.step:
                    values = found[one.method].setdefault((one.lr, point.step), [])
                    values.append(point.avg)
        for method, lrs in rates.items():
            best = {
                lr: max(fmean(v) for (rate, _), v in found[method].items() if rate == lr)
                for lr in lrs
            }
            rates[method] = sorted(lrs, key=best.__getitem__, reverse=True)[:2]
    chosen = {}
    for method, settings in found.items():
        tried = {s: fmean(v) for s, v in settings.items() if len(v) == len(TUNING_SEEDS)}
        lr, steps = max(tried, key=lambda setting: tried[setting])
        chosen[method] = {"lr": lr, "steps": steps, "development_avg": round(tried[lr, steps], 4)}
    return chosen


def job(
    root: Path,
    method: str,
    seed: int,
    description: dict[str, Any],
    lr: float,
    budget: int,
    k: int,
    problems: str,
) -> Job:
    # Both kinds are evaluated at equal tokens each time, and at equal steps after `budget` of them.
    longer = 1 if description.get("refines") else 2
    return Job(
        method=method,
        seed=seed,
        lr=lr,
        steps=longer * budget,
        interval=longer * budget // EVALUATIONS,
        k=k,
        problems=problems,
        directory=root / method / f"seed_{seed}_lr_{lr:g}",
        models=root.parent / "models" / str(seed),
        settings=tuple(description["settings"]),
    )


def rows_of(
    points: Sequence[Point], methods: dict[str, Any], chosen: dict[str, Any], budget: int
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
    methods: dict[str, Any], seeds: Sequence[int], root: Path, budget: int, k: int
) -> tuple[list[Job], list[Point], list[dict[str, Any]]]:
    """The runs of all methods, their points, and a row for each method."""
    chosen = yaml.safe_load(CHOSEN.read_text())
    jobs = [
        job(root / "runs", method, seed, methods[method], chosen[method]["lr"], budget, k, "test")
        for seed in seeds
        for method in methods
    ]
    points = [p for its_points in at_once(run_job, jobs, "methods") for p in its_points]
    return jobs, points, rows_of(points, methods, chosen, budget)


def measure_models(jobs: Sequence[Job]) -> dict[int, dict[str, float | None]]:
    """By seed: what its models can do, and the prefix failure in its run of `REFERENCE`."""
    references = [one for one in jobs if one.method == REFERENCE]
    at_once(measure_prefixes, references, "prefix failure")
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
    seeds, budget, k = given.seeds, BUDGET, 16
    if given.quick:
        seeds, budget, k = [0], EVALUATIONS, 2
    if given.tune:
        seeds = TUNING_SEEDS
    name = "trd_vs_opd_quick" if given.quick else "trd_vs_opd"
    root = (given.output or Path("runs") / name).resolve()
    models = root / "models"
    models.mkdir(parents=True, exist_ok=True)
    write_problems(models)
    at_once(lambda seed: make_models(models, seed, given.quick), seeds, "warm starts")
    if given.tune:
        known = yaml.safe_load(CHOSEN.read_text()) if CHOSEN.exists() else {}
        chosen = {**known, **tune(methods, root)}
        CHOSEN.write_text(yaml.safe_dump(chosen, sort_keys=False))
        print(CHOSEN.read_text())
        return
    jobs, points, rows = compare(methods, seeds, root, budget, k)
    # Untrained models have nothing to measure.
    measured = {} if given.quick else measure_models(jobs)
    minutes = (time.monotonic() - started) / 60
    write(root, given.json, points, rows, measured, minutes, k)
    print(table(rows, k))
    print(f"\n{len(seeds)} seeds, {minutes:.0f} minutes. Everything is in {root}")


if __name__ == "__main__":
    main()
