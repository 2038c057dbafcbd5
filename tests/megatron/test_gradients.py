"""The gradient of every parameter, and values at labels, against transformers' logits."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch
from model_checks import of_each_expert
from oracles import DIVERGENCES, ESTIMATORS, TAILS, make_loss
from safetensors.torch import load_file, save_file
from tiny_models import YARN, make_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers_oracle import load_balancing

from nemo_trd.data.types import Trajectory
from nemo_trd.loss.formulas import dense_divergence

pytestmark = pytest.mark.distributed

VOCABULARY, TEACHER_VOCABULARY = 120, 136  # the same ids, padded differently
LABELS = (5, 1, 9, 3, 14)  # 32 in all; one answer is a single token
# The student computes 6, 1, 12, 6 and 54 tokens of them: two are equal, one is a single token, and
# one is longer than the others together; the sum, 79, is odd.
CONTEXTS = (2, 1, 4, 4, 41)
# student's architecture: its embeddings
TIED = {"llama": True, "qwen2": False, "qwen3": False, "qwen3_moe": False}
DIFFERENCES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {"rope_parameters": YARN},  # scores have a factor
    "qwen3_moe": {"mlp_only_layers": [0]},  # the other layer is sparse
}
# Both temperatures meet chunks that do and do not divide 32.
NUMBERS = ((1.7, 8), (1.0, 5), (1.7, 5), (1.0, 8))
RECIPES = {
    f"{name} {tail}": make_loss(
        name, tail, temperature=NUMBERS[i % 4][0], chunk_size=NUMBERS[i % 4][1]
    )
    for i, (name, tail) in enumerate(product(DIVERGENCES, TAILS))
}
# Each model has every divergence and every tail.
RECIPES_OF = {
    model: [recipe for i, recipe in enumerate(RECIPES) if (i + i // 3) % 3 == number]
    for number, model in enumerate(("llama", "qwen2", "qwen3"))
}
# And each a clip of entries and an estimate.
CLIPS = {
    "llama": ("forward_kl", "full"),
    "qwen2": ("reverse_kl", "bucket"),
    "qwen3": ("jsd", "full"),
}
for i, (model, (name, tail)) in enumerate(CLIPS.items()):
    estimator = ESTIMATORS[i % 2]
    clipped = make_loss(name, tail, entry_clip=3e-4, temperature=1.7, chunk_size=5)
    own = {f"{name} {tail}, clip": clipped, f"{estimator} {model}": make_loss(estimator)}
    RECIPES |= own
    RECIPES_OF[model] += own
# With experts. More recipes would say nothing more: the loss does not know the layers.
RECIPES["forward_kl renormalize, balanced"] = RECIPES["forward_kl renormalize"]
SPARSE_RECIPES_OF = {"qwen3_moe": ["forward_kl renormalize", "forward_kl renormalize, balanced"]}
COEFFICIENTS = {"forward_kl renormalize, balanced": 0.03}  # of the load-balancing loss
TP2 = ["parallel.student.tensor_model_parallel_size=2"]
PP2 = ["parallel.student.pipeline_model_parallel_size=2"]
SP = ["parallel.student.sequence_parallel=true"]
CP2 = ["parallel.student.context_parallel_size=2"]
TEACHER_TP2 = ["parallel.teacher.tensor_model_parallel_size=2"]
TEACHER_CP2 = ["parallel.teacher.context_parallel_size=2"]
SMALL_BATCHES = ["train.max_tokens_per_micro_batch=40"]
EP2 = ["parallel.student.expert_model_parallel_size=2"]
ETP2 = ["parallel.student.expert_tensor_parallel_size=2"]
EP4 = ["parallel.student.expert_model_parallel_size=4"]
SPARSE_LAYOUTS = {
    1: {"one batch": [], "small batches": [*SMALL_BATCHES, "train.recompute=full"]},
    2: {
        "dp2": [],
        "ep2": [*EP2, *SMALL_BATCHES],
        "tp2 sp ep2": [*TP2, *SP, *EP2],
        "tp2 sp etp2": [*TP2, *SP, *ETP2, *SMALL_BATCHES],
        "cp2 ep2": [*CP2, *EP2, *TEACHER_CP2],
        "etp2": ETP2,
        "tp2 sp": [*TP2, *SP],
        "pp2": PP2,
    },
    4: {
        "ep4": EP4,
        "ep2 dp2": [*EP2, *SMALL_BATCHES],
        "ep2 tp2 sp": [*EP2, *TP2, *SP],
        "ep2 etp2 tp2 sp": [*EP2, *ETP2, *TP2, *SP, *SMALL_BATCHES],
        "ep2 pp2": [*EP2, *PP2, *SMALL_BATCHES],
        "ep4 cp2": [*EP4, *CP2],
    },
}
WITH_FILLERS = ("tp2 dp2", "dp2")
LAYOUTS = {
    1: {"one batch": [], "small batches": SMALL_BATCHES},
    2: {
        "tp2": [*TP2, *SMALL_BATCHES],
        "tp2 sp": [*TP2, *SP],
        "pp2": [*PP2, *TEACHER_TP2],
        "cp2": [*CP2, *TEACHER_CP2, *SMALL_BATCHES],
        "cp2, teacher dp2": CP2,
        "dp2, teacher cp2": TEACHER_CP2,
    },
    4: {
        "tp4 sp": ["parallel.student.tensor_model_parallel_size=4", *SP],
        "tp2 pp2 sp": [*TP2, *PP2, *SP, *TEACHER_TP2, *SMALL_BATCHES],
        "tp2 dp2": TP2,
        # Sequences of 2 and 5 tokens in 8 parts; one answer is a single token.
        "cp4": ["parallel.student.context_parallel_size=4", *TEACHER_CP2],
        "cp2 tp2 sp": [*CP2, *TP2, *SP, *TEACHER_TP2, *TEACHER_CP2],
        "cp2 pp2": [*CP2, *PP2, *TEACHER_TP2, *SMALL_BATCHES],
        "cp2 dp2": [*CP2, *SMALL_BATCHES],
    },
}


def trajectories() -> list[Trajectory]:
    def tokens(start: int, count: int) -> tuple[int, ...]:  # not 0: its embedding is frozen there
        return tuple((start + 7 * i) % (VOCABULARY - 1) + 1 for i in range(count))

    return [
        Trajectory(i, 0, "refinement", tokens(i, c), tokens(50 + i, 4), tokens(90 + i, n), 0)
        for i, (c, n) in enumerate(zip(CONTEXTS, LABELS, strict=True))
    ]


def label_logits(model: Any, context: tuple[int, ...], labels: tuple[int, ...]) -> Tensor:
    logits = model(torch.tensor([context + labels])).logits[0, len(context) - 1 : -1]
    return logits[:, :VOCABULARY].double()


def label_nll(model: Any, trajectory: Trajectory) -> Tensor:
    logits = label_logits(model, trajectory.student_context, trajectory.labels)
    return cross_entropy(logits, torch.tensor(trajectory.labels), reduction="none")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and what is expected of them in float64, row by row.

    By model the negative log-likelihoods of labels; by recipe loss, gradients, and divergences at
    labels. Those at labels by name of the trajectory.
    """
    root = tmp_path_factory.mktemp("models")
    sizes = {"intermediate_size": 48, "head_dim": 8, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 4}
    wide = {"vocab_size": TEACHER_VOCABULARY, "hidden_size": 48}
    make_model(root / "teacher", "qwen3", seed=1, **sizes, **wide)
    own = {"vocab_size": VOCABULARY, "hidden_size": 32}
    load = AutoModelForCausalLM.from_pretrained
    teacher = load(root / "teacher", dtype=torch.float64)
    expected: dict[str, Any] = {}
    for model, tied in TIED.items():
        settings: dict[str, Any] = {"tie_word_embeddings": tied, **sizes, **own}
        settings |= DIFFERENCES[model]
        path = make_model(root / model, model, **settings)
        if model == "qwen3_moe":
            make_rivals(path)
        # Grouped products, which transformers would take, know no float64.
        student = load(path, dtype=torch.float64, experts_implementation="eager")
        with torch.no_grad():
            expected[model] = {t.name: label_nll(student, t) for t in trajectories()}
        for recipe in (RECIPES_OF | SPARSE_RECIPES_OF)[model]:
            loss = RECIPES[recipe]
            at_labels, unclipped = {}, {}
            for t in trajectories():
                with torch.no_grad():
                    other = label_logits(teacher, t.teacher_context, t.labels)
                logits = label_logits(student, t.student_context, t.labels)
                labels = torch.tensor(t.labels)
                at_labels[t.name] = dense_divergence(logits, other, loss, labels)
                whole = loss.model_copy(update={"entry_clip": None})
                unclipped[t.name] = dense_divergence(logits, other, whole, labels).detach()
            student.zero_grad()
            mean = torch.cat(list(at_labels.values())).sum() / sum(LABELS)
            before_clip = torch.cat(list(unclipped.values())).sum() / sum(LABELS)
            assert loss.entry_clip is None or mean < 0.9 * before_clip
            mean.backward()
            figures = {"loss": mean.item()}
            if coefficient := COEFFICIENTS.get(recipe):
                balance, load = load_balancing(student, trajectories())
                (coefficient * balance).backward()  # of the one sparse layer
                figures |= {"load_balancing_loss": balance.item(), "max_expert_load": load}
            gradients = of_each_expert({n: p.grad.clone() for n, p in student.named_parameters()})
            if model in SPARSE_RECIPES_OF:
                without_tokens = [name for name, value in gradients.items() if not value.any()]
                assert sorted({name.split(".")[5] for name in without_tokens}) == ["4"]
            expected[f"{model} {recipe}"] = figures, gradients, unclipped
    torch.save(expected, root / "expected.pt")
    return root


