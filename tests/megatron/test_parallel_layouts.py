"""The same losses and gradient norms however a step is split over ranks and micro-batches."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from launch import launch
from parallel_layouts import (
    ALL_IN_ONE,
    CP2,
    DISTRIBUTED,
    EP2,
    ETP2,
    ONE_EACH,
    PP2,
    SP,
    TEACHER_CP2,
    TEACHER_EP2,
    TEACHER_PP2,
    TEACHER_SP,
    TEACHER_TP2,
    TP2,
    VOCABULARY,
    VPP2,
    student,
    teacher,
    trajectories,
)
from tiny_models import make_model

pytestmark = pytest.mark.distributed

STEPS = 3
RELATIVE = 1e-5
ABSOLUTE = 5e-7  # of losses: the values of k1 have both signs, and their mean may be near zero

DIVERGENCES = {
    "forward": [],
    "reverse": ["loss.divergence=reverse_kl"],
    "jsd": ["loss.divergence=jsd", "loss.beta=0.3"],
    "bucket": ["loss.top_k=5"],
    "renormalize": ["loss.top_k=5", "loss.top_k_tail=renormalize", "loss.temperature=1.7"],
    "clip": ["loss.token_clip=0.3", "loss.chunk_size=3"],
    "entries": ["loss.divergence=reverse_kl", "loss.entry_clip=0.003"],
    "k1": ["loss.divergence=k1", "algorithm.trajectory=rollout"],
    "k3": ["loss.divergence=k3", "algorithm.trajectory=rollout", "loss.token_clip=0.1"],
}
RECIPES = {
    f"{mode} {context} {divergence}": [
        f"algorithm.mode={mode}",
        f"algorithm.teacher_context={context}",
        *DIVERGENCES[divergence],
    ]
    for mode, context, divergence in product(("opd", "opsd"), ("refine", "prompt"), DIVERGENCES)
}


# ranks -> layouts. Every divergence runs in the first group, a part of them in the second. One rank
# with batches of `max_tokens_per_micro_batch` is what they are compared with.
FULL: dict[int, dict[str, list[str]]] = {
    1: {},
    2: {
        "tp2": TP2,
        "pp2": PP2 + TEACHER_PP2,
        "dp2": [],
        "tp2 sp": TP2 + SP + TEACHER_TP2,
        "pp2 vpp2": PP2 + VPP2,
        "cp2": CP2 + TEACHER_CP2,
    },
    4: {"tp2 pp2": TP2 + PP2, "pp4": student(pipeline_model_parallel_size=4)},
}
PARTIAL = {
    1: {
        "one each": ONE_EACH,
        "all in one": ALL_IN_ONE,
        "full recompute": ["train.recompute=full"],
        "selective recompute": ["train.recompute=selective"],
        "distributed": DISTRIBUTED,
    },
    2: {
        "dp2 one each": ONE_EACH,
        "dp2 all in one": ALL_IN_ONE,
        "dp2 distributed": DISTRIBUTED,
        "tp2 one each": TP2 + ONE_EACH,
        "tp2 sp recompute": [*TP2, *SP, "train.recompute=full"],
        # In the part of one rank there may be no label, and sequences are shorter than 4 tokens.
        "cp2 one each": CP2 + ONE_EACH + TEACHER_TP2,
        "dp2, teacher cp2": TEACHER_CP2,
        "offload": [*PP2, "teacher.offload_states=true", "teacher.offload_weights=true"],
    },
    4: {
        "tp2 pp2 sp, teacher 2x2": TP2 + PP2 + SP + TEACHER_TP2 + TEACHER_PP2,
        "tp2 pp2, teacher 4x1": TP2 + PP2 + teacher(tensor_model_parallel_size=4),
        "tp2 pp2, teacher 1x4": TP2 + PP2 + teacher(pipeline_model_parallel_size=4),
        "tp2 pp2, teacher 2x1": TP2 + PP2 + TEACHER_TP2,
        "tp2 pp2, teacher 1x2": TP2 + PP2 + TEACHER_PP2,
        "tp2 pp2 vpp2 sp": TP2 + PP2 + SP + VPP2,
        "tp2 dp2 distributed": TP2 + DISTRIBUTED,
        "pp2 dp2 one each": PP2 + ONE_EACH,
        "pp2 vpp2 dp2": PP2 + VPP2 + TEACHER_PP2,
        "tp4 sp": [*student(tensor_model_parallel_size=4), *SP, *TEACHER_TP2],
        "pp4 distributed": student(pipeline_model_parallel_size=4) + DISTRIBUTED,
        "dp4 all in one": ALL_IN_ONE,
        "cp4 one each": student(context_parallel_size=4) + ONE_EACH + TEACHER_CP2,
        "cp2 tp2 sp": [*CP2, *TP2, *SP, "train.recompute=full"],
        "cp2 pp2 vpp2": CP2 + PP2 + VPP2 + TEACHER_CP2 + TEACHER_TP2,
        "cp2 dp2 distributed": CP2 + DISTRIBUTED + TEACHER_CP2,
    },
}

# With TransformerEngine's layers, on packed sequences.
WITH_TRANSFORMER_ENGINE = {
    1: {
        "alone": [],
        "full recompute": ["train.recompute=full"],
        "selective recompute": ["train.recompute=selective"],
    },
    2: {
        "tp2 sp": TP2 + SP + TEACHER_PP2,
        "pp2": [*PP2, *TEACHER_TP2, "train.recompute=full"],
        "pp2 vpp2": PP2 + VPP2,
        "dp2 distributed": DISTRIBUTED,
    },
}


# With experts, in student and teacher.
SPARSE = {
    1: {"one each": ONE_EACH},
    2: {
        "dp2": [],
        "ep2 one each": EP2 + TEACHER_EP2 + ONE_EACH,
        "ep2 distributed": [*EP2, *TEACHER_TP2, *TEACHER_SP, *DISTRIBUTED],
        "tp2 sp ep2": TP2 + SP + EP2 + TEACHER_PP2,
        # Replicas of the teacher have different numbers of packs.
        "pp2": [*PP2, *TEACHER_EP2, "train.recompute=full"],
    },
    4: {
        "ep2 tp2 sp": EP2 + TP2 + SP + TEACHER_EP2,
        "ep2 etp2 tp2 sp": EP2 + ETP2 + TP2 + SP + teacher(expert_tensor_parallel_size=4),
        "pp2 ep2": PP2 + EP2 + TEACHER_PP2 + TEACHER_EP2,
        "pp2 vpp2 ep2": PP2 + VPP2 + EP2,
        "ep4 distributed": student(expert_model_parallel_size=4) + DISTRIBUTED,
        "ep2 cp2 distributed": EP2 + CP2 + DISTRIBUTED + TEACHER_CP2 + TEACHER_EP2,
    },
}
SPARSE_WITH_TRANSFORMER_ENGINE = {
    1: {"alone": []},
    2: {
        "ep2": EP2 + TEACHER_EP2 + DISTRIBUTED,
        "tp2 sp ep2": TP2 + SP + EP2,
        "tp2 sp etp2": TP2 + SP + ETP2,
    },
}


def every_divergence(number: int) -> list[str]:
    """Recipes of layout `number`: all divergences, and with them all modes and contexts in turn.

    Modes and contexts only change which tokens stand before the labels.
    """
    contexts = list(product(("opd", "opsd"), ("refine", "prompt")))
    return [
        " ".join((*contexts[(number + position) % len(contexts)], divergence))
        for position, divergence in enumerate(DIVERGENCES)
    ]


# With a load-balancing loss; test_gradients.py has these layouts also without.
SPARSE_RECIPE, BALANCED = "opd refine forward", ["student.moe_aux_loss_coeff=0.02"]
SOME_RECIPES = ["opd refine forward", "opsd prompt jsd", "opd prompt bucket"]


def run_cases(directory: str, family: str, cases: dict[str, list[str]], results: str) -> None:
    """On every rank: train each case from the same weights; rank 0 writes what it saw."""
    import torch.distributed as dist

    from nemo_trd.config.load import compose
    from nemo_trd.distributed.process import init_distributed
    from nemo_trd.megatron.student import Student
    from nemo_trd.megatron.teacher import Teacher

    watch = init_distributed(timeout_minutes=2)
    seen: dict[str, list[list[float]]] = {}
    for name, overrides in cases.items():
        opsd = "algorithm.mode=opsd" in overrides
        config = compose(
            [
                "model=local",
                f"model.student.path={directory}/{family}/student",
                "model.teacher=null"
                if opsd
                else f"model.teacher.path={directory}/{family}/teacher",
                "precision.dtype=fp32",
                "optimizer.lr=1e-2",
                "optimizer.eps=1e-4",
                "train.max_tokens_per_micro_batch=80",
                *overrides,
            ]
        )
        model = Student(config)
        frozen = Teacher(config, model.groups)
        seen[name] = []
        for step in range(STEPS):
            plan = model.pack(trajectories(config, step))
            metrics = model.train_step(plan, frozen.states(plan)).metrics
            figures = ["loss", "grad_norm", "label_tokens"]
            if "student.moe_aux_loss_coeff" in " ".join(overrides):
                figures += ["load_balancing_loss", "max_expert_load"]
            seen[name].append([metrics[figure] for figure in figures])
    if dist.get_rank() == 0:
        Path(results).write_text(json.dumps(seen))
    watch.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    for family in ("qwen3", "qwen3_moe"):
        below = directory / family
        make_model(below / "student", family, tie_word_embeddings=True, **sizes)
        make_model(below / "teacher", family, seed=1, **(sizes | {"hidden_size": 48}))
    return directory


def run(
    ranks: int,
    models: Path,
    cases: dict[str, list[str]],
    tmp_path: Path,
    transformer_engine: bool = False,
    family: str = "qwen3",
) -> dict[str, Any]:
    results = tmp_path / "results.json"
    launch(
        ranks,
        run_cases,
        *(str(models), family, cases, str(results)),
        timeout=500,
        transformer_engine=transformer_engine,
    )
    return json.loads(results.read_text())


@pytest.fixture(scope="module")
def reference(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every recipe on one process."""
    return run(1, models, RECIPES, tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def sparse_reference(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One recipe on one process, of models with experts."""
    cases = {SPARSE_RECIPE: RECIPES[SPARSE_RECIPE] + BALANCED}
    return run(1, models, cases, tmp_path_factory.mktemp("sparse"), family="qwen3_moe")


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_no_layout_changes_losses_or_gradients(
    ranks: int, models: Path, reference: dict[str, Any], tmp_path: Path
) -> None:
    layouts = [(every_divergence(n), *item) for n, item in enumerate(FULL[ranks].items())]
    layouts += [(SOME_RECIPES, *item) for item in PARTIAL[ranks].items()]
    cases = {
        f"{recipe} | {layout}": [*RECIPES[recipe], *overrides]
        for recipes, layout, overrides in layouts
        for recipe in recipes
    }
    check(run(ranks, models, cases, tmp_path), cases, reference)


@pytest.mark.parametrize("ranks", [1, 2])
def test_nor_do_the_layers_of_transformer_engine(
    ranks: int, models: Path, reference: dict[str, Any], tmp_path: Path
) -> None:
    recipe = SOME_RECIPES[0]
    layouts = WITH_TRANSFORMER_ENGINE[ranks].items()
    cases = {
        f"{recipe} | {layout}": [*RECIPES[recipe], *overrides] for layout, overrides in layouts
    }
    check(run(ranks, models, cases, tmp_path, transformer_engine=True), cases, reference)


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_nor_does_it_matter_where_experts_are(
    ranks: int, models: Path, sparse_reference: dict[str, Any], tmp_path: Path
) -> None:
    cases = sparse_cases(SPARSE[ranks])
    check(run(ranks, models, cases, tmp_path, family="qwen3_moe"), cases, sparse_reference)


@pytest.mark.parametrize("ranks", [1, 2])
def test_nor_that_their_products_are_grouped(
    ranks: int, models: Path, sparse_reference: dict[str, Any], tmp_path: Path
) -> None:
    cases = sparse_cases(SPARSE_WITH_TRANSFORMER_ENGINE[ranks])
    results = run(ranks, models, cases, tmp_path, transformer_engine=True, family="qwen3_moe")
    check(results, cases, sparse_reference)


def sparse_cases(layouts: dict[str, list[str]]) -> dict[str, list[str]]:
    recipe = RECIPES[SPARSE_RECIPE] + BALANCED
    return {f"{SPARSE_RECIPE} | {name}": [*recipe, *o] for name, o in layouts.items()}


def check(results: dict[str, Any], cases: dict[str, Any], reference: dict[str, Any]) -> None:
    wrong = [
        f"{name}: {measured} instead of {reference[name.split(' | ')[0]]}"
        for name, measured in results.items()
        for step, expected in zip(measured, reference[name.split(" | ")[0]], strict=True)
        if step != pytest.approx(expected, rel=RELATIVE, abs=ABSOLUTE)
    ]
    assert len(results) == len(cases)
    assert not wrong, "\n".join(wrong)


def test_recipes_differ_from_each_other(reference: dict[str, Any]) -> None:
    """So that the comparison of layouts says something about each of them."""
    # Rollouts, along which estimates go, are scored in one context.
    twice = [f"{mode} refine {name}" for mode in ("opd", "opsd") for name in ("k1", "k3")]
    first_losses = [steps[0][0] for name, steps in reference.items() if name not in twice]
    assert len(set(first_losses)) == len(RECIPES) - len(twice)
