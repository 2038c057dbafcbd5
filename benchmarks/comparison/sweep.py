"""The same methods on toy tasks that differ in one quantity, each with models of its own."""

from __future__ import annotations

import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from comparison.jobs import (
    LEARNING_RATES,
    TUNING_SEEDS,
    Chosen,
    Condition,
    at_once,
    measure_prefixes,
    missed_gates,
    run_job,
    tune,
)
from comparison.models import write_problems
from comparison.results import Point, read_models, write_fields

METHODS = yaml.safe_load((Path(__file__).parent / "methods.yaml").read_text())
REFERENCE = "trd"  # in its run the prefix failure is measured
QUICK_LR = LEARNING_RATES[2]


@dataclass(frozen=True)
class Sweep:
    """What is compared.

    quantity: what the values are, in words.
    methods: names in methods.yaml.
    conditions, products: by value; products of a problem.
    problems: number of problems by name, test and development.
    """

    quantity: str
    methods: tuple[str, ...]
    conditions: Mapping[float, Condition]
    products: Mapping[float, int]
    problems: Mapping[str, int]

    def quick(self) -> Sweep:
        """For a look at the machinery: a few steps and problems."""
        conditions = {
            value: replace(one, budget=one.evaluations, k=2)
            for value, one in self.conditions.items()
        }
        return replace(self, conditions=conditions, problems=dict.fromkeys(self.problems, 8))


@dataclass(frozen=True)
class Results:
    """What came out of a sweep. It is a JSON file, of which all tables and plots are made."""

    quantity: str
    methods: list[str]
    values: list[float]
    seeds: list[int]
    excluded: dict[str, list[str]]  # by seed: the first value at which it missed gates, and which
    budget: int  # steps of a method that rewrites
    k: int
    chosen: dict[str, Chosen]  # by value
    models: dict[str, dict[str, dict[str, float | None]]]  # by value and seed
    points: list[list[Any]]  # value, and the fields of `Point`
    minutes: float  # of the last start alone
    machine: str

    @classmethod
    def read(cls, file: Path) -> Results:
        return cls(**json.loads(file.read_text()))

    def write(self, file: Path) -> None:
        write_fields(self.__dict__, file)

    def curve(self, value: float, method: str, seed: int) -> list[Point]:
        """The evaluations of one run."""
        points = (Point(*rest) for at, *rest in self.points if at == value)
        return [point for point in points if (point.method, point.seed) == (method, seed)]


def complete_seeds(
    sweep: Sweep, prepare: Callable[[float, int], None], first: int, count: int
) -> tuple[list[int], dict[str, list[str]]]:
    """So many seeds of which all models pass their gates, and what the others missed.

    A seed's models are made value by value, and no more of them once one has missed a gate.

    Raises:
        RuntimeError: more of them missed a gate than are asked for.
    """

    def missed_by(seed: int) -> list[str]:
        for value, condition in sweep.conditions.items():
            prepare(value, seed)
            if missed := missed_gates(condition.models(seed)):
                return [f"{value:g}: {gate}" for gate in missed]
        return []

    seeds: list[int] = []
    excluded: dict[str, list[str]] = {}
    numbers = itertools.count(first)
    while len(seeds) < count:
        tried = list(itertools.islice(numbers, count - len(seeds)))
        for seed, missed in zip(
            tried, at_once(missed_by, tried, f"models of seeds {tried}"), strict=True
        ):
            if missed:
                excluded[str(seed)] = missed
            else:
                seeds.append(seed)
        if len(excluded) > count:
            raise RuntimeError(f"models of too many seeds missed their gates: {excluded}")
    return seeds, excluded


def carry_out(
    sweep: Sweep, prepare: Callable[[float, int], None], count: int, *, quick: bool
) -> Results:
    """Make all models, choose learning rates, run everything, and measure the prefixes.

    Args:
        prepare: makes models and prompts of a value and a seed, unless they are there.
        count: of seeds.
        quick: with models of one seed, and one learning rate that nobody has chosen.
    """
    started = time.monotonic()
    methods = {name: METHODS[name] for name in sweep.methods}
    for value, condition in sweep.conditions.items():
        write_problems(condition.root / "models", dict(sweep.problems), sweep.products[value])
    chosen = {
        f"{value:g}": {method: {"lr": QUICK_LR} for method in methods} for value in sweep.conditions
    }
    excluded: dict[str, list[str]] = {}
    tuning: list[int] = []
    if not quick:
        tuning, excluded = complete_seeds(sweep, prepare, TUNING_SEEDS[0], len(TUNING_SEEDS))
    seeds, missed = complete_seeds(sweep, prepare, 0, count)
    if not quick:
        chosen = tune(methods, {f"{v:g}": c for v, c in sweep.conditions.items()}, tuning)
    jobs = [
        (value, condition.job(method, methods[method], seed, chosen[f"{value:g}"][method]["lr"]))
        for seed in seeds
        for value, condition in sweep.conditions.items()
        for method in methods
    ]
    points = at_once(lambda one: run_job(one[1]), jobs, "methods")
    models: dict[str, dict[str, dict[str, float | None]]] = {}
    if not quick:  # untrained models have nothing to measure
        references = [(value, job) for value, job in jobs if job.method == REFERENCE]
        at_once(lambda one: measure_prefixes(one[1].directory), references, "prefix failure")
        for value, job in references:
            found = read_models(job.models, job.directory, sweep.products[value])
            models.setdefault(f"{value:g}", {})[str(job.seed)] = found
    any_condition = next(iter(sweep.conditions.values()))
    return Results(
        quantity=sweep.quantity,
        methods=[*methods],
        values=[*sweep.conditions],
        seeds=seeds,
        excluded={**excluded, **missed},
        budget=any_condition.budget,
        k=any_condition.k,
        chosen=chosen,
        models=models,
        points=[
            [value, *astuple(point)]
            for (value, _), its_points in zip(jobs, points, strict=True)
            for point in its_points
        ],
        minutes=round((time.monotonic() - started) / 60, 1),
        machine=f"{os.cpu_count()} cores, {platform.machine()}",
    )
