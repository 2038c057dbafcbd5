"""Checks before the queue: settings against models, nodes, files and disk.

The rules on settings and models are those of `config.rules`, `models.rules` and `preflight`; the
rules here are about the machines that the run is meant for.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nemo_trd.config.errors import ConfigError, rule_broken
from nemo_trd.config.schema import Config, ModelSource
from nemo_trd.config.server_rules import check_server_tp
from nemo_trd.models.directory import INDEX_NAME, SINGLE_NAME, check_weights
from nemo_trd.models.family import experts_of
from nemo_trd.models.peft import begins_from_directory, check_beginning
from nemo_trd.models.read import Model
from nemo_trd.models.served import is_only_served, read_served
from nemo_trd.plan.cost import concurrent_sequences, server_nodes, servers
from nemo_trd.plan.memory import GIB, checkpoint_bytes, generations
from nemo_trd.plan.shapes import has_shape, read_model
from nemo_trd.preflight.batch import batch_problems
from nemo_trd.preflight.models import STUDENT, TEACHER, model_problems


@dataclass
class Findings:
    """Broken rules, and notes on everything that could not be checked on this machine."""

    problems: list[ConfigError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check(config: Config) -> tuple[Model | None, Model | None, Findings]:
    """Check a run; return student and teacher, None where they cannot be read, and all findings."""
    findings = Findings()
    student = _model(config.model.student, STUDENT, findings)
    teacher = student
    if config.model.teacher is not None:
        teacher = (
            _served_teacher(config, config.model.teacher, findings)
            if is_only_served(config)
            else _model(config.model.teacher, TEACHER, findings)
        )
    if student is not None:
        _check_adapter(config, student, findings)
    findings.problems += batch_problems(config, config.cluster.world_size)
    findings.problems += model_problems(config, student, teacher)
    findings.problems += _layout_problems(config)
    _check_nodes(config, findings)
    if student is not None and teacher is not None:
        findings.problems += _server_problems(config, student, teacher)
        _check_disk(config, student, findings)
    _check_data(config, findings)
    return student, teacher, findings


def _served_teacher(config: Config, source: ModelSource, findings: Findings) -> Model | None:
    """Read a teacher of any architecture; an unknown one has its lengths and no shape."""
    assert config.generation.vllm is not None  # config.teacher_rules: servers score
    directory = Path(source.path).absolute()
    try:
        model, note = read_model(source, TEACHER)
        findings.notes += [note] if note is not None else []
        return model
    except ConfigError as error:
        if not (directory / "config.json").is_file():
            findings.problems.append(error)
            return None
    try:
        hf = read_served(source, TEACHER, config.generation.vllm.teacher.server)
    except ConfigError as error:
        findings.problems.append(error)
        return None
    findings.notes.append(
        f"{TEACHER} = {source.path}: {hf.model_type} is on servers only; what its servers need and "
        "how long they take is not estimated"
    )
    return Model(TEACHER, directory, hf, tokenizer=None)


def _model(source: ModelSource, name: str, findings: Findings) -> Model | None:
    try:
        model, note = read_model(source, name)
        if note is not None:
            findings.notes.append(note)
        elif any((model.directory / file).exists() for file in (INDEX_NAME, SINGLE_NAME)):
            check_weights(model.directory, model.hf, name)
        else:
            findings.notes.append(
                f"{name} = {source.path}: no weights here, config.json alone is used"
            )
    except ConfigError as error:
        findings.problems.append(error)
        return None
    return model


def _check_adapter(config: Config, student: Model, findings: Findings) -> None:
    """Check the adapter that the student begins with, where it is on this machine."""
    adapter = config.student.adapter
    if adapter is None or not begins_from_directory(adapter):
        return
    if Path(adapter.init).exists():
        findings.problems += check_beginning(student.hf, adapter)
    else:
        findings.notes.append(f"student.adapter.init = {adapter.init}: not on this machine")


def _check_nodes(config: Config, findings: Findings) -> None:
    """Check that servers have nodes of their own exactly where servers generate something."""
    cluster, vllm = config.cluster, config.generation.vllm
    used = (
        ("student", "rollout", config.asks_student),
        ("teacher", "refinement", config.asks_teacher and not config.teacher_on_student_servers),
    )
    for name, role, is_used in used:
        nodes, tp = server_nodes(cluster, role)
        if vllm is not None and is_used and nodes > 0:
            try:
                check_server_tp(config, name)
            except ConfigError as error:
                findings.problems.append(error)
        pool = getattr(vllm, name) if vllm is not None and is_used else None
        field = f"cluster.{name}_server_nodes"
        if pool is None and nodes > 0:
            findings.problems.append(
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
            if pool.devices and min(pool.devices) >= cluster.gpus_per_node:
                continue  # the node has GPUs beside those of the ranks
            findings.notes.append(
                f"{field} = 0: the run's own {name} servers share the training GPUs; the memory "
                "that they take is not counted"
            )
        elif pool is not None and nodes == 0:
            findings.problems.append(
                rule_broken(
                    field,
                    nodes,
                    f"one {name} server takes {tp} GPUs, and no node is set aside for it",
                    f"set aside a node, or generation.vllm.{name}.replicas for servers of the run",
                )
            )
        elif pool is not None and tp > cluster.gpus_per_node:
            findings.problems.append(
                rule_broken(
                    f"cluster.{name}_server_tp",
                    tp,
                    f"a server lives on one node, and a node has {cluster.gpus_per_node} GPUs",
                    f"use at most {cluster.gpus_per_node}",
                )
            )


def _layout_problems(config: Config) -> Iterator[ConfigError]:
    """Rules that keep tensor parallel ranks on one node: they exchange activations every layer."""
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
    """Rules for a server: its GPUs divide the model, and the longest sequence finds room."""
    if config.generation.vllm is None:
        return
    for role, hf, context, completion in generations(config, student.hf, teacher.hf):
        if not has_shape(hf):
            continue
        name = "student" if role == "rollout" else "teacher"
        pool, experts = servers(config, role, hf), experts_of(hf)
        for size, key in (
            (hf.num_attention_heads, "num_attention_heads"),
            (hf.intermediate_size, "intermediate_size")
            if experts is None
            else (experts.width, "moe_intermediate_size"),
        ):
            if size % pool.tp:
                yield rule_broken(
                    f"cluster.{name}_server_tp",
                    pool.tp,
                    f"it must divide {key} of the model, {size}",
                    f"use a divisor of {size}",
                )
        if concurrent_sequences(hf, pool, context + completion) == 0:
            cache_gib = pool.cache_bytes / GIB
            yield rule_broken(
                f"cluster.{name}_server_tp",
                pool.tp,
                f"the weights leave {cache_gib:.1f} GiB of a server's GPUs for keys and values, "
                f"and one sequence of {context + completion} tokens does not fit",
                "give a server more GPUs",
            )


def disk_needed(config: Config, model: Model) -> int:
    """Bytes below run.dir: the checkpoints that are kept, one being written, and the export."""
    sizes = checkpoint_bytes(config, model.hf)
    return sizes["checkpoint"] * (config.checkpoint.keep_last + 1) + sizes["export"]


def _check_disk(config: Config, student: Model, findings: Findings) -> None:
    """Check the disk: `cluster.disk_gib`, or the free space where the run directory exists."""
    required, disk_gib = disk_needed(config, student) / GIB, config.cluster.disk_gib
    if disk_gib is not None:
        free, where, name = disk_gib, "cluster.disk_gib", "cluster.disk_gib"
    elif config.run_dir.is_dir():
        free = shutil.disk_usage(config.run_dir).free / GIB
        where, name = f"free in {config.run_dir}", "checkpoint.keep_last"
    else:
        findings.notes.append(
            f"run.dir = {config.run.dir}: not here yet; its disk must hold {required:,.0f} GiB"
        )
        return
    if required > free:
        findings.problems.append(
            rule_broken(
                name,
                disk_gib if name == "cluster.disk_gib" else config.checkpoint.keep_last,
                f"{config.checkpoint.keep_last} checkpoints, one being written and the export take "
                f"{required:,.0f} GiB, and {free:,.0f} GiB are {where}",
                "lower checkpoint.keep_last, or take a larger disk",
            )
        )


def _check_data(config: Config, findings: Findings) -> None:
    for name, dataset in (("train", config.data.train), ("validation", config.data.validation)):
        if dataset is None:
            continue
        path = Path(dataset.path)
        if path.suffix in (".jsonl", ".parquet") and not path.is_file():
            findings.notes.append(f"data.{name}.path = {dataset.path}: not on this machine")
