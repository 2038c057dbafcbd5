"""Rules for generation servers: addresses, GPUs, drafts, weights, turns with the trainer."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from nemo_trd.config.errors import rule_broken
from nemo_trd.config.schema import SERVED_RANKS, Config, ServedPool, Speculation, Vllm, WeightSync

LONGEST_DRAFT = 128  # MAX_SPEC_LEN in vLLM's v1/sample/rejection_sampler.py


def address_of(url: str) -> tuple[str, int] | None:
    """(host, port) of http://HOST:PORT, the same for two spellings of it; None: malformed."""
    if not re.fullmatch(r"https?://[^/@?#\s]+", url):
        return None
    parts = urlsplit(url)
    try:
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except ValueError:
        return None
    host = (parts.hostname or "").rstrip(".")
    return ("localhost" if host in ("127.0.0.1", "0.0.0.0", "::1", "::") else host), port


def check_pool(field: str, pool: ServedPool) -> None:
    """Refuse servers that are named twice, or not at all, or for too few GPUs.

    Raises:
        ConfigError
    """
    gpus = pool.replicas * pool.server.tensor_parallel_size
    if pool.devices and len(set(pool.devices)) != gpus:
        raise rule_broken(
            f"{field}.devices",
            pool.devices,
            f"replicas x {field}.server.tensor_parallel_size = {gpus} GPUs are needed, each once",
            "give that many",
        )
    if bool(pool.urls) == bool(pool.replicas):
        raise rule_broken(
            f"{field}.urls",
            pool.urls,
            f"exactly one of urls and replicas (= {pool.replicas}) names the servers",
            f"set {field}.replicas=0 beside URLs of running servers, or urls=[]",
        )
    places = [address_of(url) for url in pool.urls]
    for url, place in zip(pool.urls, places, strict=True):
        if place is None or places.count(place) > 1:
            raise rule_broken(
                f"{field}.urls",
                url,
                "each server is given once, as http://HOST:PORT without a path or a password",
                "correct the list",
            )


def check_server_tp(config: Config, role: str) -> None:
    """The cluster's figure holds for servers of a node; another one must not be lost in silence.

    Raises:
        ConfigError
    """
    vllm, cluster = config.generation.vllm, config.cluster
    assert vllm is not None
    tp = cluster.student_server_tp if role == "student" else cluster.teacher_server_tp
    size = (vllm.student if role == "student" else vllm.teacher).server.tensor_parallel_size
    if size not in (1, tp):
        raise rule_broken(
            f"generation.vllm.{role}.server.tensor_parallel_size",
            size,
            f"on nodes of their own servers have cluster.{role}_server_tp = {tp} GPUs",
            f"set cluster.{role}_server_tp={size}",
        )


def check_drafts(field: str, drafts: Speculation | None) -> None:
    """Raises ConfigError: a draft is too long; settings of `method` are missing, or of another."""
    if drafts is None:
        return
    if drafts.tokens > LONGEST_DRAFT:
        raise rule_broken(
            f"{field}.tokens",
            drafts.tokens,
            f"vLLM checks no more than {LONGEST_DRAFT} tokens in one step",
            "lower it, for example to 5",
        )
    longest, shortest = drafts.lookup_max, drafts.lookup_min
    if drafts.method == "ngram" and longest is None:
        raise rule_broken(
            f"{field}.lookup_max",
            None,
            "method ngram looks up the last tokens",
            "set how many at most, for example 4",
        )
    if drafts.method == "suffix" and (longest, shortest) != (None, None):
        raise rule_broken(
            f"{field}.lookup_max",
            longest,
            "method suffix looks up as much as it finds",
            "set lookup_max and lookup_min to null",
        )
    if longest is not None and shortest is not None and shortest > longest:
        raise rule_broken(
            f"{field}.lookup_min", shortest, f"it may not exceed lookup_max = {longest}", "lower it"
        )


def check_colocated(config: Config) -> None:
    """Rules for servers and trainer that take turns on the same GPUs."""
    generation, vllm = config.generation, config.generation.vllm
    apart = "or generation.colocate=false"
    if vllm is None:
        raise rule_broken(
            "generation.colocate",
            True,
            f"servers share GPUs with the trainer, and backend {generation.backend} has none",
            f"choose generation=vllm, {apart}",
        )
    if generation.max_staleness:
        raise rule_broken(
            "generation.max_staleness",
            generation.max_staleness,
            "with generation.colocate servers sleep while the trainer computes",
            f"set it to 0, {apart}",
        )
    if vllm.weight_sync.backend == "nccl":
        raise rule_broken(
            "generation.vllm.weight_sync.backend",
            "nccl",
            "with generation.colocate trainer and server are on one GPU, and NCCL joins no two "
            "processes of one GPU",
            f"set it to gloo or file, {apart}",
        )
    for role, pool, asked in (
        ("student", vllm.student, config.asks_student),
        ("teacher", vllm.teacher, config.asks_teacher),
    ):
        if asked and pool.urls:
            raise rule_broken(
                f"generation.vllm.{role}.urls",
                pool.urls,
                "with generation.colocate the run starts the servers, on the GPUs of its ranks",
                f"set replicas and devices, {apart}",
            )
    stays = config.teacher.scoring == "megatron" and not config.teacher_is_student
    if stays and not config.teacher.offload_weights:
        raise rule_broken(
            "teacher.offload_weights",
            False,
            "with generation.colocate the teacher's weights give their memory to the servers, too",
            f"set it to true, or teacher.scoring=generation, {apart}",
        )