def make_rivals(path: Path) -> None:
    """Give experts of each layer equal scores, and expert 4 a score in the middle of two pairs.

    So a choice among equal ones must be transformers', and expert 4 is never among the best two.
    """
    weights = load_file(path / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("mlp.gate.weight"):
            weight[1], weight[6], weight[7] = weight[0], weight[5], weight[5]
            weight[4] = (weight[0] + weight[5]) / 2
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def check_layouts(
    directory: str, layouts: dict[str, list[str]], recipes_of: dict[str, list[str]]
) -> None:
    """On every rank."""
    from nemo_trd.distributed.process import init_distributed

    watch = init_distributed(timeout_minutes=2)
    expected = torch.load(Path(directory) / "expected.pt")
    for (layout, overrides), model in product(layouts.items(), recipes_of):
        student, states, plan = prepare(directory, model, overrides, fillers=layout in WITH_FILLERS)
        own = student._config
        check_values(student.token_nll(trajectories()), expected[model], f"{layout}, {model}")
        if student.groups.pp.size() == 1:
            check_segments_are_apart(student, plan[student.groups.dp.rank()][0].student)
        for recipe in recipes_of[model]:
            student._head.loss = RECIPES[recipe]
            of_experts = {"moe_aux_loss_coeff": COEFFICIENTS.get(recipe, 0.0)}
            student._config = own.model_copy(
                update={"student": own.student.model_copy(update=of_experts)}
            )
            measured = loss_and_gradients(student, plan, states)
            compare(measured, expected[f"{model} {recipe}"], f"{layout}, {model}, {recipe}")
    print("all gradients agree", flush=True)
    watch.close()


def check_segments_are_apart(student: Any, batch: Any) -> None:
    """Other tokens in one segment: those of the others come out bit for bit the same.

    Where experts compute tokens of all segments in one product, rounding depends on their number.
    """
    from nemo_trd.megatron.context_parallel import own_context
    from nemo_trd.megatron.schedule import run_model

    cp = student.groups.cp
    segment = max(range(len(batch.lengths)), key=lambda i: batch.lengths[i])
    changed = slice(*batch.cu_seqlens[segment : segment + 2].tolist())
    other = replace(batch, tokens=batch.tokens.clone())
    other.tokens[0, changed] = other.tokens[0, changed] % (VOCABULARY - 2) + 1
    with torch.no_grad():
        parts = [own_context(pack, cp.size(), cp.rank()) for pack in (batch, other)]
        before, after = (run_model(student.chunks[0], part)[:, 0] for part in parts)
    same = torch.ones(batch.tokens.numel(), dtype=torch.bool)
    same[changed] = False
    same = same if cp.size() == 1 else same[parts[0].places]
    if student.layout.sequence_parallel:
        same = same.chunk(student.groups.tp.size())[student.groups.tp.rank()]
    rounding = 1e-5 if student.models[0].config.num_moe_experts else 0.0
    assert torch.equal(((before - after).abs() <= rounding).all(-1), same)


def prepare(directory: str, model: str, overrides: list[str], fillers: bool) -> tuple[Any, ...]:
    """Student, teacher states and micro-batches; `fillers`: one of many has all the labels."""
    from nemo_trd.algorithm.micro_batches import make_micro_batch
    from nemo_trd.config.load import compose
    from nemo_trd.megatron.student import Student
    from nemo_trd.megatron.teacher import Teacher

    models = [f"model.student.path={directory}/{model}"]
    models += [f"model.teacher.path={directory}/teacher"]
    config = compose(["model=local", "precision.dtype=fp32", *models, *overrides])
    student = Student(config)
    teacher = Teacher(config, student.groups)
    plan = student.pack(trajectories())
    if fillers:
        empty = make_micro_batch([])
        full = make_micro_batch([t for rank in plan for b in rank for t in b.trajectories])
        plan = [[empty, full if rank == 0 else empty, empty] for rank in range(len(plan))]
    fill_padding_with_nan(student)
    return student, teacher.states(plan), plan


def loss_and_gradients(student: Any, plan: Any, states: Any) -> tuple[Any, ...]:
    """Of one step, which updates nothing, with the divergences at labels."""
    gradients: dict[str, Tensor] = {}

    def step() -> tuple[bool, float, None]:
        parameters = [p for model in student.models for p in model.parameters()]
        weights = [p.data.clone() for p in parameters]
        for parameter in parameters:
            parameter.data.copy_(parameter.main_grad)
        gradients.update((name, x.clone()) for name, x in student.export_hf_weights())
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data.copy_(weight)
        return True, 0.0, None

    student.optimizer.step = step
    result = student.train_step(plan, states, [t.name for t in trajectories()])
    if "load_balancing_loss" in result.metrics:
        compared = student.compare(plan, states).metrics
        both = {name: compared[name] for name in ("load_balancing_loss", "max_expert_load")}
        assert both == pytest.approx({name: result.metrics[name] for name in both}, rel=1e-6)
    divergences = {name: values.divergence for name, values in result.watched.items()}
    return result.metrics, gradients, divergences


def fill_padding_with_nan(student: Any) -> None:
    tp, model = student.groups.tp, student.models[-1]
    if model.post_process:
        weight = model.output_weight().data
        first = max(0, VOCABULARY - tp.rank() * len(weight))
        weight[first:] = float("nan")
        student._head.teacher_weight[first:] = float("nan")


def compare(measured: tuple[Any, ...], expected: tuple[Any, ...], where: str) -> None:
    (metrics, gradients, values), (figures, exact, exact_values) = measured, expected
    assert {name: metrics[name] for name in figures} == pytest.approx(figures, rel=1e-5), where
    assert ("load_balancing_loss" in metrics) == ("load_balancing_loss" in figures)
    assert gradients.keys() == exact.keys()
    for name, gradient in gradients.items():
        # An expert without a token has a gradient of zero.
        error = (gradient.double() - exact[name]).norm() / (exact[name].norm() or 1.0)
        assert error < 1e-5, f"{where}, {name}: {error:.1e}"
    check_values(values, exact_values, where)


def check_values(measured: dict[str, list[float]], exact: dict[str, Tensor], where: str) -> None:
    """Values at labels by trajectory."""
    assert measured.keys() == exact.keys(), where
    for name, values in measured.items():
        assert values == pytest.approx(exact[name].tolist(), rel=1e-4, abs=1e-6), f"{where}, {name}"


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gradients_of_all_parameters_are_those_of_dense_logits(ranks: int, directory: Path) -> None:
    arguments = (str(directory), LAYOUTS[ranks], RECIPES_OF)
    output = launch(ranks, check_layouts, *arguments, timeout=400)
    assert output.count("all gradients agree") == ranks


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_so_are_those_of_experts_wherever_they_are(ranks: int, directory: Path) -> None:
    arguments = (str(directory), SPARSE_LAYOUTS[ranks], SPARSE_RECIPES_OF)
    output = launch(ranks, check_layouts, *arguments, timeout=400)
    assert output.count("all gradients agree") == ranks


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_so_are_those_of_the_layers_of_transformer_engine(ranks: int, directory: Path) -> None:
    recipes_of = {model: recipes[:1] for model, recipes in RECIPES_OF.items()}
    arguments = (str(directory), LAYOUTS[ranks], recipes_of)
    output = launch(ranks, check_layouts, *arguments, timeout=400, transformer_engine=True)
    assert output.count("all gradients agree") == ranks
