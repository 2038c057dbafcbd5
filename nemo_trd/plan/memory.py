"""Bytes on each GPU of a training job, by part, in the phase of a step that needs most.

Exact: parameters, gradients, main weights, Adam states. Formulas: activations (activations.py),
hidden states, loss workspace, key-value caches. Lengths are the longest that the settings allow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_trd.config.lengths import longest_answer, longest_trajectory
from nemo_trd.config.schema import Config, Layout
from nemo_trd.loss.divergences import chunk_size, logit_bytes
from nemo_trd.models.dtypes import ELEMENT_BYTES
from nemo_trd.models.family import (
    PackAlignment,
    dense_layers,
    is_sparse,
    pack_alignment,
    padded_vocab_size,
)
from nemo_trd.plan.activations import (
    adapter_activation_bytes,
    layer_activation_bytes,
    micro_batches_in_flight,
    own_tokens,
    working_set_bytes,
)
from nemo_trd.plan.shapes import (
    adapter_parameters,
    key_value_bytes,
    layers_of_stage,
    parameters,
    stage_adapter_parameters,
    stage_parameters,
)

GIB = 2**30


@dataclass(frozen=True)
class GpuMemory:
    """One kind of GPU of the training job: all that hold the same stages of both models."""

    ranks: tuple[int, ...]
    student_stage: int
    teacher_stage: int
    phases: dict[str, dict[str, int]]  # phase of the step -> part -> bytes

    def total_during(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.total_during)

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of each part in the phase that needs most."""
        return self.phases[self.peak_phase]

    @property
    def total(self) -> int:
        return self.total_during(self.peak_phase)


@dataclass(frozen=True)
class Lengths:
    """Largest numbers of tokens of one micro-batch, and of labels on one rank."""

    student_tokens: int  # of a micro-batch
    teacher_tokens: int
    labels: int  # of a micro-batch, on a rank of the student
    teacher_labels: int  # of a micro-batch, on a rank of the teacher
    student_rank_labels: int  # of all micro-batches, on a rank of the student


