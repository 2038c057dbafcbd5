"""Training steps of one model with random weights, beside what nemo_trd.plan predicts of them.

    python benchmarks/gpu_training.py --model DIR --ranks 1 --json training.json precision=fp8

benchmarks/gpu.py starts this for each of its cases. Student and teacher both have the weights of
`--model`; every trajectory is as long as the settings allow, so that measured and planned steps do
the same work. Arguments that are left over are settings of nemo_trd.train.

Of the JSON file: `seconds` of teacher and student are the means of the steps that count, FLOPs are
those that the plan counts for them, and `tokens_per_second` are the student's (prompt and answer)
over both. `peak_gib` is what torch had allocated on the fullest GPU; the plan's figure is without
its reserve for the CUDA context and NCCL. `mfu` needs a card whose peak is known: an H100 or H200.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_trd.config.load import compose
from nemo_trd.config.schema import Config
from nemo_trd.data.types import Trajectory
from nemo_trd.launch import launch
from nemo_trd.plan.advice import peak
from nemo_trd.plan.cost import TERA, step_flops, step_time
from nemo_trd.plan.memory import GIB, training_memory
from nemo_trd.plan.shapes import read_model

KNOWN_CARDS = ("H100", "H200")  # of the peaks in conf/cluster/h100.yaml


def measure(config: Config, steps: int, warm_up: int) -> dict[str, Any]:
    """Train, and export the weights once. On every rank; the figures are the same on all.

    Raises:
        ValueError: a loss is not a finite positive number.
    """
    from nemo_trd.distributed.process import init_distributed
    from nemo_trd.megatron.model import has_transformer_engine
    from nemo_trd.megatron.student import Student
    from nemo_trd.megatron.teacher import Teacher

    watch = init_distributed(config.parallel.timeout_minutes)
    started = now()
    student = Student(config)
    teacher = Teacher(config, student.groups)
    loaded = now()
    losses, seconds = [], []
    reset_peak()
    for step in range(warm_up + steps):
        plan = student.pack(list(trajectories(config, student.vocab_size, step)))
        start = now()
        states = teacher.states(plan)
        scored = now()
        metrics = student.train_step(plan, states).metrics
        seconds.append((scored - start, now() - scored))
        losses.append(metrics["loss"])
        if not 0 < metrics["loss"] < float("inf"):
            raise ValueError(f"the loss of step {step + 1} is {metrics['loss']}")
    peaks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(peaks, peak_bytes())
    start = now()
    exported = sum(tensor.nbytes for _, tensor in student.export_hf_weights())
    result = {
        "layers": "TransformerEngine" if has_transformer_engine() else "local",
        "load_seconds": loaded - started,
        "losses": losses,
        "seconds": dict(zip(("teacher", "student"), mean(seconds[warm_up:]), strict=True)),
        "peak_gib": max(peaks) / GIB if torch.cuda.is_available() else None,
        "export_seconds": now() - start,
        "export_gib": exported / GIB,
    }
    watch.close()
    return result


def trajectories(config: Config, vocab_size: int, step: int) -> Iterator[Trajectory]:
    """Random tokens, of the greatest lengths that the settings allow."""
    rng = random.Random(step)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocab_size) for _ in range(count))

    for index in range(config.train.trajectories_per_step):
        yield Trajectory(
            prompt_index=index,
            sample_index=0,
            source="refinement",
            student_context=tokens(config.data.max_prompt_tokens),
            teacher_context=tokens(config.refinement.max_context_tokens),
            labels=tokens(config.generation.refinement.max_tokens),
            weight_version=step,
        )


def compared(config: Config, measured: dict[str, Any], card: str) -> dict[str, Any]:
    """Rates of the measured step, and the plan's figures for the same step."""
    hf, _ = read_model(config.model.student, "model.student.path")
    planned, flops = step_time(config, hf.hf, hf.hf), step_flops(config, hf.hf, hf.hf)
    memory, cluster = peak(training_memory(config, hf.hf, hf.hf)), config.cluster
    seconds = sum(measured["seconds"].values())
    gpus = cluster.world_size
    tflops = (flops.student + flops.teacher + flops.loss) / seconds / gpus / TERA
    length = config.data.max_prompt_tokens + config.generation.refinement.max_tokens
    fp8 = config.precision.fp8 is not None
    best = cluster.assumptions.fp8_tflops if fp8 else cluster.assumptions.bf16_tflops
    return {
        "gpus": gpus,
        "layout": f"TP {config.parallel.student.tensor_model_parallel_size}",
        "layers_of_model": hf.hf.num_hidden_layers,
        "tokens_per_second": config.train.trajectories_per_step * length / seconds,
        "tflops": tflops,
        "mfu": tflops / best if any(name in card for name in KNOWN_CARDS) else None,
        "planned": {
            "seconds": {"teacher": planned.teacher, "student": planned.student},
            "peak_gib": memory.total / GIB - cluster.reserved_gib,
        },
    }


def now() -> float:
    """Seconds, when the device has done all that it was asked to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def mean(seconds: list[tuple[float, float]]) -> list[float]:
    return [statistics.mean(column) for column in zip(*seconds, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="a Hugging Face directory")
    parser.add_argument("--ranks", type=int, default=1, help="of this machine, a GPU each")
    parser.add_argument("--steps", type=int, default=3, help="that count")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before those")
    parser.add_argument("--json", type=Path, required=True, help="write the figures here")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args, overrides = parser.parse_known_args()
    if not args.here:
        sys.exit(launch(args.ranks, [sys.executable, __file__, "--here", *sys.argv[1:]]))
    paths = [f"model.{role}.path={args.model}" for role in ("student", "teacher")]
    config = compose(["model=local", "data=gsm8k", "data.train.path=unused", *paths, *overrides])
    measured = measure(config, args.steps, args.warm_up)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    if os.environ["RANK"] == "0":
        args.json.write_text(json.dumps(measured | compared(config, measured, card)))


if __name__ == "__main__":
    main()
