"""Rules for a teacher that follows the student, shares its modules, or scores on servers."""

from __future__ import annotations

import json
import re
from typing import get_args

from nemo_trd.config.errors import rule_broken
from nemo_trd.config.schema import Config, EstimatorName


def check_moving_teacher(config: Config) -> None:
    """Rules for a teacher that follows the student."""
    ema = config.teacher.ema
    if ema is None:
        return
    if config.algorithm.mode != "opsd":
        raise rule_broken(
            "teacher.ema",
            ema,
            f"in algorithm.mode={config.algorithm.mode} the teacher is another model, and stays",
            "set it to null, or algorithm.mode=opsd",
        )
    servers = "the teacher's servers have the weights of the step-0 student, and get no others"
    if config.scores_on_servers:
        raise rule_broken(
            "teacher.scoring",
            config.teacher.scoring,
            f"with teacher.ema = {ema:g} the teacher's weights change, and {servers}",
            "set it to megatron, or teacher.ema=null",
        )
    if config.draws_rewrites and config.generation.vllm is not None:
        raise rule_broken(
            "generation.backend",
            config.generation.backend,
            f"with teacher.ema = {ema:g} the teacher that rewrites changes, and {servers}",
            "choose generation=local, algorithm.trajectory=rollout, or teacher.ema=null",
        )


def check_shared_modules(config: Config) -> None:
    """Rules for a teacher that is the student's own modules: what holds for one holds for both."""
    student, precision = config.parallel.student, config.precision
    setting = "student.adapter" if config.teacher.ema is None else "teacher.ema"
    shared = f"with {setting} the teacher of algorithm.mode=opsd is the student's own modules"
    for field, value in student.model_dump().items():
        other = getattr(config.parallel.teacher, field)
        if other != value:
            raise rule_broken(
                f"parallel.teacher.{field}",
                other,
                f"{shared}, so it is split as that is: parallel.student.{field} = {value}",
                f"set it to {json.dumps(value)}",
            )
    if precision.teacher_fp8 != precision.fp8:
        raise rule_broken(
            "precision.teacher_fp8",
            precision.teacher_fp8,
            f"{shared}, which compute with precision.fp8 = {precision.fp8}",
            f"set it to {json.dumps(precision.fp8)}",
        )
    if config.teacher.offload_weights:
        raise rule_broken(
            "teacher.offload_weights",
            True,
            f"{shared}: there is no second copy to put away",
            "set it to false",
        )


def check_server_scoring(config: Config) -> None:
    """Rules for a teacher on servers: its most likely tokens, at temperature 1."""
    generation, loss, megatron = config.generation, config.loss, "or teacher.scoring=megatron"
    scoring = config.teacher.scoring
    if generation.vllm is None:
        raise rule_broken(
            "teacher.scoring",
            scoring,
            f"vLLM servers score, and generation.backend={generation.backend} has none",
            f"choose generation=vllm, {megatron}",
        )
    if loss.top_k is None and loss.divergence not in get_args(EstimatorName):
        raise rule_broken(
            "loss.top_k",
            None,
            f"with teacher.scoring={scoring} only the teacher's most likely tokens are known",
            f"set how many, for example 64, {megatron}",
        )
    if loss.temperature != 1:
        raise rule_broken(
            "loss.temperature",
            loss.temperature,
            f"with teacher.scoring={scoring} log-probabilities are those at temperature 1",
            f"set it to 1, {megatron}",
        )
    arguments = generation.vllm.teacher.server.arguments
    limits = re.findall(r"--max[-_]logprobs[ =](\d+)", " ".join(arguments))
    top_k = loss.top_k or 1
    if limits and int(limits[-1]) < top_k:
        raise rule_broken(
            "generation.vllm.teacher.server.arguments",
            arguments,
            f"--max-logprobs must allow for loss.top_k = {top_k}",
            "leave it out: servers are started without a limit",
        )
    for field, value, off in (
        ("teacher.offload_weights", config.teacher.offload_weights, False),
        ("teacher.offload_states", config.teacher.offload_states, False),
        ("precision.teacher_fp8", config.precision.teacher_fp8, None),
    ):
        if value != off:
            raise rule_broken(
                field,
                value,
                f"with teacher.scoring={scoring} no teacher is held in Megatron",
                f"set it to {json.dumps(off)}, {megatron}",
            )


def check_scoring_by_generation(config: Config) -> None:
    """Rules for a teacher that is scored while it writes: it writes y_r, in c_T of the loss."""
    algorithm, refinement, server = config.algorithm, config.refinement, "or teacher.scoring=server"
    if not config.draws_rewrites:
        vanilla = algorithm.trajectory == "rollout"
        raise rule_broken(
            "algorithm.trajectory" if vanilla else "generation.stored",
            algorithm.trajectory if vanilla else "rollout and refinement",
            "with teacher.scoring=generation labels are scored while the teacher writes them, and "
            "here it writes nothing",
            f"set it to {'refinement' if vanilla else 'null'}, {server}",
        )
    if algorithm.teacher_context != "refine":
        raise rule_broken(
            "algorithm.teacher_context",
            algorithm.teacher_context,
            "with teacher.scoring=generation labels are scored in the context in which the teacher "
            "wrote them, the refinement prompt",
            f"set it to refine, {server}",
        )
    scored, written = config.teacher.chat_template_kwargs, refinement.chat_template_kwargs
    written = config.data.chat_template_kwargs if written is None else written
    if scored not in (None, written):
        raise rule_broken(
            "teacher.chat_template_kwargs",
            scored,
            "with teacher.scoring=generation labels are scored in the context in which the teacher "
            f"wrote them, and that has {json.dumps(written)}",
            f"set it to null, {server}",
        )
