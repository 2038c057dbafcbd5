"""Exploration: does trajectory refinement find more ways to solve a problem?

    python benchmarks/prefix_exploration.py             # 5 seeds, about an hour on two cores
    python benchmarks/prefix_exploration.py --quick     # untrained models: does it run?
    python benchmarks/prefix_exploration.py --from docs/comparison/exploration.json --output DIR

The toy problems have six right derivations each, the orders in which their three products are
worked out (nemo_trd/toy/derivations.py). The texts that a student learns from have one common order
and five that are rarer and rarer (STUDENT_ORDERS); those of its teacher have all alike, so there is
something to explore. In texts that show a rewrite, it keeps the order of the attempt: the least
edit that mends it, as in the usual toy task. Every seed has a student, a teacher and prompts of its
own, made before any method runs; every method has the learning rate that is best for it by avg@8 on
other problems and seeds (comparison/jobs.py `tune`).

Of every model SAMPLES answers to each of 100 test problems are sampled at temperature 1. OPD is
sampled after as many steps as TRD has, and after as many generated tokens. `TRD, y_r of wrong, y_o
of right` is refinement.subset=wrong: the teacher sees x alone where a right rollout is trained on.
`TRD, teacher sees x` rewrites everything, and hides the attempt from the teacher when it scores.

    pass@k        probability that a right derivation is among k of the samples, unbiased
    derivations   expected number of different right ones among k samples (rarefaction), and among
                  16 right samples, in problems that have them: there accuracy counts for nothing
    entropy       of the right derivations of a problem, in nats, mean over problems
    intervals     95 % over seeds, Student's t; differences are paired by seed

Written before the samples of any trained student were counted:

    claim         the paper's: rewriting right rollouts too broadens coverage
    prediction    it does not, here. The teacher that sees an attempt expects the order of the
                  attempt, so along y_r the student is taught its own mix of orders: TRD is right
                  more often, which alone brings rare orders up among 64 samples, and among 16 right
                  samples it has no more of them than the student had. Where the teacher sees x
                  alone its even mix is taught, along y_o and along y_r: OPD and `TRD, teacher sees
                  x` have more derivations than TRD, and TRD with subset=wrong lies between.
    first test    derivations among 16 right samples: TRD minus the student
    second test   derivations among 64 samples: TRD minus TRD with subset=wrong
    third test    derivations among 64 samples: TRD minus OPD, equal tokens
    exclusions    a seed of which a model misses its gates is left out, and the next number takes
                  its place; nothing else is left out

Everything is written to `--output`: models, runs, samples, exploration.json (of which tables and
plot are made), points.csv, tables.md and exploration.svg. What is there is kept, so an interrupted
command goes on.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:  # where this file is imported and not run
    sys.path.insert(0, str(HERE))

from comparison.coverage import RIGHT, Results, Sampled, read_samples, rewrites  # noqa: E402
from comparison.coverage_page import as_csv, difference, measured, plot, tables  # noqa: E402
from comparison.jobs import Condition, Job, at_once, in_process, run_job, tune  # noqa: E402
from comparison.models import (  # noqa: E402
    Texts,
    make_model,
    read_made,
    untrained,
    write_problems,
    write_prompts,
)
from comparison.results import Interval, Point  # noqa: E402
from comparison.sweep import METHODS, QUICK_LR, TUNING_SEEDS, Sweep, complete_seeds  # noqa: E402

from nemo_trd.toy import task  # noqa: E402
from nemo_trd.toy.derivations import ORDERS  # noqa: E402
from nemo_trd.toy.warm_start import STUDENT, TEACHER  # noqa: E402

# The names of the models of each method, after `budget` steps and at the end.
NAMES = {
    "opd_forward_kl": ("opd_steps", "opd_tokens"),
    "trd": ("trd", "trd"),
    "trd_mixed": ("trd_mixed", "trd_mixed"),
    "trd_prompt": ("trd_prompt", "trd_prompt"),
}
STUDENT_ORDERS = (32, 16, 8, 4, 2, 1)
TEACHER_ORDERS = (1,) * len(ORDERS)
# A context has six right answers, which makes the gates as much dearer.
RECIPES = {
    "student": replace(STUDENT, held_out=64, check_interval=10),
    "teacher": replace(TEACHER, held_out=64),
}
WEIGHTS = {"student": STUDENT_ORDERS, "teacher": TEACHER_ORDERS}
SAMPLES, SEEDS = 64, 5
PROBLEMS = {"development": 200, "test": 100}


@dataclass(frozen=True)
class Model:
    """A model to sample from: a Hugging Face directory, or a checkpoint of a run."""

    name: str
    seed: int
    point: Point | None  # of the run; None: of no run
    path: Path
    samples: Path  # where they go


def run(root: Path, seeds: int, quick: bool) -> Results:
    """Make models, choose learning rates, run all methods, and sample."""
    started = time.monotonic()
    condition = Condition(root, k=1)
    problems = PROBLEMS
    if quick:
        condition = replace(condition, budget=condition.evaluations)
        problems = {name: 8 for name in PROBLEMS}
    settings = (f"checkpoint.save_interval={condition.budget}",)
    condition = replace(condition, settings=settings)
    write_problems(root / "models", problems)
    sweep = Sweep("", tuple(NAMES), {0.0: condition}, {0.0: task.USUAL}, problems)

    def prepare(_: float, seed: int) -> None:
        make_models(condition.models(seed), seed, quick)

    methods = {name: METHODS[name] for name in NAMES}
    chosen = {method: {"lr": QUICK_LR} for method in methods}
    excluded: dict[str, list[str]] = {}
    if not quick:
        tuning, excluded = complete_seeds(sweep, prepare, TUNING_SEEDS[0], len(TUNING_SEEDS))
        chosen = tune(methods, {"": condition}, tuning)[""]
    used, missed = complete_seeds(sweep, prepare, 0, seeds)
    jobs = [
        condition.job(method, methods[method], seed, chosen[method]["lr"])
        for seed in used
        for method in methods
    ]
    points = at_once(run_job, jobs, "methods")
    models = [model for seed in used for model in models_of_seed(condition, seed)]
    for job, its_points in zip(jobs, points, strict=True):
        models += models_of_run(job, its_points, condition.budget)
    samples = 8 if quick else SAMPLES
    test = root / "models" / "test.jsonl"
    at_once(lambda model: draw(model, test, samples), models, "samples")
    return Results(
        seeds=used,
        excluded={**excluded, **missed},
        samples=samples,
        chosen=chosen,
        models={
            str(job.seed): abilities(condition.models(job.seed), job.directory)
            for job in jobs
            if job.method == "trd"
        },
        sampled=[sampled(model, test) for model in models],
        minutes=round((time.monotonic() - started) / 60, 1),
        machine=f"{os.cpu_count()} cores, {platform.machine()}",
    )


def make_models(models: Path, seed: int, quick: bool) -> None:
    """Student, teacher and prompts of one seed, unless they are there."""
    write_prompts(models, seed)
    for role, recipe in RECIPES.items():
        made = untrained(recipe) if quick else recipe
        arguments = (models / role, role, seed, made, Texts(), WEIGHTS[role])
        in_process(make_model, arguments, models / f"{role}.log")


def abilities(models: Path, run_dir: Path) -> dict[str, float | None]:
    """What student and teacher can do, and what the teacher made of a run's rollouts."""
    student, teacher = (read_made(models / role)["accuracy"] for role in RECIPES)
    return {
        "student_solves": student["solve"],
        "teacher_solves": teacher["solve"],
        "teacher_rewrites": teacher["rewrite"],
        "notices": teacher.get("notice"),
        **rewrites(run_dir),
    }


