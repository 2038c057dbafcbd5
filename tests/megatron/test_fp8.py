"""FP8 of student and teacher, through TransformerEngine's Python on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launch import launch
from parallel_layouts import PP2, SP, TEACHER_PP2, TEACHER_TP2, TP2, trajectories
from tiny_models import make_model

pytestmark = pytest.mark.distributed

LAYERS, LINEAR = 2, 4  # linear layers in a layer
BOTH = ["precision.fp8=hybrid", "precision.teacher_fp8=e4m3"]
RECIPES = {
    "tensorwise": [*BOTH, "precision.fp8_recipe=tensorwise"],
    "blockwise": [*BOTH, "precision.fp8_recipe=blockwise"],
    "delayed": ["precision.fp8=hybrid", "precision.fp8_recipe=delayed"],
    "mxfp8": [*BOTH, "precision.fp8_recipe=mxfp8"],
}
LAYOUTS = {
    "tp2 sp": [*TP2, *SP, *TEACHER_PP2],
    "pp2": [*PP2, *TEACHER_TP2, "train.recompute=full"],
    "dp2": ["optimizer.distributed=true"],
}
STEPS = 3
# Of a step's loss in bf16. A matrix in FP8 has three bits of mantissa: single products are off by
# up to 6 %, and their sums by less than one.
DISTANCE = 0.015


def run_cases(directory: str, cases: dict[str, list[str]], results: str) -> None:
    """On every rank: train each case; rank 0 writes losses, and how many products had FP8."""
    import te_stand_in
    import torch
    import torch.distributed as dist
    import transformer_engine_torch

    from nemo_trd.config.load import compose
    from nemo_trd.distributed.process import init_distributed
    from nemo_trd.megatron.student import Student
    from nemo_trd.megatron.teacher import Teacher

    if "mxfp8" in cases:
        te_stand_in.Gpu.major = 10
    watch = init_distributed(timeout_minutes=2)
    models = [f"model.{role}.path={directory}/{role}" for role in ("student", "teacher")]
    settings = ["optimizer.lr=1e-3", "train.max_tokens_per_micro_batch=80"]
    seen: dict[str, Any] = {}
    for name, overrides in cases.items():
        config = compose(["model=local", *models, *settings, *overrides])
        student = Student(config)
        teacher = Teacher(config, student.groups)
        transformer_engine_torch.matrix_products.clear()
        seen[name] = {"losses": [], "micro_batches": 0}
        for step in range(STEPS):
            plan = student.pack(trajectories(config, step))
            states = teacher.states(plan)
            seen[name]["losses"].append(student.train_step(plan, states).metrics["loss"])
            seen[name]["micro_batches"] += len(plan[0])
        products = transformer_engine_torch.matrix_products
        seen[name]["products"] = {" ".join(formats): n for formats, n in products.items()}
        for first, again in zip(states, teacher.states(plan), strict=True):
            assert first is None or torch.equal(first, again), name
    if dist.get_rank() == 0:
        Path(results).write_text(json.dumps(seen))
    watch.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": 120, "intermediate_size": 128, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    make_model(directory / "student", "qwen3", hidden_size=64, **sizes)
    make_model(directory / "teacher", "qwen3", seed=1, hidden_size=96, **sizes)
    return directory


def run(ranks: int, models: Path, cases: dict[str, list[str]], tmp_path: Path) -> dict[str, Any]:
    results = tmp_path / "results.json"
    launch(ranks, run_cases, str(models), cases, str(results), transformer_engine=True)
    return json.loads(results.read_text())


@pytest.fixture(scope="module")
def bf16(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(1, models, {"bf16": []}, tmp_path_factory.mktemp("bf16"))["bf16"]


def test_without_fp8_no_product_has_it(bf16: dict[str, Any]) -> None:
    products = 4 * LINEAR * LAYERS * bf16["micro_batches"]
    assert bf16["products"] == {"bfloat16 bfloat16": products}


@pytest.mark.parametrize("recipes", [["tensorwise", "blockwise", "delayed"], ["mxfp8"]])
def test_every_product_of_a_layer_has_fp8_and_losses_stay_near_those_of_bf16(
    recipes: list[str], models: Path, bf16: dict[str, Any], tmp_path: Path
) -> None:
    results = run(1, models, {name: RECIPES[name] for name in recipes}, tmp_path)
    for name, seen in results.items():
        products = LINEAR * LAYERS * seen["micro_batches"]
        # Forward passes of student and teacher; the student's gradients of inputs and of weights.
        expected = {"kFloat8E4M3 kFloat8E4M3": 2 * products}
        expected["kFloat8E4M3 kFloat8E5M2"] = 2 * products
        if name == "delayed":  # the teacher is in bf16
            expected["kFloat8E4M3 kFloat8E4M3"] = expected["bfloat16 bfloat16"] = products
        assert seen["products"] == expected, name
        near(name, seen, bf16)


def test_fp8_in_parallel_layouts_stays_near_bf16(
    models: Path, bf16: dict[str, Any], tmp_path: Path
) -> None:
    cases = {name: [*RECIPES["tensorwise"], *layout] for name, layout in LAYOUTS.items()}
    for name, seen in run(2, models, cases, tmp_path).items():
        assert "bfloat16 bfloat16" not in seen["products"], name
        near(name, seen, bf16)


def near(name: str, seen: dict[str, Any], bf16: dict[str, Any]) -> None:
    assert seen["losses"] == pytest.approx(bf16["losses"], rel=DISTANCE), name
    assert seen["losses"] != bf16["losses"], name
