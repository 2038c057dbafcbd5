"""Training on CUDA devices, beside the same steps in fp32 with the local layers on the CPU."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from devices import HAS_TRANSFORMER_ENGINE, device_count, on_cpu, on_devices
from parallel_layouts import (
    CP2,
    DISTRIBUTED,
    PP2,
    SP,
    TEACHER_CP2,
    TEACHER_PP2,
    TEACHER_TP2,
    TP2,
    trajectories,
)
from servers import make_inputs
from tiny_models import make_model
from training_run import STEPS, run_training, settings

pytestmark = pytest.mark.gpu(emulated=True)
needs_transformer_engine = pytest.mark.skipif(
    not HAS_TRANSFORMER_ENGINE, reason="needs TransformerEngine"
)
needs_two_devices = pytest.mark.skipif(device_count() < 2, reason="needs two CUDA devices")

LOCAL = "local layers"  # in the name of a case: though TransformerEngine may be there
FP32, FP8 = ["precision.dtype=fp32"], ["precision.fp8=hybrid", "precision.teacher_fp8=e4m3"]
LAYOUTS = {
    "tp2 sp": [*TP2, *SP, *TEACHER_PP2],
    "pp2": [*PP2, *TEACHER_TP2],
    "cp2": [*CP2, *TEACHER_CP2],
    "dp2": DISTRIBUTED,
}
# Of a step's loss in fp32 on the CPU. bf16 has eight bits of mantissa, FP8 three; the loss is a sum
# over many products.
DISTANCES = {"fp32": 1e-4, "bf16": 0.01, "fp8": 0.015}
DETERMINISTIC = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def run_cases(directory: str, cases: dict[str, list[str]], results: str) -> None:
    """On every rank: three steps of each case; rank 0 writes their losses, and how they ran."""
    import torch.distributed as dist

    from nemo_trd.distributed.process import device, init_distributed
    from nemo_trd.megatron import model

    watch = init_distributed(timeout_minutes=3)
    find_missing = model.missing_for_transformer_engine
    seen: dict[str, Any] = {}
    for name, overrides in cases.items():
        local = LOCAL in name
        model.missing_for_transformer_engine = (lambda: ["wish"]) if local else find_missing
        student, teacher, config = made(directory, overrides)
        seen[name] = {"losses": steps(student, teacher, config, range(3))}
        seen[name] |= {"layers": student.models[0].config.transformer_impl}
        seen[name] |= {"device": device().type}
    if dist.get_rank() == 0:
        Path(results).write_text(json.dumps(seen))
    watch.close()


def made(directory: str, overrides: list[str]) -> Any:
    from nemo_trd.config.load import compose
    from nemo_trd.megatron.student import Student
    from nemo_trd.megatron.teacher import Teacher

    paths = [f"model.{role}.path={directory}/{role}" for role in ("student", "teacher")]
    common = ["optimizer.lr=1e-3", "train.max_tokens_per_micro_batch=80"]
    config = compose(["model=local", *paths, *common, *overrides])
    student = Student(config)
    return student, Teacher(config, student.groups), config


def steps(student: Any, teacher: Any, config: Any, numbers: Any) -> list[float]:
    losses = []
    for step in numbers:
        plan = student.pack(trajectories(config, step))
        losses.append(student.train_step(plan, teacher.states(plan)).metrics["loss"])
    return losses


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    sizes: dict[str, Any] = {"vocab_size": 120, "intermediate_size": 256, "head_dim": 64}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    make_model(directory / "student", "qwen3", hidden_size=128, **sizes)
    make_model(directory / "teacher", "qwen3", seed=1, hidden_size=192, **sizes)
    return directory


@pytest.fixture(scope="module")
def expected(models: Path) -> list[float]:
    """Losses of the steps in fp32 on the CPU."""
    on_cpu(run_cases, str(models), {LOCAL: FP32}, str(models / "cpu.json"))
    seen = json.loads((models / "cpu.json").read_text())[LOCAL]
    assert seen["device"] == "cpu" and seen["layers"] == "local"
    return seen["losses"]


def check(
    ranks: int, models: Path, cases: dict[str, list[str]], kind: str, expected: list[float]
) -> dict[str, Any]:
    results = models / "devices.json"
    on_devices(ranks, run_cases, str(models), cases, str(results))
    seen = json.loads(results.read_text())
    for name in cases:
        print(f"{name}: {seen[name]['losses']}, fp32 on the CPU {expected}")
        assert seen[name]["losses"] == pytest.approx(expected, rel=DISTANCES[kind]), name
        assert seen[name]["layers"] == ("local" if LOCAL in name else "transformer_engine")
    return seen


def test_steps_with_the_local_layers_are_those_of_the_cpu(
    models: Path, expected: list[float]
) -> None:
    check(1, models, {LOCAL: FP32}, "fp32", expected)
    check(1, models, {f"{LOCAL} bf16": []}, "bf16", expected)


@needs_transformer_engine
def test_steps_in_bf16_and_fp8_are_near_those_of_the_cpu(
    models: Path, expected: list[float]
) -> None:
    bf16 = check(1, models, {"bf16": []}, "bf16", expected)["bf16"]
    fp8 = check(1, models, {"fp8": FP8}, "fp8", expected)["fp8"]
    assert fp8["losses"] != bf16["losses"]


@needs_two_devices
def test_steps_over_two_devices_are_near_those_of_the_cpu(
    models: Path, expected: list[float]
) -> None:
    if not HAS_TRANSFORMER_ENGINE:
        layouts = {f"{LOCAL} {name}": layout for name, layout in LAYOUTS.items()}
        check(2, models, layouts, "bf16", expected)
        return
    check(2, models, LAYOUTS, "bf16", expected)
    check(2, models, {"tp2 sp, fp8": [*LAYOUTS["tp2 sp"], *FP8]}, "fp8", expected)


@pytest.mark.skipif(device_count() < 4, reason="needs four CUDA devices")
def test_steps_over_all_devices_are_near_those_of_the_cpu(
    models: Path, expected: list[float]
) -> None:
    ranks = 4 if device_count() < 8 else 8
    name = "tp2 pp2" if HAS_TRANSFORMER_ENGINE else f"{LOCAL} tp2 pp2"
    check(ranks, models, {name: [*TP2, *PP2, *SP, *TEACHER_TP2, *DISTRIBUTED]}, "bf16", expected)


def run_resumed(directory: str, overrides: list[str], results: str) -> None:
    """On one rank: four steps with a checkpoint after two, the last two again from there."""
    import torch

    from nemo_trd.distributed.process import init_distributed
    from nemo_trd.megatron.checkpoint import Checkpointer
    from nemo_trd.records.checkpoint_dir import TrainerState

    torch.use_deterministic_algorithms(True, warn_only=True)
    watch = init_distributed(timeout_minutes=3)
    root = Path(directory) / "checkpoints"
    student, teacher, config = made(directory, overrides)
    steps(student, teacher, config, range(2))
    saver = Checkpointer(config.checkpoint, root, student, needed=0)
    saver.save(TrainerState(2, 2, 0, 7, config.digest(), {}))
    saver.wait()
    saver.close()
    whole = steps(student, teacher, config, range(2, 4))
    again, teacher, config = made(directory, overrides)
    loader = Checkpointer(config.checkpoint, root, again, needed=0)
    loader.load(root / "step_00000002")
    loader.close()
    Path(results).write_text(json.dumps([whole, steps(again, teacher, config, range(2, 4))]))
    watch.close()


def test_with_deterministic_kernels_a_resumed_run_is_bit_for_bit_one_not_interrupted(
    models: Path, tmp_path: Path
) -> None:
    overrides = FP8 if HAS_TRANSFORMER_ENGINE else []
    results = tmp_path / "resumed.json"
    arguments = (str(models), overrides, str(results))
    on_devices(1, run_resumed, *arguments, environment=DETERMINISTIC)
    whole, again = json.loads(results.read_text())
    assert whole == again


def test_a_whole_run_samples_trains_and_exports(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "inputs", head_dim=64)
    overrides = settings(inputs, tmp_path / "run", "precision.dtype=bf16")
    on_devices(1, run_training, overrides, "")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == STEPS and all(math.isfinite(loss) and loss > 0 for loss in losses)
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()
