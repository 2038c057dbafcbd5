"""Runs of a comparison: a process with one thread each, two at a time, kept where they are there.

A condition is a directory: models/SEED/{student, teacher, train.jsonl}, models/{development,
test}.jsonl, tuning/METHOD/... and runs/METHOD/.... Whatever was interrupted goes on where it was
when the same command runs again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from statistics import fmean
from threading import Lock
from typing import Any, TypeVar

from comparison.models import World, make_model, read_made, write_prompts
from comparison.results import Point, read_run
from tqdm import tqdm

from nemo_trd.config.load import compose

LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
TUNING_SEEDS = (100, 101)
WARM_UP = 6  # steps, whatever the length of the run
AT_ONCE = 2
# Each run is forked from a process that has imported what all of them import.
_IMPORTED = ("__main__", "nemo_trd.train", "transformers.models.qwen3.modeling_qwen3")
# One thread. Memory that is freed is kept: glibc returns large tensors to the kernel, which clears
# every page of the next one. Results are the same; a run takes a fifth less time.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
}
# A process that starts asks all others whether they have ended. Their exit codes can be read once,
# so no two threads may ask at one time: the second would find 255.
_processes = Lock()

Item = TypeVar("Item")
Result = TypeVar("Result")
Methods = Mapping[str, Mapping[str, Any]]  # as methods.yaml has them
Chosen = dict[str, dict[str, Any]]  # by method: lr, steps, development_avg, tried


@dataclass(frozen=True)
class Condition:
    """What a set of runs has in common.

    budget: steps of a method that rewrites; one that does not has twice as many.
    evaluations: after the first, at equal distances; one of them half way.
    k, tuning_k: samples of each test problem, and of each development problem while tuning.
    settings: of all methods.
    """

    root: Path
    budget: int = 60
    evaluations: int = 4
    k: int = 16
    tuning_k: int = 8
    settings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.budget % self.evaluations == 0 and self.evaluations % 2 == 0

    def models(self, seed: int) -> Path:
        return self.root / "models" / str(seed)

    def job(self, method: str, description: Mapping[str, Any], seed: int, lr: float) -> Job:
        """The run of a method on the test problems."""
        # Both kinds are evaluated at equal tokens each time, and at equal steps after `budget`.
        longer = 1 if description.get("refines") else 2
        return Job(
            method=method,
            seed=seed,
            lr=lr,
            steps=longer * self.budget,
            interval=longer * self.budget // self.evaluations,
            k=self.k,
            problems="test",
            directory=self.root / "runs" / method / f"seed_{seed}_lr_{lr:g}",
            models=self.models(seed),
            settings=(*self.settings, *description["settings"]),
        )

    def tuning_job(self, *which: Any) -> Job:
        """The run of a method on the development problems. Arguments as `job` has them."""
        test = self.job(*which)
        directory = self.root / "tuning" / test.directory.relative_to(self.root / "runs")
        settings = (*test.settings, "evaluation.at_start=false")  # it is the same for all
        return replace(
            test, k=self.tuning_k, problems="development", directory=directory, settings=settings
        )


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
            f"optimizer.warmup_fraction={min(1.0, WARM_UP / self.steps)}",
            *(f"train.num_steps={self.steps}", f"evaluation.interval={self.interval}"),
            *("evaluation.at_end=false", f"evaluation.samples_per_problem={self.k}"),
            *("checkpoint.save_interval=1000000", "checkpoint.export_hf=false"),
            *("logging.tensorboard=false", "logging.progress=false"),
            *(f"logging.samples_interval={self.interval}", "logging.samples_count=32"),
            *self.settings,
        ]


def make_models(world: World, seed: int, models: Path) -> None:
    """Student, teacher and prompts of one seed, unless they are there."""
    write_prompts(models, seed, world.products)
    for role, recipe in (("student", world.student), ("teacher", world.teacher)):
        if not (models / role).is_symlink():  # another condition's
            arguments = (models / role, role, seed, recipe, world.texts)
            in_process(make_model, arguments, models / f"{role}.log")


def missed_gates(models: Path) -> list[str]:
    """What the models of one seed did not learn well enough: role and gate."""
    roles = ("student", "teacher")
    return [f"{role} {gate}" for role in roles for gate in read_made(models / role)["missed"]]


def run_job(job: Job) -> list[Point]:
    """The points of a job, which is run unless it has been before: same settings, same models."""
    job.directory.parent.mkdir(parents=True, exist_ok=True)
    done, log = (job.directory.with_name(job.directory.name + end) for end in (".done", ".log"))
    weights = [read_made(job.models / role)["weights"] for role in ("student", "teacher")]
    key = json.dumps({"models": weights, "settings": job.overrides()})
    key = key.replace(str(job.models.parent.parent), "")  # a condition may be moved
    if not done.exists() or done.read_text() != key:
        shutil.rmtree(job.directory, ignore_errors=True)
        in_process(fine_tune if job.method == "sft" else train, (job.overrides(),), log)
        done.write_text(key)
    return read_run(job.directory, job.method, job.seed, job.k)


def train(overrides: Sequence[str]) -> None:
    from nemo_trd.train import launch

    if code := launch(compose(overrides)):
        sys.exit(code)


def fine_tune(overrides: Sequence[str]) -> None:
    from comparison import sft

    sft.fine_tune(compose(overrides))


def measure_prefixes(run_dir: Path) -> None:
    """What the teacher says along the rollouts of a run, unless it has been measured."""
    from nemo_trd.records.prefix_failure import FILE

    if not (run_dir / FILE).exists():
        in_process(_prefix_failure, (str(run_dir),), run_dir / "prefix_failure.log")


def _prefix_failure(run_dir: str) -> None:
    from nemo_trd.prefix_failure.main import main

    sys.exit(main([run_dir]))


def in_process(work: Callable[..., None], arguments: Sequence[Any], log: Path) -> None:
    """Call a module's function in a process with one thread, its output in `log`.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    os.environ.update(_ENVIRONMENT)  # before the process that is forked imports PyTorch
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_IMPORTED])
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    process = context.Process(target=_logged, args=(work, arguments, str(log)))
    with _processes:
        process.start()
    wait([process.sentinel])
    with _processes:
        process.join()
    if process.exitcode:
        last = "\n".join(log.read_text().splitlines()[-5:])
        raise RuntimeError(f"exit code {process.exitcode}, {log}:\n{last}")


