"""Estimates FLOPs and seconds of a step under stated assumptions, and the best split of nodes.

Multiplications and additions count one each. Lengths are mean lengths: the longest allowed times
`cluster.assumptions.mean_length`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from nemo_trd.config.lengths import longest_answer, longest_trajectory
from nemo_trd.config.schema import Cluster, Config, Layout
from nemo_trd.loss.divergences import DIVERGENCES, chunk_size
from nemo_trd.models.dtypes import ELEMENT_BYTES
from nemo_trd.models.flops import forward_flops
from nemo_trd.plan.context_parallel import rings
from nemo_trd.plan.expert_exchange import expert_exchanges
from nemo_trd.plan.memory import GIB, generations, trajectories_per_rank, vocabulary_rows
from nemo_trd.plan.shapes import (
    active_adapter_parameters,
    adapter_parameters,
    key_value_bytes,
    parameters,
    touched_parameters,
)

GIGA, TERA = 1e9, 1e12
Role = Literal["student", "teacher"]


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step, all GPUs together."""

    student: float  # forward, backward and recomputation
    teacher: float  # forward
    loss: float  # logits of both models and the gradients of the student's


def step_flops(config: Config, student: Any, teacher: Any) -> StepFlops:
    """Estimate the FLOPs of a step at mean lengths; models are Hugging Face configs."""
    mean = config.cluster.assumptions.mean_length
    count = config.train.trajectories_per_step
    labels = mean * longest_answer(config)
    student_length = mean * config.data.max_prompt_tokens + labels
    teacher_length = mean * (longest_trajectory(config) - longest_answer(config)) + labels
    passes = 4 if config.train.recompute == "full" else 3
    trained = passes * forward_flops(student, student_length, (student_length + 1) / 2, logits=0)
    if config.student.adapter is not None:
        met = active_adapter_parameters(student, config.student.adapter)
        matrices = 2 * met * student_length
        weights = forward_flops(student, student_length, 0, logits=0)  # they have no gradient
        trained += passes * matrices - weights
    return StepFlops(
        student=count * trained,
        teacher=count * forward_flops(teacher, teacher_length, (teacher_length + 1) / 2, logits=0),
        loss=count
        * labels
        * 2
        * (passes_of_head(config) * student.hidden_size + teacher.hidden_size)
        * min(student.vocab_size, teacher.vocab_size),
    )


def passes_of_head(config: Config) -> int:
    """Products of the loss with the student's output weight: logits, and the gradients of both."""
    return 3 if config.student.adapter is None else 2


@dataclass(frozen=True)
class StepTime:
    """Seconds of each part of one step."""

    rollout: float
    refinement: float
    longest: float  # the longest rollout and its rewrite, which comes after it
    teacher: float
    student: float  # with the loss
    streamed: bool  # on servers: each rollout is rewritten while others are still drawn
    overlap: bool  # generation.max_staleness 1: generation beside the training of the last step

    @property
    def generation(self) -> float:
        """Seconds of generation."""
        if self.streamed:
            return max(self.rollout, self.refinement, self.longest)
        return self.rollout + self.refinement

    @property
    def training(self) -> float:
        """Seconds of training: teacher and student."""
        return self.teacher + self.student

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        if self.overlap:
            return max(self.generation, self.training)
        return self.generation + self.training


def step_time(config: Config, student: Any, teacher: Any) -> StepTime:
    """Estimate a step under `cluster.assumptions`, without weight sync and checkpoints."""
    flops = step_flops(config, student, teacher)
    world = config.cluster.world_size
    rate, teacher_rate = (training_rate(config, fp8) for fp8 in _in_fp8(config))
    ring = rings(config, student, teacher, training_rate(config, False))
    sent = expert_exchanges(config, student, teacher)
    loss = loss_seconds(config, student, teacher)
    generating = {
        role: generation_time(config, role, hf, context, completion)
        for role, hf, context, completion in generations(config, student, teacher)
    }
    seconds = {role: time.all for role, time in generating.items()}
    if config.teacher.scoring == "megatron":
        teacher_time = flops.teacher / (world * teacher_rate) + ring["teacher"].waiting
        teacher_time += sent["teacher"].seconds
        teacher_time *= bubble(config, "teacher")
    elif config.teacher.scoring == "generation":
        teacher_time = 0.0  # its servers score while they write
    else:
        teacher_servers = servers(config, "refinement", teacher)
        gpus = teacher_servers.count * teacher_servers.tp
        teacher_time = flops.teacher / (gpus * training_rate(config, False)) if gpus else math.inf
    student_time = flops.student / (world * rate) + ring["student"].waiting + loss
    student_time += sent["student"].seconds
    return StepTime(
        rollout=seconds.get("rollout", 0.0),
        refinement=seconds.get("refinement", 0.0),
        longest=sum(time.longest for time in generating.values()),
        teacher=teacher_time,
        student=student_time * bubble(config, "student"),
        streamed=config.generation.vllm is not None and not config.teacher_on_student_servers,
        overlap=config.generation.max_staleness > 0,
    )


