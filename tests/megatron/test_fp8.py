"""FP8 of student and teacher, through TransformerEngine's Python on the CPU."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from launch import launch
from parallel_layouts import (
    CP2,
    ONE_EACH,
    PP2,
    SP,
    TEACHER_CP2,
    TEACHER_PP2,
    TEACHER_TP2,
    TP2,
    trajectories,
)
from tiny_models import make_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from nemo_trd.config.load import compose

pytestmark = pytest.mark.distributed

ROLES = ("student", "teacher")
LAYERS, LINEAR = 2, 4  # linear layers in a layer
# Matrices of transformers that are one in Megatron, and so have one scale.
TOGETHER = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",)]
TOGETHER += [("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]
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
    "cp2": [*CP2, *TEACHER_CP2],
    "dp2": ["optimizer.distributed=true", "teacher.offload_weights=true"],
}
STEPS = 3
# Of a step's loss in bf16. A matrix in FP8 has three bits of mantissa: single products are off by
# up to 6 %, and their sums by less than one.
DISTANCE = 0.015


def run_cases(directory: str, cases: dict[str, list[str]], results: str) -> None:
    """On every rank: train each case; rank 0 writes losses, and how many products had FP8."""
    import te_stand_in
    import torch.distributed as dist
    import transformer_engine_torch

    from nemo_trd.distributed.process import init_distributed
    from nemo_trd.megatron.student import Student
    from nemo_trd.megatron.teacher import Teacher

    if "mxfp8" in cases:
        te_stand_in.Gpu.major = 10
    watch = init_distributed(timeout_minutes=2)
    models = [f"model.{role}.path={directory}/{role}" for role in ROLES]
    settings = ["optimizer.lr=1e-3", "train.max_tokens_per_micro_batch=80"]
    seen: dict[str, Any] = {}
    for name, overrides in cases.items():
        config = compose(["model=local", *models, *settings, *overrides])
        student = Student(config)
        assert student.models[0].config.apply_rope_fusion  # unfused it waits for the device
        teacher = Teacher(config, student.groups)
        transformer_engine_torch.matrix_products.clear()
        seen[name] = {"losses": [], "student": 0, "teacher": 0}  # these two: packs
        for step in range(STEPS):
            plan = student.pack(trajectories(config, step))
            states = teacher.states(plan)
            seen[name]["losses"].append(student.train_step(plan, states).metrics["loss"])
            seen[name]["student"] += len(plan[0])
            seen[name]["teacher"] += sum(len(batch.teacher) for batch in plan[0])
        products = transformer_engine_torch.matrix_products
        seen[name]["products"] = {" ".join(formats): n for formats, n in products.items()}
        if config.precision.teacher_fp8 is not None:
            check_weights(teacher._models[0], config)
        for first, again in zip(states, teacher.states(plan), strict=True):
            assert first is None or torch.equal(first, again), name
    if dist.get_rank() == 0:
        Path(results).write_text(json.dumps(seen))
    watch.close()


def check_weights(model: Any, config: Any) -> None:
    """A frozen model has its matrices in FP8 alone, as planned: one byte for each number."""
    from megatron.core.fp8_utils import is_float8tensor

    from nemo_trd.plan.shapes import read_model, stage_parameters

    hf = read_model(config.model.teacher, "model.teacher.path")[0].hf
    planned = stage_parameters(hf, config.parallel.teacher)[model.pg_collection.pp.rank()]
    matrices = [p for p in model.parameters() if is_float8tensor(p)]
    kept = [t for matrix in matrices for t in matrix.get_data_tensors() if t is not None]
    assert sum(t.nbytes for t in kept) == planned.linear
    assert not any(getattr(module, "_fp8_workspaces", None) for module in model.modules())


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
    student, teacher = (LINEAR * LAYERS * bf16[role] for role in ROLES)
    assert bf16["products"] == {"bfloat16 bfloat16": 3 * student + teacher}


@pytest.mark.parametrize("recipes", [["tensorwise", "blockwise", "delayed"], ["mxfp8"]])
def test_every_product_of_a_layer_has_fp8_and_losses_stay_near_those_of_bf16(
    recipes: list[str], models: Path, bf16: dict[str, Any], tmp_path: Path
) -> None:
    results = run(1, models, {name: RECIPES[name] for name in recipes}, tmp_path)
    for name, seen in results.items():
        student, teacher = (LINEAR * LAYERS * seen[role] for role in ROLES)
        # Forward passes of student and teacher; the student's gradients of inputs and of weights.
        expected = {"kFloat8E4M3 kFloat8E4M3": student + teacher}
        expected["kFloat8E4M3 kFloat8E5M2"] = 2 * student
        if name == "delayed":  # the teacher is in bf16
            expected["kFloat8E4M3 kFloat8E4M3"] = student
            expected["bfloat16 bfloat16"] = teacher
        assert seen["products"] == expected, name
        near(name, seen, bf16)


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_computing_activations_again_changes_nothing(
    recipe: str, models: Path, tmp_path: Path
) -> None:
    cases = {
        how: [*RECIPES[recipe], f"train.recompute={how}"] for how in ("none", "selective", "full")
    }
    losses = [seen["losses"] for seen in run(1, models, cases, tmp_path).values()]
    assert losses[0] == losses[1] == losses[2]


def test_fp8_in_parallel_layouts_stays_near_bf16(
    models: Path, bf16: dict[str, Any], tmp_path: Path
) -> None:
    cases = {name: [*RECIPES["tensorwise"], *layout] for name, layout in LAYOUTS.items()}
    for name, seen in run(2, models, cases, tmp_path).items():
        assert "bfloat16 bfloat16" not in seen["products"], name
        near(name, seen, bf16)


def test_adapters_are_trained_in_bf16_on_weights_in_fp8(models: Path, tmp_path: Path) -> None:
    adapter = ["student.adapter=lora", "student.adapter.rank=8", "student.adapter.init=gaussian"]
    cases = {"bf16": adapter, "fp8": [*RECIPES["tensorwise"], *adapter]}
    cases["again"] = [*cases["fp8"], "train.recompute=full"]
    results = run(1, models, cases, tmp_path)
    near("fp8", results["fp8"], results["bf16"])
    assert results["again"]["losses"] == results["fp8"]["losses"]
    packs = results["fp8"]["student"]
    student, teacher = (LINEAR * LAYERS * results["fp8"][role] for role in ROLES)
    # No gradients of weights, and none of what comes out of the embedding.
    expected = {"kFloat8E4M3 kFloat8E4M3": student + teacher}
    assert results["fp8"]["products"] == expected | {"kFloat8E4M3 kFloat8E5M2": student - packs}


def near(name: str, seen: dict[str, Any], bf16: dict[str, Any]) -> None:
    assert seen["losses"] == pytest.approx(bf16["losses"], rel=DISTANCE), name
    assert seen["losses"] != bf16["losses"], name


def test_a_forward_pass_is_that_of_transformers_on_matrices_rounded_to_fp8(
    models: Path, tmp_path: Path
) -> None:
    settings = ["precision.dtype=fp32", "precision.fp8=hybrid", *ONE_EACH]
    seen = run(1, models, {"fp32": settings}, tmp_path)["fp32"]["losses"][0]
    config = compose(["model=local", *(f"model.{r}.path={models / r}" for r in ROLES)])
    load = partial(AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
    student, teacher = load(models / "student"), load(models / "teacher")
    steps = trajectories(config, 0)
    exact = divergence(student, teacher, steps)
    for layer in student.model.layers:
        for names in TOGETHER:
            modules = [layer.get_submodule(name) for name in names]
            amax = max(module.weight.abs().max() for module in modules)
            for module in modules:
                module.weight.data = rounded(module.weight.data, amax)
                module.register_forward_pre_hook(lambda _, x: rounded(x[0], x[0].abs().max()))
    assert seen == pytest.approx(divergence(student, teacher, steps), rel=1e-5)
    assert abs(seen / exact - 1) > 1e-4


@torch.no_grad()
def divergence(student: Any, teacher: Any, trajectories: list[Any]) -> float:
    """KL(teacher || student) per label; sequence and filler together have 16, 32, ... tokens."""

    def log_probs(model: Any, context: tuple[int, ...], labels: tuple[int, ...]) -> Tensor:
        length = len(context) + len(labels) - 1
        ids = F.pad(torch.tensor([context + labels[:-1]]), (0, -length % 16))
        places = torch.arange(ids.shape[1])
        of_filler = places >= length
        apart = (of_filler[:, None] != of_filler) | (places > places[:, None])
        mask = torch.zeros(apart.shape).masked_fill(apart, torch.finfo().min)[None, None]
        positions = places - length * of_filler
        logits = model(ids, attention_mask=mask, position_ids=positions[None]).logits[0]
        return logits[len(context) - 1 : length].double().log_softmax(-1)

    total = 0.0
    for t in trajectories:
        p = log_probs(teacher, t.teacher_context, t.labels)
        total += float((p.exp() * (p - log_probs(student, t.student_context, t.labels))).sum())
    return total / sum(len(t.labels) for t in trajectories)


def rounded(x: Tensor, amax: Tensor) -> Tensor:
    """To the nearest numbers in E4M3, whose largest, 448, stands for `amax`."""
    return (x * (448 / amax)).to(torch.float8_e4m3fn).float() * (amax / 448)


def check_refusals() -> None:
    """On one rank: what cuBLASLt would refuse, and what the stand-in does not have."""
    import transformer_engine.pytorch as te
    import transformer_engine_torch
    from transformer_engine.common.recipe import Float8CurrentScaling

    layer = te.Linear(64, 64, params_dtype=torch.bfloat16)
    with te.autocast(recipe=Float8CurrentScaling()):
        result = layer(torch.ones(24, 64, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="inner dimension a multiple of 16"):
        result.sum().backward()  # the weight's gradient is a sum over 24 tokens
    with pytest.raises(NotImplementedError, match="transformer_engine_torch.gelu: not in the"):
        transformer_engine_torch.gelu(torch.ones(1), None)


def check_move() -> None:
    """On one rank: to a device that a CPU can tell from its own."""
    import transformer_engine.pytorch as te
    from megatron.core.fp8_utils import is_float8tensor
    from transformer_engine.common.recipe import Float8CurrentScaling

    from nemo_trd.megatron.teacher import move

    with torch.no_grad(), te.fp8_model_init(recipe=Float8CurrentScaling()):
        layer = te.Linear(64, 64, params_dtype=torch.bfloat16)
    move(layer, torch.device("meta"))
    assert is_float8tensor(layer.weight) and layer.bias.is_meta
    kept = [*layer.weight.get_data_tensors(), layer.weight._scale_inv]
    assert {t.device.type for t in kept if t is not None} == {"meta"}


def test_weights_in_fp8_leave_a_device_whole() -> None:
    launch(1, check_move, transformer_engine=True)


def test_the_stand_in_refuses_what_kernels_refuse_and_what_it_does_not_have() -> None:
    launch(1, check_refusals, transformer_engine=True)