def _logged(work: Callable[..., None], arguments: Sequence[Any], log: str) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    work(*arguments)


def at_once(work: Callable[[Item], Result], items: Sequence[Item], what: str) -> list[Result]:
    """Results in the order of `items`. The first failure ends it, when what has begun is done."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            return list(tqdm(pool.map(work, items), desc=what, total=len(items), unit="run"))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def tune(
    methods: Methods, conditions: Mapping[str, Condition], seeds: Sequence[int] = TUNING_SEEDS
) -> dict[str, Chosen]:
    """Learning rate and steps that are best on the development problems, by condition and method.

    All learning rates on the first of two seeds, then the two best of each method on the second.
    `tried` has what they reached: avg@k on one or both, by learning rate and step.
    """
    which = [(condition, method) for condition in conditions for method in methods]
    found: dict[tuple[str, str], dict[tuple[float, int], list[float]]] = {w: {} for w in which}
    rates = {w: list(LEARNING_RATES) for w in which}
    for seed in seeds:
        tried = [
            (condition, method, lr)
            for condition, method in which
            for lr in rates[condition, method]
        ]
        jobs = [conditions[c].tuning_job(m, methods[m], seed, lr) for c, m, lr in tried]
        for (condition, method, lr), points in zip(
            tried, at_once(run_job, jobs, f"tuning, seed {seed}"), strict=True
        ):
            for point in points:
                if point.step:
                    values = found[condition, method].setdefault((lr, point.step), [])
                    values.append(point.avg)
        for w, lrs in rates.items():
            best = {
                lr: max(fmean(v) for (rate, _), v in found[w].items() if rate == lr) for lr in lrs
            }
            rates[w] = sorted(lrs, key=best.__getitem__, reverse=True)[:2]
    chosen: dict[str, Chosen] = {condition: {} for condition in conditions}
    for (condition, method), settings in found.items():
        both = {s: fmean(v) for s, v in settings.items() if len(v) == len(seeds)}
        lr, steps = max(both, key=both.__getitem__)
        average = round(both[lr, steps], 4)
        reached: dict[str, dict[str, list[float]]] = {}
        for (rate, step), values in settings.items():
            reached.setdefault(f"{rate:g}", {})[str(step)] = [round(value, 4) for value in values]
        chosen[condition][method] = {"lr": lr, "steps": steps, "development_avg": average}
        chosen[condition][method]["tried"] = reached
    return chosen