def models_of_seed(condition: Condition, seed: int) -> list[Model]:
    """Student before training, and teacher."""
    directories = {role: condition.models(seed) / role for role in RECIPES}
    return [
        Model(
            role,
            seed,
            None,
            directory,
            condition.root / "samples" / f"{role}_{seed}_{read_made(directory)['weights']}",
        )
        for role, directory in directories.items()
    ]


def models_of_run(job: Job, points: Sequence[Point], budget: int) -> list[Model]:
    """After `budget` steps and at the end, which may be the same."""
    by_step = {point.step: point for point in points}
    names = dict(zip((budget, job.steps), NAMES[job.method], strict=True))
    return [
        Model(
            name,
            job.seed,
            by_step[step],
            job.directory / "checkpoints" / f"step_{step:08d}",
            job.directory / f"samples_at_{step}",
        )
        for step, name in names.items()
    ]


def draw(model: Model, problems: Path, samples: int) -> None:
    """Sample the model, unless that has been done."""
    overrides = [
        *(f"model.path={model.path}", f"output={model.samples}", "benchmark=jsonl"),
        *(f"benchmarks.jsonl.path={problems}", "benchmarks.jsonl.verifier=exact"),
        *(f"samples_per_problem={samples}", f"seed={model.seed}", "progress=false"),
        *("sampling.temperature=1", "sampling.top_p=1", "sampling.top_k=0"),
        *("sampling.max_tokens=64", "generation.local.batch_size=1600"),
        *("generation.local.dtype=fp32", "verification.workers=1", "bootstrap.resamples=100"),
    ]
    log = model.samples.with_name(f"{model.samples.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    in_process(evaluate, (overrides,), log)


def evaluate(overrides: Sequence[str]) -> None:
    from nemo_trd.evaluate.main import main as evaluate_main

    if code := evaluate_main([*overrides]):
        sys.exit(code)


def sampled(model: Model, problems: Path) -> Sampled:
    point = model.point
    spent = (0, 0, 0.0) if point is None else (point.step, point.generated_tokens, point.seconds)
    return Sampled(model.name, model.seed, *spent, read_samples(model.samples, problems))


def tests(results: Results) -> Mapping[str, Interval | None]:
    """The tests that the docstring names."""
    found, k = measured(results), results.samples
    return {
        f"derivations among {RIGHT} right samples, TRD − student": difference(
            found, "student", f"distinct_of_right@{RIGHT}"
        ),
        f"derivations among {k} samples, TRD − TRD with subset=wrong": difference(
            found, "trd_mixed", f"distinct@{k}"
        ),
        f"derivations among {k} samples, TRD − OPD, equal tokens": difference(
            found, "opd_tokens", f"distinct@{k}"
        ),
    }


def write(results: Results, out: Path) -> None:
    """`out`/tables.md, points.csv and exploration.svg."""
    out.mkdir(parents=True, exist_ok=True)
    found = measured(results)
    (out / "tables.md").write_text(tables(results, found, tests(results)))
    (out / "points.csv").write_text(as_csv(results, found))
    plot(results, found, out / "exploration.svg")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="(default: runs/prefix_exploration)")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"(default: {SEEDS})")
    parser.add_argument("--json", type=Path, help="(default: OUTPUT/exploration.json)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", action="store_true", help="untrained models, 1 seed, few steps")
    kind.add_argument("--from", type=Path, dest="kept", metavar="FILE", help="run nothing")
    given = parser.parse_args(arguments)
    directory = "runs/prefix_exploration" + ("_quick" if given.quick else "")
    out = (given.output or Path(directory)).resolve()
    if given.kept:
        results = Results.read(given.kept)
    else:
        results = run(out, 1 if given.quick else given.seeds, given.quick)
        results.write(given.json or out / "exploration.json")
    write(results, out)
    print((out / "tables.md").read_text())
    print(f"{len(results.seeds)} seeds, {results.minutes} minutes. Everything is in {out}")


if __name__ == "__main__":
    main()