def check_servers(config: Config, vllm: Vllm) -> None:
    """Rules for what the trainer wants of its servers: weights, adapters, drafts, answers in time.

    Raises:
        ConfigError
    """
    _check_run_ahead(config.generation.max_staleness, vllm.weight_sync)
    _check_served_adapter(config, vllm)
    _check_servers_of_roles(config, vllm)
    call_limit = vllm.weight_sync.call_timeout_seconds
    if call_limit >= 60 * config.parallel.timeout_minutes:
        raise rule_broken(
            "generation.vllm.weight_sync.call_timeout_seconds",
            call_limit,
            "the other ranks wait for a server in a collective, and that for no longer than "
            f"parallel.timeout_minutes = {config.parallel.timeout_minutes:g}",
            "lower it, or raise parallel.timeout_minutes",
        )


def _check_run_ahead(staleness: int, sync: WeightSync) -> None:
    if staleness > 1 and sync.in_flight != "keep":
        raise rule_broken(
            "generation.vllm.weight_sync.in_flight",
            sync.in_flight,
            f"with generation.max_staleness = {staleness} servers write on while weights change",
            "set it to keep, or generation.max_staleness to 0 or 1",
        )


def _check_served_adapter(config: Config, vllm: Vllm) -> None:
    """Rules for what vLLM can add to the weights that it serves."""
    adapter, field = config.student.adapter, "generation.vllm.weight_sync.what"
    if vllm.weight_sync.what == "adapter" and adapter is None:
        raise rule_broken(
            field,
            "adapter",
            "student.adapter=null trains the weights themselves",
            "set it to merged, or student.adapter=lora",
        )
    served = config.served_adapter
    if served is not None and served.rank > SERVED_RANKS[-1]:
        raise rule_broken(
            "student.adapter.rank",
            served.rank,
            f"with {field}=adapter vLLM adds it to the weights, and takes ranks of up to "
            f"{SERVED_RANKS[-1]}",
            f"lower it, or set {field}=merged",
        )
    if config.teacher_on_student_servers:
        student, teacher = (pool.server.model_dump() for pool in (vllm.student, vllm.teacher))
        for name, value in teacher.items():
            if value != student[name]:
                raise rule_broken(
                    f"generation.vllm.teacher.server.{name}",
                    value,
                    "with generation.vllm.teacher.urls=[] and replicas=0 the student's servers "
                    f"answer for the teacher, and generation.vllm.student.server.{name} is "
                    f"{json.dumps(student[name])}",
                    f"set it to {json.dumps(student[name])}, or give servers of the teacher",
                )
    arguments = vllm.student.server.arguments
    own = [a for a in arguments if re.match(r"--(enable-lora|(max-)?lora-|max-(cpu-)?loras)", a)]
    if own:
        raise rule_broken(
            "generation.vllm.student.server.arguments",
            arguments,
            f"{own[0]} is among those that a student's server gets from {field}",
            "leave it out",
        )


def _check_servers_of_roles(config: Config, vllm: Vllm) -> None:
    """Rules for the student's servers beside the teacher's."""
    served = {address_of(url): url for url in vllm.student.urls}
    shared = [url for url in vllm.teacher.urls if address_of(url) in served]
    if shared and config.asks_teacher:
        raise rule_broken(
            "generation.vllm.teacher.urls",
            shared[0],
            f"generation.vllm.student.urls has the same server ({served[address_of(shared[0])]}), "
            "and that one is given the student's weights after every step",
            "give servers of the teacher alone",
        )
    _check_drafts(config, vllm)
    server = vllm.student.server
    quantized = [a for a in server.arguments if re.match(r"(--quantization|-q)(=|\s|$)", a)]
    if server.quantization is not None or quantized:
        raise rule_broken(
            "generation.vllm.student.server." + ("arguments" if quantized else "quantization"),
            server.arguments if quantized else server.quantization,
            "the student is given new weights after every step, and its rollouts must be samples "
            "of the model that is trained",
            "leave it out of arguments"
            if quantized
            else "set it to null for the student; generation.vllm.teacher.server may have it",
        )


def _check_drafts(config: Config, vllm: Vllm) -> None:
    """Rules for servers that check drafts."""
    if vllm.student.server.speculation is not None:
        raise rule_broken(
            "generation.vllm.student.server.speculation",
            vllm.student.server.speculation.model_dump(),
            "drafts are copied from the prompt, and a rollout copies next to nothing of it",
            "set it to null; generation.vllm.teacher.server may have it",
        )
    field = "generation.vllm.teacher.server.speculation"
    check_drafts(field, vllm.teacher.server.speculation)
    if vllm.teacher.server.speculation is not None and config.generation.refinement.min_p > 0:
        raise rule_broken(
            "generation.refinement.min_p",
            config.generation.refinement.min_p,
            f"vLLM does not take it from servers with drafts ({field})",
            f"set it to 0, or {field}=null",
        )


def visible_devices(devices: Sequence[int], field: str) -> list[str]:
    """Names of GPUs that are numbered as this process counts those that it sees.

    Raises:
        ConfigError: it does not see as many. `field` is the setting that has the numbers.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(map(str, devices))
    names = [name for name in visible.split(",") if name]
    if max(devices) >= len(names):
        raise rule_broken(
            field,
            list(devices),
            f"they are numbers, from 0 on, of the GPUs in CUDA_VISIBLE_DEVICES={visible}",
            "number those, or make more visible",
        )
    return [names[device] for device in devices]