def training_memory(config: Config, student: Any, teacher: Any) -> list[GpuMemory]:
    """Memory of every kind of GPU, first stages first.

    `student` and `teacher` are their config.json, see `shapes.as_namespace`.
    """
    world = config.cluster.world_size
    lengths = longest_lengths(config)
    has_teacher = config.teacher.scoring == "megatron"
    sizes = (
        config.parallel.student.pipeline_model_parallel_size,
        config.parallel.teacher.pipeline_model_parallel_size if has_teacher else 1,
    )
    kinds: dict[tuple[int, int], list[int]] = {}
    for rank in range(world):  # Megatron's order: the pipeline stage varies slowest
        stages = (rank * sizes[0] // world, rank * sizes[1] // world)
        kinds.setdefault(stages, []).append(rank)
    generation = _generation_phases(config, student, teacher)
    memory = []
    for (student_stage, teacher_stage), ranks in kinds.items():
        held = _held(config, student, teacher, student_stage)
        resident: dict[str, int] = {}
        phases: dict[str, dict[str, int]] = {}
        if has_teacher:
            if not config.teacher_is_student:
                resident = _teacher_weights(config, teacher, teacher_stage)
            elif config.teacher.ema is not None:
                phases["teacher"] = _average_in_place(config, student, student_stage)
            at_work = _teacher_phase(config, teacher, student_stage, teacher_stage, lengths)
            phases["teacher"] = phases.get("teacher", {}) | resident | at_work
        phases |= {
            "student": _student_phase(config, student, teacher, student_stage, lengths),
            "export": {"export buffers": _export_bytes(config, student)},
            **save_phase(config, student, student_stage),
            **generation,
        }
        if not config.teacher.offload_weights:
            phases = {name: resident | phase for name, phase in phases.items()}
        phases = {name: held | phase for name, phase in phases.items()}
        memory.append(GpuMemory(tuple(ranks), student_stage, teacher_stage, phases))
    return memory


def longest_lengths(config: Config) -> Lengths:
    """The longest micro-batch: full, or of the longest sequences; aligned as the layouts need."""
    train, parallel = config.train, config.parallel
    answer = longest_answer(config)
    if train.micro_batch_size is not None:
        student_tokens = train.micro_batch_size * (config.data.max_prompt_tokens + answer)
        teacher_tokens = train.micro_batch_size * longest_trajectory(config)
        labels = train.micro_batch_size * answer
    else:
        assert train.max_tokens_per_micro_batch is not None
        student_tokens = teacher_tokens = train.max_tokens_per_micro_batch
        labels = min(student_tokens, train.trajectories_per_step * answer)
    student, teacher = alignments(config)
    student_tokens = _round_up(student_tokens, student.pack)
    teacher_tokens = _round_up(teacher_tokens, teacher.pack)
    return Lengths(
        student_tokens,
        teacher_tokens,
        min(labels, own_tokens(student_tokens, parallel.student)),
        min(labels, own_tokens(teacher_tokens, parallel.teacher)),
        _step_labels(config, student.segment),
    )


def _step_labels(config: Config, multiple: int) -> int:
    """Labels of a step on the context parallel rank of the student that holds most of them.

    Of 2 CP equal parts of a sequence rank r holds those at r from its beginning and from its end.
    """
    layout, context = config.parallel.student, config.data.max_prompt_tokens
    cp, answer = layout.context_parallel_size, longest_answer(config)
    part = _round_up(context + answer, multiple) // (2 * cp)

    def labels(number: int) -> int:
        begin, end = max(context, number * part), min(context + answer, (number + 1) * part)
        return max(0, end - begin)

    most = max(labels(r) + labels(2 * cp - 1 - r) for r in range(cp)) if cp > 1 else answer
    return trajectories_per_rank(config, layout) * most


def alignments(config: Config) -> tuple[PackAlignment, PackAlignment]:
    """Alignments of the packs of student and teacher."""
    parallel, precision = config.parallel, config.precision
    return (
        pack_alignment(parallel.student, precision.fp8, precision.fp8_recipe),
        pack_alignment(parallel.teacher, precision.teacher_fp8, precision.fp8_recipe),
    )


def trajectories_per_rank(config: Config, layout: Layout) -> int:
    """Trajectories of one step for each data parallel rank of a model."""
    return -(-config.train.trajectories_per_step // replicas(config, layout))


def replicas(config: Config, layout: Layout) -> int:
    """Return the data parallel size. A layout larger than the world counts as one replica."""
    return max(1, config.cluster.world_size // layout.model_parallel_size)


def same_weights(config: Config, layout: Layout) -> int:
    """Return the number of ranks that hold the same weights: data x context parallel size."""
    return replicas(config, layout) * layout.context_parallel_size


def same_experts(config: Config, layout: Layout) -> int:
    """Return the number of ranks that hold the same experts."""
    return max(1, config.cluster.world_size // layout.expert_holders)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def model_state_bytes(config: Config, student: Any, stage: int) -> dict[str, int]:
    """Bytes of weights, fp32 gradients, fp32 main weights and Adam's two moments on one rank.

    With an adapter all but the weights are of the adapter alone.
    The distributed optimizer shares the last two among the ranks with the same weights, up to
    padding.
    """
    layout, precision = config.parallel.student, config.precision
    trained = _trained_parts(config, student, stage)
    count = held = sum(part.count for part in trained)
    if config.student.adapter is not None:
        held += stage_parameters(student, layout)[stage].total
    main = 4 if precision.dtype == "bf16" else 0  # fp32 weights are their own main weights
    return {
        "weights": held * ELEMENT_BYTES[precision.dtype],
        "gradients": count * 4,
        "optimizer": sum(
            -(-part.count * (main + 8) // (part.holders if config.optimizer.distributed else 1))
            for part in trained
        ),
    }


@dataclass(frozen=True)
class TrainedParameters:
    """Number of parameters that one rank trains, and of ranks that hold the same ones."""

    count: int
    holders: int


def trained_parameters(config: Config, student: Any, stage: int) -> int:
    """Number of parameters that one rank of a stage trains."""
    return sum(part.count for part in _trained_parts(config, student, stage))


def _trained_parts(config: Config, student: Any, stage: int) -> list[TrainedParameters]:
    """What a rank of a stage trains: outside experts and, where ranks share these out, in them."""
    layout, adapter = config.parallel.student, config.student.adapter
    holders = same_weights(config, layout)
    if adapter is None:
        held = stage_parameters(student, layout)[stage]
    else:
        held = stage_adapter_parameters(student, layout, adapter)[stage]
    split = layout.expert_tensor_parallel_size, layout.expert_model_parallel_size
    if split == (layout.tensor_model_parallel_size, 1):  # as all the rest
        return [TrainedParameters(held.total, holders)]
    return [
        TrainedParameters(held.total - held.experts, holders),
        TrainedParameters(held.experts, same_experts(config, layout)),
    ]


def _held(config: Config, student: Any, teacher: Any, stage: int) -> dict[str, int]:
    """Bytes that stay from the first step to the last, by part."""
    layout, element = config.parallel.student, ELEMENT_BYTES[config.precision.dtype]
    held = model_state_bytes(config, student, stage)
    if config.precision.fp8 is not None:  # TransformerEngine keeps rows and columns, 1 B each
        held["fp8 copies"] = 2 * stage_parameters(student, layout)[stage].linear
    last = stage == layout.pipeline_model_parallel_size - 1
    if config.teacher.ema is not None:
        held["teacher average"] = 4 * trained_parameters(config, student, stage)
    # A frozen one is the student's too; of an average in fp32 it is a part.
    own = config.student.adapter is None and (config.teacher.ema is None or element != 4)
    shares = config.teacher_is_student and not own
    if last and config.teacher.scoring == "megatron" and not shares:
        rows = vocabulary_rows(student, layout)
        held["teacher output weight"] = rows * teacher.hidden_size * element
    if config.generation.backend == "local":
        element = ELEMENT_BYTES[config.generation.local.dtype]
        models = [student] * config.asks_student + [teacher] * config.draws_rewrites
        held["generation weights"] = sum(map(parameters, models)) * element
    held["reserved"] = round(config.cluster.reserved_gib * GIB)
    return held


def vocabulary_rows(hf: Any, layout: Layout) -> int:
    tp = layout.tensor_model_parallel_size
    return padded_vocab_size(hf.vocab_size, tp) // tp


def _teacher_weights(config: Config, teacher: Any, stage: int) -> dict[str, int]:
    count = stage_parameters(teacher, config.parallel.teacher)[stage]
    in_fp8 = count.linear if config.precision.teacher_fp8 is not None else 0
    element = ELEMENT_BYTES[config.precision.dtype]
    return {"teacher weights": (count.total - in_fp8) * element + in_fp8}


def _average_in_place(config: Config, student: Any, stage: int) -> dict[str, int]:
    """The average in the parameters' dtype, while the student computes with it as the teacher."""
    if config.precision.dtype == "fp32":
        return {}
    element = ELEMENT_BYTES[config.precision.dtype]
    return {"teacher weights": trained_parameters(config, student, stage) * element}


def _teacher_phase(
    config: Config, teacher: Any, student_stage: int, teacher_stage: int, lengths: Lengths
) -> dict[str, int]:
    """Forward only: one layer at a time. States are handed over as they are computed.

    Two micro-batches of them are on their way at a time; they gather on the student's last stage.
    """
    layout, element = config.parallel.teacher, ELEMENT_BYTES[config.precision.dtype]
    working = working_set_bytes(teacher, lengths.teacher_tokens, layout, element)
    phase = {"activations": working}
    sends = teacher_stage == layout.pipeline_model_parallel_size - 1
    keeps = student_stage == config.parallel.student.pipeline_model_parallel_size - 1
    if sends or keeps:
        labels = 2 * max(sends * lengths.teacher_labels, keeps * lengths.labels)
        if keeps and not config.teacher.offload_states:
            labels += lengths.student_rank_labels
        phase["hidden states"] = labels * teacher.hidden_size * element
    return phase


def _student_phase(
    config: Config, student: Any, teacher: Any, stage: int, lengths: Lengths
) -> dict[str, int]:
    layout, element = config.parallel.student, ELEMENT_BYTES[config.precision.dtype]
    phase = {"activations": activation_bytes(config, student, stage, lengths.student_tokens)}
    if stage == layout.pipeline_model_parallel_size - 1:
        if config.teacher.scoring == "megatron":
            offloaded = config.teacher.offload_states
            labels = lengths.labels if offloaded else lengths.student_rank_labels
            phase["hidden states"] = labels * teacher.hidden_size * element
        phase["loss workspace"] = loss_workspace_bytes(config, student, lengths)
    return phase


def activation_bytes(config: Config, hf: Any, stage: int, tokens: int) -> int:
    """Bytes kept for the backward passes in flight, and the working set of the layer at work."""
    layout, element = config.parallel.student, ELEMENT_BYTES[config.precision.dtype]
    recompute = config.train.recompute
    longest = min(tokens, longest_trajectory(config))
    layers = layers_of_stage(hf, layout, stage)
    kinds = Counter(is_sparse(hf, n) for n in layers)

    def layer(mode: str, sparse: bool) -> int:
        kept = layer_activation_bytes(
            hf, tokens, longest, layout, element, sparse=sparse, recompute=mode
        )
        if config.student.adapter is not None and mode != "full":
            number = next(n for n in layers if is_sparse(hf, n) == sparse)
            adapter = config.student.adapter
            kept += adapter_activation_bytes(hf, number, tokens, layout, element, adapter)
        return kept

    of_all = sum(count * layer(recompute, sparse) for sparse, count in kinds.items())
    kept = round(micro_batches_in_flight(layout, stage) * of_all)
    again = max(layer("none", sparse) for sparse in kinds) if recompute == "full" else 0
    return kept + again + working_set_bytes(hf, tokens, layout, element)


def loss_workspace_bytes(config: Config, student: Any, lengths: Lengths) -> int:
    """Largest number of bytes that `loss.fused` holds, with the label rows that go into it."""
    layout, element = config.parallel.student, ELEMENT_BYTES[config.precision.dtype]
    rows, hidden = vocabulary_rows(student, layout), student.hidden_size
    chunk = min(chunk_size(config.loss, rows, on_gpu=True), lengths.labels)
    logits = round(chunk * rows * logit_bytes(config.loss))
    logits += chunk * hidden * (element + 4) + lengths.labels * 80  # a chunk's rows; statistics
    # For megatron-core's hook of the output weight, when the logits are gone (megatron.loss_head).
    # With an adapter that weight stays as it is.
    empty_gradient = rows * hidden * element if config.student.adapter is None else 0
    tokens = own_tokens(lengths.student_tokens, layout)
    gathered = 2 * tokens * hidden * element  # hidden states and their gradient
    label_rows = 2 * lengths.labels * hidden * element
    return max(logits, empty_gradient) + gathered + label_rows


def _export_bytes(config: Config, student: Any) -> int:
    """Bytes of the largest tensor: its slices, the whole, and a copy without padding."""
    element = ELEMENT_BYTES[config.precision.dtype]
    largest = max(
        padded_vocab_size(student.vocab_size, config.parallel.student.tensor_model_parallel_size),
        student.intermediate_size if dense_layers(student) else 0,
    )
    return 3 * largest * student.hidden_size * element


def save_phase(config: Config, student: Any, stage: int) -> dict[str, dict[str, int]]:
    """What megatron-core gathers over ranks with the same weights to save a distributed optimizer.

    `DistributedOptimizer.get_parameter_state_dp_zero` brings main weights, means and variances one
    after the other to every rank's GPU: this rank's share, and all shares. In a pipeline it may be
    less at a time. Experts have buffers of their own, and their turn after the others.
    """
    if not config.optimizer.distributed:
        return {}
    trained = _trained_parts(config, student, stage)
    most = max(part.count - (-part.count // part.holders) for part in trained)
    return {"checkpoint": {"gathered optimizer state": 4 * most}}


def _generation_phases(config: Config, student: Any, teacher: Any) -> dict[str, dict[str, int]]:
    """The caches of in-process generation; servers have GPUs of their own."""
    if config.generation.backend != "local":
        return {}
    phases = {}
    for role, hf, context, answer in generations(config, student, teacher):
        batch = config.generation.local.batch_size
        element = ELEMENT_BYTES[config.generation.local.dtype]
        cache = batch * (context + answer) * key_value_bytes(hf, element)
        phases[role] = {"KV cache": cache, "logits": batch * hf.vocab_size * 4}
    return phases


def generations(config: Config, student: Any, teacher: Any) -> list[tuple[str, Any, int, int]]:
    """(purpose, shape, longest context, longest answer) of each generation in a step."""
    if config.generation.stored is not None:
        return []
    purposes = [
        ("rollout", student, config.data.max_prompt_tokens, config.generation.rollout.max_tokens)
    ]
    if config.algorithm.trajectory == "refinement":
        context = config.refinement.max_context_tokens
        purposes.append(("refinement", teacher, context, config.generation.refinement.max_tokens))
    return purposes


def checkpoint_bytes(config: Config, student: Any) -> dict[str, int]:
    """Bytes on disk: one checkpoint (weights, main weights, Adam states, the average of
    `teacher.ema`), and the exports.

    With an adapter a checkpoint has that instead of the weights.
    """
    whole, adapter = parameters(student), config.student.adapter
    count, element = whole, ELEMENT_BYTES[config.precision.dtype]
    if adapter is not None:
        count = adapter_parameters(student, adapter)
    main = 4 if config.precision.dtype == "bf16" else 0
    export = count * element if config.checkpoint.export_hf else 0
    export += whole * element if config.checkpoint.export_merged else 0
    average = 0 if config.teacher.ema is None else 4
    return {"checkpoint": count * (element + main + 8 + average), "export": export}


def largest_part(parts: Mapping[str, int]) -> str:
    return max(parts, key=lambda part: parts[part])
