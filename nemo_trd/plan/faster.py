"""Finds the changes of settings that save most time of a step: each is computed, not guessed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nemo_trd.config.errors import ConfigError
from nemo_trd.config.rules import check_consistent
from nemo_trd.config.schema import Config, Speculation
from nemo_trd.plan.advice import capacity, peak
from nemo_trd.plan.cost import step_time, with_nodes
from nemo_trd.plan.memory import training_memory
from nemo_trd.preflight.batch import batch_problems

LEAST_SAVED = 0.01  # share of the step
DRAFTS = Speculation(method="ngram", tokens=5, lookup_max=4, lookup_min=2)
TOP_K = 64


@dataclass(frozen=True)
class Saving:
    """Overrides to be set together, and the seconds of a step with them."""

    overrides: tuple[str, ...]
    seconds: float


def savings(config: Config, student: Any, teacher: Any) -> list[Saving]:
    """The changes with which a step is shorter and the run is valid and fits; the best first."""
    now = step_time(config, student, teacher).total
    found = []
    for overrides, changed in changes(config):
        try:
            check_consistent(changed)
        except ConfigError:
            continue
        if any(batch_problems(changed, changed.cluster.world_size)):
            continue
        seconds = step_time(changed, student, teacher).total
        fits = peak(training_memory(changed, student, teacher)).total <= capacity(changed)
        if fits and seconds < now * (1 - LEAST_SAVED):
            found.append(Saving(overrides, seconds))
    return sorted(found, key=lambda saving: saving.seconds)


def changes(config: Config) -> Iterator[tuple[tuple[str, ...], Config]]:
    """Single changes that may save time: of what is done, of formats, and more nodes."""
    vllm, cluster, precision = config.generation.vllm, config.cluster, config.precision
    if vllm is not None and config.generation.max_staleness == 0:
        generation = config.generation.model_copy(update={"max_staleness": 1})
        yield ("generation.max_staleness=1",), _with(config, generation=generation)
    if vllm is not None and config.draws_rewrites and config.teacher.scoring != "generation":
        top_k = config.loss.top_k or TOP_K
        loss = config.loss.model_copy(update={"top_k": top_k})
        scoring = {"scoring": "generation", "offload_weights": False, "offload_states": False}
        scored = config.teacher.model_copy(update=scoring)
        overrides = ["teacher.scoring=generation"]
        overrides += [] if config.loss.top_k else [f"loss.top_k={top_k}"]
        overrides += [f"teacher.{x}=false" for x in scoring if getattr(config.teacher, x) is True]
        if precision.teacher_fp8 is not None:
            overrides.append("precision.teacher_fp8=null")
        whole = precision.model_copy(update={"teacher_fp8": None})
        yield tuple(overrides), _with(config, teacher=scored, loss=loss, precision=whole)
    if vllm is not None and config.draws_rewrites and vllm.teacher.server.speculation is None:
        server = vllm.teacher.server.model_copy(update={"speculation": DRAFTS})
        pool = vllm.teacher.model_copy(update={"server": server})
        generation = config.generation.model_copy(
            update={"vllm": vllm.model_copy(update={"teacher": pool})}
        )
        said = ",".join(f"{k}:{v}" for k, v in DRAFTS.model_dump().items())
        override = f"generation.vllm.teacher.server.speculation={{{said}}}"
        yield (override,), _with(config, generation=generation)
    if precision.fp8 is None:
        teacher_fp8 = "hybrid" if config.teacher.scoring == "megatron" else None
        formats = precision.model_copy(update={"fp8": "hybrid", "teacher_fp8": teacher_fp8})
        yield ("precision=fp8",), _with(config, precision=formats)
    if config.train.recompute == "full":
        train = config.train.model_copy(update={"recompute": "none"})
        yield ("train.recompute=none",), _with(config, train=train)
    nodes = cluster.training_nodes, cluster.student_server_nodes, cluster.teacher_server_nodes
    names = ("training_nodes", "student_server_nodes", "teacher_server_nodes")
    for place, (name, number) in enumerate(zip(names, nodes, strict=True)):
        if number:
            more = [2 * n if i == place else n for i, n in enumerate(nodes)]
            yield (f"cluster.{name}={2 * number}",), with_nodes(config, *more)


def _with(config: Config, **sections: Any) -> Config:
    return config.model_copy(update=sections)
