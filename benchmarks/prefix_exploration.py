"""Exploration: does trajectory refinement find more ways to solve a problem?

    python benchmarks/prefix_exploration.py             # 5 seeds, hours on two cores
    python benchmarks/prefix_exploration.py --quick     # untrained models: does it run?
    python benchmarks/prefix_exploration.py --from FILE    # tables and plots of kept results

The toy problems have six right derivations each, the orders in which their three products are
worked out (nemo_trd/toy/derivations.py). The texts that a student learns from have one common order
and five that are rarer and rarer (STUDENT_ORDERS); those of its teacher have all alike, so there is
something to explore. There are two kinds of teachers. In the texts of the first a rewrite keeps the
order of the attempt, the least edit that mends it; in those of the second it has any order, so that
a right rollout too is answered with another derivation. Every seed has a student, a teacher of each
kind and prompts of its own, made before any method runs; every method has, with each kind, the
learning rate that is best for it by avg@8 on other problems and seeds (comparison/jobs.py `tune`).

Of every model SAMPLES answers to each of 100 test problems are sampled at temperature 1. OPD is
sampled after as many steps as TRD has, and after as many generated tokens. `TRD, y_r of wrong, y_o
of right` is refinement.subset=wrong, which generates fewer: its teacher sees x alone where a right
rollout is trained on. `TRD, teacher sees x` rewrites everything, and hides the attempt from the
teacher when it scores.

    pass@k        probability that a right derivation is among k of the samples, unbiased
    derivations   expected number of different right ones among k samples (rarefaction), and among
                  16 right samples, in problems that have them: there accuracy counts for nothing
    entropy       of the right derivations of a problem, in nats, mean over problems
    intervals     95 % over seeds, Student's t; differences are paired by seed

Written before the first run, but not wholly blind. One run of TRD and one of OPD, with other models
of the first kind, had been sampled to try the counting: avg@64 and pass@k of TRD's were known when
the prediction for the first kind and its three tests were written, its derivations were not. They
were when the second kind, its prediction and its two tests were added.

    claim         the paper's: TRD improves exploration, since right rollouts too are answered with
                  other valid derivations, and broadens coverage
    prediction    It does so with the second kind of teachers only. A teacher of the first kind that
                  sees an attempt expects its order, so along y_r the student is taught its own mix
                  of orders: TRD is right more often, and among 16 right samples it has no more
                  derivations than the student had. Where the teacher sees x alone its even mix is
                  taught, along y_o and along y_r: OPD and `TRD, teacher sees x` have more
                  derivations, and TRD with subset=wrong lies between. With the second kind TRD has
                  about as many as OPD; rewriting right rollouts adds little to that, since a
                  teacher that sees x alone has the same mix.
    tests         five, named in `tests`; p is also adjusted for their number (Holm)
    exclusions    a seed of which a model misses its gates is left out with both kinds, and the next
                  number takes its place; nothing else is left out

Everything is written to `--output`: models, runs, samples, exploration.json (of which tables and
plot are made), points.csv, tables.md and exploration.svg. What is there is kept, so an interrupted
command goes on.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:  # where this file is imported and not run
    sys.path.insert(0, str(HERE))

from comparison.command import command  # noqa: E402
from comparison.coverage import (  # noqa: E402
    RIGHT,
    Exploration,
    Results,
    Sampled,
    read_samples,
    rewrites,
)
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
from comparison.results import Interval, Point, read_run  # noqa: E402
from comparison.sweep import METHODS, QUICK_LR, TUNING_SEEDS, Sweep, complete_seeds  # noqa: E402

from nemo_trd.evaluate.main import main as evaluate_main  # noqa: E402
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
ORDER_WEIGHTS = {"student": STUDENT_ORDERS, "teacher": TEACHER_ORDERS}
KEPT = (1.0, 0.0)  # how often a rewrite in the teacher's texts keeps the order of the attempt
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


def run(root: Path, seeds: int, quick: bool) -> Exploration:
    """Make models, choose learning rates, run all methods, and sample."""
    started = time.monotonic()
    problems = dict.fromkeys(PROBLEMS, 8) if quick else PROBLEMS
    conditions = {kept: condition(root / f"kept_{kept:g}", quick) for kept in KEPT}
    for one in conditions.values():
        write_problems(one.root / "models", problems)
    sweep = Sweep("kept", tuple(NAMES), conditions, dict.fromkeys(KEPT, task.USUAL), problems)
    lock = Lock()

    def prepare(kept: float, seed: int) -> None:
        with lock:  # both kinds of teachers have the same student
            student = make(root / "students" / str(seed), "student", seed, 1.0, quick)
        models = conditions[kept].models(seed)
        write_prompts(models, seed)
        if not (models / "student").is_symlink():
            (models / "student").symlink_to(student)
        make(models / "teacher", "teacher", seed, kept, quick)

    methods = {name: METHODS[name] for name in NAMES}
    chosen = {f"{kept:g}": {method: {"lr": QUICK_LR} for method in methods} for kept in KEPT}
    excluded: dict[str, list[str]] = {}
    if not quick:
        tuning, excluded = complete_seeds(sweep, prepare, TUNING_SEEDS[0], len(TUNING_SEEDS))
        chosen = tune(methods, {f"{kept:g}": one for kept, one in conditions.items()}, tuning)
    used, missed = complete_seeds(sweep, prepare, 0, seeds)
    jobs = {
        kept: [
            one.job(method, methods[method], seed, chosen[f"{kept:g}"][method]["lr"])
            for seed in used
            for method in methods
        ]
        for kept, one in conditions.items()
    }
    at_once(run_job, [job for its_jobs in jobs.values() for job in its_jobs], "methods")
    models = {
        kept: [
            *(model for seed in used for model in models_of_seed(one, seed)),
            *(model for job in jobs[kept] for model in models_of_run(job, one.budget)),
        ]
        for kept, one in conditions.items()
    }
    samples = 8 if quick else SAMPLES
    drawn = [(model, conditions[kept]) for kept, ones in models.items() for model in ones]
    at_once(lambda one: draw(one[0], problems_file(one[1]), samples), drawn, "samples")
    results = [
        Results(
            kept=kept,
            seeds=used,
            samples=samples,
            chosen=chosen[f"{kept:g}"],
            models={
                str(job.seed): abilities(job.models, job.directory)
                for job in jobs[kept]
                if job.method == "trd"
            },
            sampled=[sampled(model, problems_file(one)) for model in models[kept]],
        )
        for kept, one in conditions.items()
    ]
    minutes = round((time.monotonic() - started) / 60, 1)
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    return Exploration(results, {**excluded, **missed}, minutes, machine)


def condition(root: Path, quick: bool) -> Condition:
    """Runs with one kind of teacher; a checkpoint wherever a student is sampled."""
    one = Condition(root, k=1)
    if quick:
        one = replace(one, budget=one.evaluations)
    return replace(one, settings=(f"checkpoint.save_interval={one.budget}",))


def problems_file(condition: Condition) -> Path:
    return condition.root / "models" / "test.jsonl"


def make(directory: Path, role: str, seed: int, kept: float, quick: bool) -> Path:
    """The directory of a model, which is made unless it is there."""
    recipe = untrained(RECIPES[role]) if quick else RECIPES[role]
    directory.parent.mkdir(parents=True, exist_ok=True)
    arguments = (directory, role, seed, recipe, Texts(), ORDER_WEIGHTS[role], kept)
    in_process(make_model, arguments, directory.with_name(f"{directory.name}.log"))
    return directory


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
    samples = condition.root / "samples"
    return [
        Model(role, seed, None, path, samples / f"{role}_{seed}_{read_made(path)['weights']}")
        for role, path in directories.items()
    ]


def models_of_run(job: Job, budget: int) -> list[Model]:
    """After `budget` steps and at the end, which may be the same."""
    points = {one.step: one for one in read_run(job.directory, job.method, job.seed, job.k)}
    names = dict(zip((budget, job.steps), NAMES[job.method], strict=True))
    return [
        Model(
            name,
            job.seed,
            points[step],
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
    if code := evaluate_main([*overrides]):
        sys.exit(code)


def sampled(model: Model, problems: Path) -> Sampled:
    point = model.point
    spent = (0, 0, 0.0) if point is None else (point.step, point.generated_tokens, point.seconds)
    return Sampled(model.name, model.seed, *spent, read_samples(model.samples, problems))


def tests(exploration: Exploration) -> Mapping[str, Interval | None]:
    """The tests that the docstring names."""
    keeping, free = exploration.results
    level, more = f"distinct_of_right@{RIGHT}", f"distinct@{keeping.samples}"
    among_right, among = f"among {RIGHT} right samples", f"among {keeping.samples} samples"
    named = {
        f"order kept, {among_right}: TRD − student": (keeping, "student", level),
        f"order kept, {among}: TRD − TRD with subset=wrong": (keeping, "trd_mixed", more),
        f"order kept, {among}: TRD − OPD, equal tokens": (keeping, "opd_tokens", more),
        f"any order, {among_right}: TRD − student": (free, "student", level),
        f"any order, {among_right}: TRD − TRD with subset=wrong": (free, "trd_mixed", level),
    }
    return {
        f"derivations, {name}": difference(measured(results), other, figure)
        for name, (results, other, figure) in named.items()
    }


def write(exploration: Exploration, out: Path) -> None:
    """`out`/tables.md, points.csv and exploration.svg."""
    (out / "tables.md").write_text(tables(exploration, tests(exploration)))
    (out / "points.csv").write_text(as_csv(exploration))
    plot(exploration, out / "exploration.svg")


def main(arguments: Sequence[str] | None = None) -> None:
    command(arguments, __doc__, "exploration", SEEDS, run, Exploration.read, write)


if __name__ == "__main__":
    main()
