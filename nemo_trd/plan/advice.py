"""Finds changes of settings with which a run fits: each change is computed, not guessed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nemo_trd.config.errors import ConfigError
from nemo_trd.config.schema import Config, Layout
from nemo_trd.loss.divergences import chunk_size
from nemo_trd.models.rules import check_layout
from nemo_trd.plan.memory import GIB, GpuMemory, replicas, training_memory, vocabulary_rows
from nemo_trd.preflight.batch import batch_problems

SIZES = (  # of a layout, in the order in which they are enlarged
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
)
EXPERTS = "expert_model_parallel_size"
Overrides = dict[str, str]  # setting -> value
LEAST_GAIN = 0.01  # share of memory; a further change saves more, or nodes would be added forever


@dataclass(frozen=True)
class Advice:
    """Overrides to be set together, and the peak memory of the fullest GPU with them, in bytes."""

    overrides: tuple[str, ...]
    peak: int
    fits: bool


def peak(memory: list[GpuMemory]) -> GpuMemory:
    """Fullest kind of GPU."""
    return max(memory, key=lambda gpu: gpu.total)


def capacity(config: Config) -> int:
    """Memory of one GPU, in bytes."""
    return round(config.cluster.gpu_memory_gib * GIB)


def advise(config: Config, student: Any, teacher: Any) -> Advice | None:
    """Find the first single change with which the run fits, else the most helpful ones together;
    more nodes come last.

    None where no known change helps.
    """
    limit = capacity(config)

    def attempts(start: Config) -> list[tuple[int, Overrides, Config]]:
        return [
            (peak(training_memory(changed, student, teacher)).total, overrides, changed)
            for overrides, changed in changes(start, student, teacher)
        ]

    for size, overrides, _ in attempts(config):
        if size <= limit:
            return Advice(_written(overrides), size, True)
    now = peak(training_memory(config, student, teacher)).total
    values: Overrides = {}
    while now > limit:
        *changed_settings, more_nodes = attempts(config)
        helping = [option for option in changed_settings if option[0] <= now * (1 - LEAST_GAIN)]
        size, overrides, changed = min(helping, key=lambda o: o[0], default=more_nodes)
        if size > now * (1 - LEAST_GAIN):
            break
        now, config = size, changed
        values |= overrides
    return Advice(_written(values), now, now <= limit) if values else None


def _written(overrides: Overrides) -> tuple[str, ...]:
    return tuple(f"{key}={value}" for key, value in overrides.items())


def on_fewer_gpus(config: Config) -> Config | None:
    """Halve context, pipeline, then tensor parallelism of both layouts until they divide the GPUs.

    None where nothing has to change, or where it does not help.
    """
    world, fitted = config.cluster.world_size, config
    has_teacher = config.teacher.scoring == "megatron"
    for role in ("student", "teacher") if has_teacher else ("student",):
        layout: Layout = getattr(config.parallel, role)
        for key in reversed(SIZES):
            while world % layout.model_parallel_size and getattr(layout, key) % 2 == 0:
                layout = layout.model_copy(update={key: getattr(layout, key) // 2})
        if world % layout.model_parallel_size:
            return None
        while world % layout.expert_holders and getattr(layout, EXPERTS) % 2 == 0:
            layout = layout.model_copy(update={EXPERTS: getattr(layout, EXPERTS) // 2})
        fitted = _with(fitted, "parallel", **{role: layout})
    return None if fitted == config else fitted


def changes(config: Config, student: Any, teacher: Any) -> Iterator[tuple[Overrides, Config]]:
    """Single changes that need less memory on a GPU, cheapest in time first."""
    layout, has_teacher = config.parallel.student, config.teacher.scoring == "megatron"
    if not config.optimizer.distributed and replicas(config, layout) > 1:
        yield {"optimizer.distributed": "true"}, _with(config, "optimizer", distributed=True)
    for roles in _split_alike(config):
        role_layout = getattr(config.parallel, roles[0])
        if role_layout.tensor_model_parallel_size > 1 and not role_layout.sequence_parallel:
            yield _with_layouts(config, roles, "sequence_parallel", True)
    if has_teacher and not config.teacher.offload_states:
        yield {"teacher.offload_states": "true"}, _with(config, "teacher", offload_states=True)
    if has_teacher and not (config.teacher.offload_weights or config.teacher_is_student):
        yield {"teacher.offload_weights": "true"}, _with(config, "teacher", offload_weights=True)
    if config.train.recompute != "full":
        yield {"train.recompute": "full"}, _with(config, "train", recompute="full")
    rows = vocabulary_rows(student, layout)
    half = chunk_size(config.loss, rows, on_gpu=True) // 2
    if half >= 128:
        yield {"loss.chunk_size": str(half)}, _with(config, "loss", chunk_size=half)
    yield from _larger_layouts(config, student, teacher)
    nodes = 2 * config.cluster.training_nodes
    yield {"cluster.training_nodes": str(nodes)}, _with(config, "cluster", training_nodes=nodes)


def _split_alike(config: Config) -> list[tuple[str, ...]]:
    """Models in Megatron; together those that must be split alike."""
    if config.teacher.scoring != "megatron":
        return [("student",)]
    if config.teacher_is_student:
        return [("student", "teacher")]
    return [("student",), ("teacher",)]


def _larger_layouts(
    config: Config, student: Any, teacher: Any
) -> Iterator[tuple[Overrides, Config]]:
    """Double one size of a layout on the same GPUs; tensor parallel ranks stay in a node."""
    shapes = {"student": student, "teacher": teacher}
    for roles in _split_alike(config):
        layout: Layout = getattr(config.parallel, roles[0])
        for key in (*SIZES, EXPERTS):
            size = 2 * getattr(layout, key)
            if key.startswith("tensor") and size > config.cluster.gpus_per_node:
                continue
            overrides, other = _with_layouts(config, roles, key, size)
            try:
                check_layout(shapes[roles[0]], getattr(other.parallel, roles[0]), roles[0])
            except ConfigError:
                continue
            if not any(batch_problems(other, config.cluster.world_size)):
                yield overrides, other


def _with_layouts(
    config: Config, roles: tuple[str, ...], key: str, value: Any
) -> tuple[Overrides, Config]:
    layouts = {r: getattr(config.parallel, r).model_copy(update={key: value}) for r in roles}
    overrides = {f"parallel.{role}.{key}": str(value).lower() for role in roles}
    return overrides, _with(config, "parallel", **layouts)


def _with(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})
