"""What can be checked before the queue: settings against models, nodes, files and disk.

The rules on settings and models are those of `config.py`, `model_rules.py` and `preflight.py`;
what is added here is about the machines that the run is meant for.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nemo_trd.config.errors import ConfigError, rule_broken
from nemo_trd.config.rules import check_server_tp
from nemo_trd.config.schema import Config, ModelSource
from nemo_trd.models.directory import INDEX_NAME, SINGLE_NAME, check_weights
from nemo_trd.models.read import Model
from nemo_trd.models.served import is_only_served, read_served
from nemo_trd.plan.cost import concurrent_sequences, server_nodes, servers
from nemo_trd.plan.memory import GIB, checkpoint_bytes, generations
from nemo_trd.plan.shapes import has_shape, read_model
from nemo_trd.preflight.batch import batch_problems
from nemo_trd.preflight.models import STUDENT, TEACHER, model_problems


@dataclass
class Findings:
    """What is wrong, and what could not be looked at on this machine."""

    problems: list[ConfigError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check(config: Config) -> tuple[Model | None, Model | None, Findings]:
    """The shapes of student and teacher, None where they cannot be read, and all findings."""
    found = Findings()
    student = _model(config.model.student, STUDENT, found)
    teacher = student
    if config.model.teacher is not None:
        teacher = (
            _served_teacher(config, config.model.teacher, found)
            if is_only_served(config)
            else _model(config.model.teacher, TEACHER, found)
        )
    found.problems += batch_problems(config, config.cluster.world_size)
    found.problems += model_problems(config, student, teacher)
    found.problems += _layout_problems(config)
    _check_nodes(config, found)
    if student is not None and teacher is not None:
        found.problems += _server_problems(config, student, teacher)
        _check_disk(config, student, found)
    _check_data(config, found)
    return student, teacher, found


def _served_teacher(config: Config, source: ModelSource, found: Findings) -> Model | None:
    """Of any architecture; one whose shape is not known here has no more than its lengths."""
    assert config.generation.vllm is not None  # config_rules: servers score
    directory = Path(source.path).absolute()
    try:
        model, note = read_model(source, TEACHER)
        found.notes += [note] if note is not None else []
        return model
    except ConfigError as error:
        if not (directory / "config.json").is_file():
            found.problems.append(error)
            return None
    try:
        hf = read_served(source, TEACHER, config.generation.vllm.teacher.server)
    except ConfigError as error:
        found.problems.append(error)
        return None
    found.notes.append(
        f"{TEACHER} = {source.path}: {hf.model_type} is on servers only; what its servers need and "
        "how long they take is not estimated"
    )
    return Model(TEACHER, directory, hf, tokenizer=None)


def _model(source: ModelSource, name: str, found: Findings) -> Model | None:
    try:
        model, note = read_model(source, name)
        if note is not None:
            found.notes.append(note)
        elif any((model.directory / file).exists() for file in (INDEX_NAME, SINGLE_NAME)):
            check_weights(model.directory, model.hf, name)
        else:
            found.notes.append(
                f"{name} = {source.path}: no weights here, config.json alone is used"
            )
    except ConfigError as error:
        found.problems.append(error)
        return None
    return model


def _check_nodes(config: Config, found: Findings) -> None:
    """Servers have nodes of their own exactly where something is generated on servers."""
    cluster, vllm = config.cluster, config.generation.vllm
    asks = config.asks_teacher
    for name, role, used in (("student", "rollout", True), ("teacher", "refinement", asks)):
        nodes, tp = server_nodes(cluster, role)
        if vllm is not None and used and nodes > 0:
            try:
                check_server_tp(config, name)
            except ConfigError as error:
                found.problems.append(error)
        pool = getattr(vllm, name) if vllm is not None and used else None
        field = f"cluster.{name}_server_nodes"
        if pool is None and nodes > 0:
            found.problems.append(
                rule_broken(
                    field,
                    nodes,
                    f"nothing is generated on {name} servers with generation.backend="
                    f"{config.generation.backend}, algorithm.trajectory="
                    f"{config.algorithm.trajectory}, teacher.scoring={config.teacher.scoring}",
                    "set it to 0" + (", or generation=vllm" if vllm is None else ""),
                )
            )
        elif pool is not None and nodes == 0 and pool.replicas > 0:
            found.notes.append(
                f"{field} = 0: the run's own {name} servers share the training GPUs; the memory "
                "that they take is not counted"
            )
        elif pool is not None and nodes == 0:
            found.problems.append(
                rule_broken(
                    field,
                    nodes,
                    f"one {name} server takes {tp} GPUs, and no node is set aside for it",
                    f"set aside a node, or generation.vllm.{name}.replicas for servers of the run",
                )
            )
        elif pool is not None and tp > cluster.gpus_per_node:
            found.problems.append(
                rule_broken(
                    f"cluster.{name}_server_tp",
                    tp,
                    f"a server lives on one node, and a node has {cluster.gpus_per_node} GPUs",
                    f"use at most {cluster.gpus_per_node}",
                )
            )


def _layout_problems(config: Config) -> Iterator[ConfigError]:
    """Tensor parallel ranks exchange activations in every layer: not between nodes."""
    gpus = config.cluster.gpus_per_node
    for name in ("student", "teacher"):
        tp = getattr(config.parallel, name).tensor_model_parallel_size
        if config.cluster.training_nodes > 1 and gpus % tp:
            yield rule_broken(
                f"parallel.{name}.tensor_model_parallel_size",
                tp,
                f"tensor parallel ranks must share a node, and a node has {gpus} GPUs",
                f"use a divisor of {gpus}",
            )


def _server_problems(config: Config, student: Model, teacher: Model) -> Iterator[ConfigError]:
    """One sequence of the greatest length must find room in a server."""
    if config.generation.vllm is None:
        return
    for role, hf, context, answer in generations(config, student.hf, teacher.hf):
        if not has_shape(hf):
            continue
        name = "student" if role == "rollout" else "teacher"
        made = servers(config, role, hf)
        for size, key in (
            (hf.num_attention_heads, "num_attention_heads"),
            (hf.intermediate_size, "intermediate_size"),
        ):
            if size % made.tp:
                yield rule_broken(
                    f"cluster.{name}_server_tp",
                    made.tp,
                    f"it must divide {key} of the model, {size}",
                    f"use a divisor of {size}",
                )
        if concurrent_sequences(hf, made, context + answer) == 0:
            left = made.cache_bytes / GIB
            yield rule_broken(
                f"cluster.{name}_server_tp",
                made.tp,
                f"the weights leave {left:.1f} GiB of a server's GPUs for keys and values, and one "
                f"sequence of {context + answer} tokens does not fit",
                "give a server more GPUs",
            )


def disk_needed(config: Config, model: Model) -> int:
    """Bytes below run.dir: the checkpoints that are kept, one that is being written, the export."""
    sizes = checkpoint_bytes(config, model.hf)
    return sizes["checkpoint"] * (config.checkpoint.keep_last + 1) + sizes["export"]


def _check_disk(config: Config, student: Model, found: Findings) -> None:
    """Against `cluster.disk_gib`, or what is free where the run directory is there already."""
    needed, given = disk_needed(config, student) / GIB, config.cluster.disk_gib
    if given is not None:
        free, where, name = given, "cluster.disk_gib", "cluster.disk_gib"
    elif config.run_dir.is_dir():
        free = shutil.disk_usage(config.run_dir).free / GIB
        where, name = f"free in {config.run_dir}", "checkpoint.keep_last"
    else:
        found.notes.append(
            f"run.dir = {config.run.dir}: not here yet; its disk must hold {needed:,.0f} GiB"
        )
        return
    if needed > free:
        found.problems.append(
            rule_broken(
                name,
                given if name == "cluster.disk_gib" else config.checkpoint.keep_last,
                f"{config.checkpoint.keep_last} checkpoints, one being written and the export take "
                f"{needed:,.0f} GiB, and {free:,.0f} GiB are {where}",
                "lower checkpoint.keep_last, or take a larger disk",
            )
        )


def _check_data(config: Config, found: Findings) -> None:
    for name, dataset in (("train", config.data.train), ("validation", config.data.validation)):
        if dataset is None:
            continue
        path = Path(dataset.path)
        if path.suffix in (".jsonl", ".parquet") and not path.is_file():
            found.notes.append(f"data.{name}.path = {dataset.path}: not on this machine")
