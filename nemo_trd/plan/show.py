"""Shows a plan as text and as JSON."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from nemo_trd.models.family import experts_of
from nemo_trd.plan.advice import capacity, peak
from nemo_trd.plan.context_parallel import rings
from nemo_trd.plan.cost import (
    Split,
    StepTime,
    concurrent_sequences,
    micro_batches,
    servers,
    training_rate,
    weight_sync,
)
from nemo_trd.plan.expert_exchange import expert_exchanges
from nemo_trd.plan.memory import (
    GIB,
    GpuMemory,
    alignments,
    checkpoint_bytes,
    generations,
    largest_part,
    longest_lengths,
    replicas,
)
from nemo_trd.plan.shapes import (
    adapter_parameters,
    has_shape,
    key_value_bytes,
    parameters,
    touched_parameters,
)

if TYPE_CHECKING:
    from nemo_trd.plan.plan import Plan

ABOUT_AS_LONG = 1.5  # times as long, at most

PARTS = (  # in the order in which they are shown
    "weights",
    "gradients",
    "optimizer",
    "fp8 copies",
    "teacher weights",
    "teacher output weight",
    "activations",
    "hidden states",
    "loss workspace",
    "generation weights",
    "KV cache",
    "logits",
    "export buffers",
    "gathered optimizer state",
    "reserved",
)
SAVINGS = 3  # that are shown
PHASES = {
    "teacher": "teacher pass",
    "student": "student step",
    "export": "weight export",
    "checkpoint": "checkpoint",
    "rollout": "rollouts",
    "refinement": "refinements",
}


def text(plan: Plan) -> str:
    """Text that `python -m nemo_trd.plan` prints."""
    blocks = [_setup(plan)]
    if plan.memory:
        blocks += [_memory(plan), _verdict(plan), _servers(plan)]
        blocks += [_time(plan)] if plan.flops is not None else []
        blocks.append(_disk(plan))
    if plan.findings.notes:
        notes = (f"  {note}" for note in plan.findings.notes)
        blocks.append("\n".join(["Not checked on this machine", *notes]))
    count = len(plan.findings.problems)
    if count:
        blocks.append(f"{count} setting{'s' if count > 1 else ''} cannot work (see below).")
    return "\n\n".join(block for block in blocks if block)


def _setup(plan: Plan) -> str:
    config, cluster = plan.config, plan.config.cluster
    lines = ["Run"]
    for role, model in (("student", plan.student), ("teacher", plan.teacher)):
        if model is None:
            continue
        size = str(getattr(model.hf, "model_type", ""))
        if has_shape(model.hf):
            size = f"{parameters(model.hf) / 1e9:.2f} B parameters"
            if experts_of(model.hf) is not None:
                size += f", {touched_parameters(model.hf, 1) / 1e9:.2f} B active"
        if role == "teacher" and config.teacher_is_student:
            other = "without the adapter" if config.teacher.ema is None else "averaged over steps"
            lines.append(f"  {role:<8} the student's own weights, {other}")
            continue
        if role == "student" and (adapter := config.student.adapter) is not None:
            trained = adapter_parameters(model.hf, adapter)
            size += f", of an adapter of rank {adapter.rank} {trained / 1e6:.2f} M are trained"
        heading = f"  {role:<8} {model.directory.name}  {size}  "
        if role == "teacher" and config.scores_on_servers:
            told = f"top {config.loss.top_k}" if config.loss.top_k else "the label alone"
            lines.append(f"{heading}on its servers only, {told}")
            continue
        layout = getattr(config.parallel, role)
        fp8 = config.precision.fp8 if role == "student" else config.precision.teacher_fp8
        lines.append(
            f"{heading}TP {layout.tensor_model_parallel_size}  "
            + (f"CP {cp}  " if (cp := layout.context_parallel_size) > 1 else "")
            + f"PP {layout.pipeline_model_parallel_size}"
            + (f"  EP {ep}" if (ep := layout.expert_model_parallel_size) > 1 else "")
            + (f"  ETP {etp}" if (etp := layout.expert_tensor_parallel_size) > 1 else "")
            + (f"  VPP {v}" if (v := layout.virtual_pipeline_model_parallel_size) else "")
            + f"  DP {replicas(config, layout)}  {config.precision.dtype}"
            + (f" + FP8 {fp8}" if fp8 else "")
        )
    lengths = longest_lengths(config)
    student, teacher = alignments(config)
    interleaved = config.parallel.student.virtual_pipeline_model_parallel_size is not None
    one_length = ", the student's of a step to one length" if interleaved else ""
    lines += [
        f"  nodes    {cluster.training_nodes} training, {cluster.student_server_nodes} student "
        f"servers, {cluster.teacher_server_nodes} teacher servers, {cluster.gpus_per_node} GPUs of "
        f"{cluster.gpu_memory_gib:g} GiB each",
        f"  step     {config.train.trajectories_per_step} trajectories; micro-batches of up to "
        f"{max(lengths.student_tokens, lengths.teacher_tokens):,} tokens, filled up to "
        f"multiples of {student.pack} (teacher {teacher.pack}){one_length}; recompute "
        f"{config.train.recompute}",
    ]
    return "\n".join(lines)


def _memory(plan: Plan) -> str:
    """Table in GiB: one column a kind of GPU, one line a part while the student trains."""
    students = [gpu.phases["student"] for gpu in plan.memory]
    part_names = [part for part in PARTS if any(parts.get(part) for parts in students)]
    rows = [
        ["student stage", *(str(gpu.student_stage) for gpu in plan.memory)],
        ["teacher stage", *(str(gpu.teacher_stage) for gpu in plan.memory)],
        ["GPUs", *(str(len(gpu.ranks)) for gpu in plan.memory)],
        *([part, *(_gib(parts.get(part, 0)) for parts in students)] for part in part_names),
        *(
            [f"total, {PHASES[phase]}", *(_gib(gpu.total_during(phase)) for gpu in plan.memory)]
            for phase in plan.memory[0].phases
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["Memory of a training GPU at the longest lengths, GiB"]
    for name, *values in rows:
        cells = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
        lines.append(f"  {name.ljust(widths[0])}  " + "  ".join(cells))
    return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size else "-"


def _verdict(plan: Plan) -> str:
    fullest = peak(plan.memory)
    largest, limit = largest_part(fullest.parts), capacity(plan.config)
    lines = []
    if plan.fallback is not None:
        lines.append(
            f"The layouts do not divide {plan.config.cluster.world_size} GPUs. Computed instead: "
            + ", ".join(
                f"parallel.{role} TP {layout.tensor_model_parallel_size} "
                f"CP {layout.context_parallel_size} PP {layout.pipeline_model_parallel_size}"
                + (f" EP {ep}" if (ep := layout.expert_model_parallel_size) > 1 else "")
                for role, layout in (
                    ("student", plan.fallback.parallel.student),
                    ("teacher", plan.fallback.parallel.teacher),
                )
            )
        )
    lines.append(
        f"{'Fits' if plan.fits else 'DOES NOT FIT'}: {fullest.total / GIB:.1f} of "
        f"{limit / GIB:.1f} GiB ({PHASES[fullest.peak_phase]}); the largest item is {largest}, "
        f"{fullest.parts[largest] / GIB:.1f} GiB"
    )
    advice = plan.advice
    if advice is not None and advice.fits:
        lines.append(f"It fits with {' '.join(advice.overrides)} ({advice.peak / GIB:.1f} GiB)")
    elif advice is not None:
        lines.append(
            f"Nearest to fitting: {' '.join(advice.overrides)} ({advice.peak / GIB:.1f} GiB)"
        )
    return "\n".join(lines)


def _servers(plan: Plan) -> str:
    assert plan.student is not None and plan.teacher is not None
    config = plan.config
    lines = ["Generation"]
    for role, hf, context, completion in generations(config, plan.student.hf, plan.teacher.hf):
        if not has_shape(hf):
            continue
        pool = servers(config, role, hf)
        cache = (context + completion) * key_value_bytes(hf, pool.cache_element)
        at_once = concurrent_sequences(hf, pool, context + completion)
        lines.append(
            f"  {role:<10} {pool.count} x TP {pool.tp}; a sequence of "
            f"{context + completion:,} tokens has {cache / GIB:.2f} GiB of keys and values; "
            f"{at_once} of them at once in each"
            + (f" ({pool.cache_bytes / GIB:.0f} GiB)" if math.isfinite(pool.cache_bytes) else "")
        )
    sync = weight_sync(config, plan.student.hf)
    if sync is not None:
        what = "all weights" if config.served_adapter is None else "the adapter"
        lines.append(
            f"  sync       {what}, {sync.bytes / GIB:.2f} GiB to each of {sync.servers} servers "
            f"after a step: {_seconds(sync.seconds)}"
        )
    return "\n".join(lines)


def _time(plan: Plan) -> str:
    assert plan.flops is not None and plan.split is not None
    flops, time, assumed = plan.flops, plan.split.time, plan.config.cluster.assumptions
    micro_batch_count = micro_batches(plan.config, "student")
    lines = [
        "One step, estimated",
        f"  FLOPs      student {flops.student:.2e}, teacher {flops.teacher:.2e}, "
        f"loss {flops.loss:.2e}",
        f"  generation {_generation(time)}",
        f"  training   {_seconds(time.training)}: teacher {_seconds(time.teacher)}, student "
        f"{_seconds(time.student)} in {micro_batch_count} micro-batches a rank",
        f"  generation : training = {time.generation / time.training:.2f}; step "
        f"{_seconds(time.total)}, as they "
        + ("overlap" if time.overlap else "take turns (generation.max_staleness=0)"),
    ]
    lines += _exchange(plan)
    generation = plan.config.generation
    if generation.vllm is not None and generation.stored is None and not generation.colocate:
        lines.append(f"  {_further_ahead(time)}")
    if plan.fastest is not None and plan.evenest is not None:
        lines.append(f"  fastest split of these nodes: {_split(plan.fastest)}")
        if plan.evenest != plan.fastest:
            lines.append(f"  evenest split of these nodes: {_split(plan.evenest)}")
    if plan.evening is not None:
        lines.append(f"  {_evening(plan)}")
    lines += [
        f"  {'saves' if i else 'saves most'}: {' '.join(saving.overrides)} "
        f"(step {_seconds(saving.seconds)})"
        for i, saving in enumerate(plan.savings[:SAVINGS])
    ]
    lines.append(
        f"  Assumed: MFU {assumed.mfu:g} of {assumed.bf16_tflops:g} TFLOP/s (FP8 "
        f"{assumed.fp8_mfu:g} of {assumed.fp8_tflops:g}); mean lengths "
        f"{assumed.mean_length:g} of the longest; decoding at {assumed.memory_utilization:g} of "
        f"{assumed.memory_bandwidth_tb:g} TB/s"
    )
    for role in ("student", "teacher"):
        measured = getattr(assumed, f"{role}_tokens_per_second")
        if measured is not None:
            lines.append(f"  Measured: {measured:g} tokens/s a GPU of the {role}'s servers")
    return "\n".join(lines)


def _generation(time: StepTime) -> str:
    """Seconds of generation and of its parts; with servers also those of two phases."""
    parts = f"rollouts {_seconds(time.rollout)}, refinements {_seconds(time.refinement)}"
    if not time.streamed:
        return f"{_seconds(time.generation)}: {parts}"
    return (
        f"{_seconds(time.generation)}, as rollouts are rewritten while others are drawn: {parts}, "
        f"the longest of both, one after the other, {_seconds(time.longest)}; in two phases "
        f"{_seconds(time.rollout + time.refinement)}"
    )


def _further_ahead(time: StepTime) -> str:
    """Whether sampling more than one step ahead pays: only what steps differ in can be saved."""
    longer, shorter = ("generation", time.generation), ("training", time.training)
    if time.generation < time.training:
        longer, shorter = shorter, longer
    ahead = "generation.max_staleness of 2 or more"
    if longer[1] <= ABOUT_AS_LONG * shorter[1]:
        return f"{ahead} may pay: both take about as long, so where steps differ now one waits"
    return f"{ahead} saves nothing: {shorter[0]} waits for {longer[0]} anyway"


def _exchange(plan: Plan) -> list[str]:
    """Lines about context and expert parallelism, one for each model that has it."""
    assert plan.student is not None and plan.teacher is not None
    rate, models = training_rate(plan.config, False), (plan.student.hf, plan.teacher.hf)
    passed = [
        f"  {role:<10} passes keys and values on for {_seconds(ring.exchange)}, while it attends "
        f"to them for {_seconds(ring.attention)}"
        for role, ring in rings(plan.config, *models, rate).items()
        if ring.exchange
    ]
    return passed + [
        f"  {role:<10} sends {sent.bytes / GIB:,.0f} GiB a GPU to others' experts and back in "
        f"{_seconds(sent.seconds)}"
        for role, sent in expert_exchanges(plan.config, *models).items()
        if sent.bytes
    ]


def _evening(plan: Plan) -> str:
    assert plan.evening is not None
    evening, nodes = plan.evening, plan.config.cluster.training_nodes
    if evening.possible:
        return (
            f"generation would take no longer than training with {nodes} + "
            f"{evening.student_servers} + {evening.teacher_servers} nodes"
        )
    return (
        f"no number of servers evens this out: decoding the longest answers takes "
        f"{_seconds(evening.generation)}; a larger step does (train.prompts_per_step)"
    )


def _split(split: Split) -> str:
    return (
        f"{split.training} + {split.student_servers} + {split.teacher_servers} (training, student, "
        f"teacher servers): generation {_seconds(split.time.generation)}, training "
        f"{_seconds(split.time.training)}"
    )


def _seconds(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "never"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def _disk(plan: Plan) -> str:
    assert plan.student is not None
    sizes = checkpoint_bytes(plan.config, plan.student.hf)
    count = plan.config.checkpoint.keep_last
    return (
        f"Disk below run.dir: {plan.disk / GIB:,.1f} GiB (a checkpoint "
        f"{sizes['checkpoint'] / GIB:,.1f}, {count} kept and one being written; export "
        f"{sizes['export'] / GIB:,.1f})"
    )


def as_json(plan: Plan) -> dict[str, Any]:
    """Estimates for other programs, as plain data; sizes in bytes, times in seconds."""
    result: dict[str, Any] = {
        "exit_code": plan.exit_code,
        "fits": plan.fits,
        "problems": [str(problem) for problem in plan.findings.problems],
        "not_checked": plan.findings.notes,
        "assumptions": plan.config.cluster.assumptions.model_dump(),
    }
    if not plan.memory:
        return result
    assert plan.student is not None and plan.teacher is not None
    fullest = peak(plan.memory)
    models = {"student": plan.student, "teacher": plan.teacher}
    return result | {
        "parameters": {
            role: parameters(model.hf) if has_shape(model.hf) else None
            for role, model in models.items()
        },
        "gpu_memory": capacity(plan.config),
        "peak": fullest.total,
        "largest": largest_part(fullest.parts),
        "advice": list(plan.advice.overrides) if plan.advice else [],
        "gpus": [_gpu(gpu) for gpu in plan.memory],
        "weight_sync": vars(sync) if (sync := weight_sync(plan.config, plan.student.hf)) else None,
        "flops": vars(plan.flops) if plan.flops else None,
        "step": _split_values(plan.split) if plan.split else None,
        "fastest_split": _split_values(plan.fastest) if plan.fastest else None,
        "evenest_split": _split_values(plan.evenest) if plan.evenest else None,
        "evening": vars(plan.evening) if plan.evening else None,
        "savings": [
            {"overrides": list(saving.overrides), "step_seconds": saving.seconds}
            for saving in plan.savings
        ],
        "disk": plan.disk,
    }


def _gpu(gpu: GpuMemory) -> dict[str, Any]:
    return {
        "ranks": list(gpu.ranks),
        "student_stage": gpu.student_stage,
        "teacher_stage": gpu.teacher_stage,
        "peak_phase": gpu.peak_phase,
        "total": gpu.total,
        "phases": gpu.phases,
    }


def _split_values(split: Split) -> dict[str, Any]:
    nodes = {
        "training_nodes": split.training,
        "student_server_nodes": split.student_servers,
        "teacher_server_nodes": split.teacher_servers,
    }
    times = {
        f"{part}_seconds": seconds if math.isfinite(seconds) else None
        for part, seconds in {**vars(split.time), "generation": split.time.generation}.items()
        if part not in ("overlap", "streamed")
    }
    total = split.time.total if math.isfinite(split.time.total) else None
    how = {"overlap": split.time.overlap, "streamed": split.time.streamed}
    return nodes | times | {"step_seconds": total} | how