def _in_fp8(config: Config) -> tuple[bool, bool]:
    """Whether student and teacher multiply in FP8."""
    return config.precision.fp8 is not None, config.precision.teacher_fp8 is not None


def loss_seconds(config: Config, student: Any, teacher: Any) -> float:
    """Seconds of the loss of one step, in bf16; the last stages compute it, the others wait.

    Its four matrix products at the training rate, but the one of the weight's gradient no faster
    than memory, from which each chunk reads the fp32 sum and to which it writes it; and what the
    comparison of both models moves.
    """
    layout, assumptions = config.parallel.student, config.cluster.assumptions
    gpus = config.cluster.world_size / layout.pipeline_model_parallel_size
    labels = config.train.trajectories_per_step * assumptions.mean_length * longest_answer(config)
    vocabulary = min(student.vocab_size, teacher.vocab_size)
    rate = training_rate(config, False)
    bandwidth = assumptions.memory_bandwidth_tb * TERA * assumptions.memory_utilization
    chunk = chunk_size(config.loss, vocabulary_rows(student, layout), on_gpu=True)
    hidden = student.hidden_size
    products = 2 * (2 * hidden + teacher.hidden_size) / rate
    weight_gradient = max(2 * hidden / rate, 8 * hidden / (chunk * bandwidth))
    weight_gradient *= passes_of_head(config) - 2  # none below an adapter
    compared = DIVERGENCES[config.loss.divergence].moved / bandwidth
    return labels / gpus * vocabulary * (products + weight_gradient + compared)


def training_rate(config: Config, fp8: bool) -> float:
    """FLOP/s of one GPU."""
    assumptions = config.cluster.assumptions
    if fp8:
        return assumptions.fp8_tflops * assumptions.fp8_mfu * TERA
    return assumptions.bf16_tflops * assumptions.mfu * TERA


def micro_batches(config: Config, role: Role) -> int:
    """Number of packs that one data parallel rank of a model computes in a step, at mean lengths.

    As `algorithm.micro_batches.plan` fills them: by the longer sequence of a trajectory, but those
    of a student whose stages interleave by its own, and a multiple of its stages in number.
    """
    train, mean = config.train, config.cluster.assumptions.mean_length
    layout = layout_of(config, role)
    interleaved = layout.virtual_pipeline_model_parallel_size is not None  # the student's only
    longest = longest_trajectory(config)
    if interleaved:
        longest = config.data.max_prompt_tokens + longest_answer(config)
    per_batch = train.micro_batch_size
    if per_batch is None:
        assert train.max_tokens_per_micro_batch is not None
        per_batch = max(1, int(train.max_tokens_per_micro_batch // (mean * longest)))
    count = -(-trajectories_per_rank(config, layout) // per_batch)
    unit = layout.pipeline_model_parallel_size if interleaved else 1
    return -(-count // unit) * unit


def layout_of(config: Config, role: Role) -> Layout:
    """Return the layout of student or teacher."""
    return config.parallel.student if role == "student" else config.parallel.teacher


def bubble(config: Config, role: Role) -> float:
    """Factor by which filling and draining the pipeline lengthen a pass (Narayanan et al. 2021)."""
    layout = layout_of(config, role)
    pp = layout.pipeline_model_parallel_size
    virtual = layout.virtual_pipeline_model_parallel_size or 1
    return 1 + (pp - 1) / (virtual * micro_batches(config, role))


@dataclass(frozen=True)
class Servers:
    """Replicas that generate with one model: `count` of them, on `tp` GPUs each."""

    count: int
    tp: int
    element: int  # bytes of one weight
    cache_element: int  # bytes of one key or value
    sequences: int  # largest number that one replica works on at one time
    cache_bytes: float  # for keys and values, all GPUs of a replica together


def servers(config: Config, role: str, hf: Any) -> Servers:
    """Replicas that generate for a role, "rollout" or "refinement"."""
    cluster, vllm = config.cluster, config.generation.vllm
    role = _pool_of(config, role)
    count, tp = replicas_and_tp(config, role)
    if vllm is None:
        local = config.generation.local
        element = ELEMENT_BYTES[local.dtype]
        return Servers(count, tp, element, element, local.batch_size, math.inf)
    pool = vllm.student if role == "rollout" else vllm.teacher
    element = 1 if pool.server.quantization == "fp8" else 2
    memory = tp * (cluster.gpu_memory_gib - cluster.reserved_gib) * GIB - parameters(hf) * element
    return Servers(count, tp, element, 2, pool.server.max_num_seqs, memory)


def _pool_of(config: Config, role: str) -> str:
    """The role whose servers answer for `role`."""
    return "rollout" if config.teacher_on_student_servers else role


def replicas_and_tp(config: Config, role: str) -> tuple[int, int]:
    """(replicas, GPUs of one) for rollouts or refinements.

    In-process, every rank is one. Otherwise they are on the nodes set aside for them, or, where
    there are none, the servers that the run starts itself.
    """
    cluster, vllm = config.cluster, config.generation.vllm
    if vllm is None:
        return cluster.world_size, 1
    nodes, tp = server_nodes(cluster, role)
    pool = vllm.student if role == "rollout" else vllm.teacher
    if nodes == 0:
        return pool.replicas, pool.server.tensor_parallel_size
    return nodes * cluster.gpus_per_node // tp, tp


def server_nodes(cluster: Cluster, role: str) -> tuple[int, int]:
    """(nodes set aside, GPUs of one server) for rollouts or refinements."""
    if role == "rollout":
        return cluster.student_server_nodes, cluster.student_server_tp
    return cluster.teacher_server_nodes, cluster.teacher_server_tp


def concurrent_sequences(hf: Any, replica: Servers, length: float) -> int:
    """Number of sequences of `length` tokens that one replica holds at one time."""
    fitting = replica.cache_bytes / (length * key_value_bytes(hf, replica.cache_element))
    return max(0, int(min(replica.sequences, fitting)))


@dataclass(frozen=True)
class GenerationTime:
    """Seconds to generate the rollouts or refinements of one step."""

    all: float
    longest: float  # the longest one of them, beside the others


def generation_time(
    config: Config, role: str, hf: Any, context: int, completion: int
) -> GenerationTime:
    """Estimate the seconds to generate the rollouts or refinements of one step.

    Decoding reads all weights once for each token of the longest completion of a batch, of experts
    those that the batch draws, and every sequence's keys and values once for each of its tokens;
    both at the assumed share of the memory bandwidth. Drafts that are accepted save passes over the
    weights. Prompts are read at the training rate. Infinite without servers.
    """
    assumptions, role_servers = config.cluster.assumptions, servers(config, role, hf)
    if role_servers.count == 0:
        return GenerationTime(math.inf, math.inf)
    count, mean = config.train.trajectories_per_step, assumptions.mean_length
    measured = (
        assumptions.student_tokens_per_second
        if role == "rollout"
        else assumptions.teacher_tokens_per_second
    )
    gpus = role_servers.count * role_servers.tp
    if measured is not None:
        seconds = count * mean * completion / (measured * gpus)
        return GenerationTime(seconds, 0.0)  # nobody has measured the longest one
    per_replica = -(-count // role_servers.count)
    mean_position = mean * (context + completion / 2)
    at_once = concurrent_sequences(hf, role_servers, mean * (context + completion))
    if at_once == 0:
        return GenerationTime(math.inf, math.inf)
    batches = -(-per_replica // at_once)
    passes = completion / tokens_per_pass(config, role)
    drawn = touched_parameters(hf, min(per_replica, at_once))
    bytes_read = batches * passes * drawn * role_servers.element
    bytes_read += (
        per_replica
        * mean
        * completion
        * mean_position
        * key_value_bytes(hf, role_servers.cache_element)
    )
    bandwidth = (
        role_servers.tp * assumptions.memory_bandwidth_tb * TERA * assumptions.memory_utilization
    )
    length = mean * context
    prefill = count * forward_flops(hf, length, (length + 1) / 2, logits=1)
    prefill_seconds = prefill / (gpus * training_rate(config, False))
    decoding = bytes_read / bandwidth
    return GenerationTime(decoding + prefill_seconds, decoding / batches)


@dataclass(frozen=True)
class WeightSync:
    """What brings the student's weights to its servers after a step."""

    bytes: int  # to each of them
    servers: int
    seconds: float  # to all of them, through the network adapter of the rank that sends


def weight_sync(config: Config, student: Any) -> WeightSync | None:
    """Estimate one weight sync; None where no servers sample."""
    if config.generation.vllm is None or not config.asks_student:
        return None
    adapter = config.served_adapter
    sent = parameters(student) if adapter is None else adapter_parameters(student, adapter)
    size = sent * ELEMENT_BYTES[config.precision.dtype]
    count, _ = replicas_and_tp(config, "rollout")
    seconds = count * size / (config.cluster.assumptions.network_gb * GIGA)
    return WeightSync(size, count, seconds)


def tokens_per_pass(config: Config, role: str) -> float:
    """Tokens of a sequence that a server writes in one pass over the weights."""
    vllm = config.generation.vllm
    drafts = vllm is not None and role == "refinement" and vllm.teacher.server.speculation
    return config.cluster.assumptions.tokens_per_decode_step if drafts else 1.0


@dataclass(frozen=True)
class Split:
    """Number of nodes for each purpose, and the step's time with them."""

    training: int
    student_servers: int
    teacher_servers: int
    time: StepTime


def split_of(config: Config, student: Any, teacher: Any) -> Split:
    """Split of nodes that the settings have, with the time of its step."""
    cluster = config.cluster
    return Split(
        cluster.training_nodes,
        cluster.student_server_nodes,
        cluster.teacher_server_nodes,
        step_time(config, student, teacher),
    )


def with_nodes(config: Config, training: int, student: int, teacher: int) -> Config:
    """Copy of the settings with other numbers of nodes."""
    nodes = {
        "training_nodes": training,
        "student_server_nodes": student,
        "teacher_server_nodes": teacher,
    }
    return config.model_copy(update={"cluster": config.cluster.model_copy(update=nodes)})


def possible_splits(config: Config) -> Iterator[Config]:
    """Yield every division of the same nodes in which both layouts and every server find room.

    None where samples are stored: then all nodes may train.
    """
    if config.generation.stored is not None:
        return
    cluster = config.cluster
    total = cluster.training_nodes + cluster.student_server_nodes + cluster.teacher_server_nodes
    has_refinements = config.asks_teacher and not config.teacher_on_student_servers
    layouts = [config.parallel.student]
    if config.teacher.scoring == "megatron":
        layouts.append(config.parallel.teacher)
    for training in range(1, total):
        for student in range(1, total - training + 1):
            teacher = total - training - student
            if has_refinements == (teacher == 0):
                continue
            other = with_nodes(config, training, student, teacher)
            if not all(layout.divides(other.cluster.world_size) for layout in layouts):
                continue
            roles = [("rollout", student)] + ([("refinement", teacher)] if has_refinements else [])
            if all(
                nodes * cluster.gpus_per_node >= server_nodes(cluster, role)[1]
                for role, nodes in roles
            ):
                yield other


MOST_NODES = 64


@dataclass(frozen=True)
class Evening:
    """Fewest server nodes with which generation takes no longer than training."""

    student_servers: int
    teacher_servers: int
    possible: bool  # False: not even with these, `MOST_NODES` for each
    generation: float  # seconds with them


def evening_servers(config: Config, student: Any, teacher: Any) -> Evening:
    """Find the server nodes with which generation takes no longer than training does now."""
    cluster = config.cluster
    training = step_time(config, student, teacher).training
    nothing = GenerationTime(0.0, 0.0)
    options: dict[str, list[tuple[int, GenerationTime]]] = {
        "refinement": [(int(config.asks_teacher), nothing)]
    }
    for role, hf, context, completion in generations(config, student, teacher):
        options[role] = [
            (
                n,
                generation_time(
                    with_nodes(config, cluster.training_nodes, n, n), role, hf, context, completion
                ),
            )
            for n in range(1, MOST_NODES + 1)
        ]
    pairs = []
    for n, rollout in options["rollout"]:
        for m, refinement in options["refinement"]:
            longest = rollout.longest + refinement.longest
            seconds = max(rollout.all, refinement.all, longest)
            pairs.append(Evening(n, m, seconds <= training, seconds))
    enough = [pair for pair in pairs if pair.possible]
    if not enough:
        return min(pairs, key=lambda pair: pair.generation)
    return min(enough, key=lambda p: (p.student_servers + p.teacher_servers, p.generation))
