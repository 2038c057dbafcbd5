"""`nemo_trd.plan`: its arithmetic against formulas and real models, its advice, its command."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from composed_once import compose
from live_bytes import LiveBytes

from nemo_trd.config.errors import ConfigError
from nemo_trd.config.schema import Adapter, Config, Layout, ModelSource
from nemo_trd.loss.divergences import DIVERGENCES
from nemo_trd.models.family import FAMILIES, experts_of
from nemo_trd.models.flops import forward_flops
from nemo_trd.plan.activations import (
    adapter_activation_bytes,
    layer_activation_bytes,
    micro_batches_in_flight,
)
from nemo_trd.plan.advice import advise, peak
from nemo_trd.plan.context_parallel import rings
from nemo_trd.plan.cost import bubble, loss_seconds, step_flops, step_time, with_nodes
from nemo_trd.plan.expert_exchange import expert_exchanges
from nemo_trd.plan.main import main
from nemo_trd.plan.memory import (
    GIB,
    checkpoint_bytes,
    largest_part,
    training_memory,
    vocabulary_rows,
)
from nemo_trd.plan.plan import Plan, make_plan
from nemo_trd.plan.shapes import (
    SHIPPED,
    active_adapter_parameters,
    adapter_parameters,
    as_namespace,
    key_value_bytes,
    parameters,
    read_model,
    stage_adapter_parameters,
    stage_parameters,
    touched_parameters,
)
from nemo_trd.plan.show import text

RECIPES = (
    "trd_70b",
    "trd_70b_32k",
    "trd_70b_lora",
    "trd_8b",
    "trd_30b_a3b",
    "paper_qwen3_1p7b",
    "paper_qwen3_1p7b_opd",
    "paper_qwen3_4b",
    "paper_qwen3_4b_opd",
    "paper_qwen3_8b",
    "paper_qwen3_8b_32k",
    "paper_qwen3_8b_code",
)
WHOLE = ["experiment=paper_qwen3_8b", "student.adapter=null"]
# With the teacher's whole distribution, from a teacher that the training node holds.
HELD = ["experiment=trd_8b", "parallel=tp8", "teacher.scoring=megatron", "loss.top_k=null"]
TINY = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}


def gpt(layers: int, hidden: int, heads: int, vocabulary: int = 51_200) -> SimpleNamespace:
    """The GPT of the published formulas: equal numbers of heads, a MLP of 4 h."""
    return SimpleNamespace(
        model_type="llama",  # no norms of queries and keys, no biases
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=None,
        intermediate_size=4 * hidden,
        vocab_size=vocabulary,
    )


def split(
    tp: int = 1, pp: int = 1, virtual: int | None = None, sp: bool = False, cp: int = 1
) -> Layout:
    return Layout(
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=virtual,
        sequence_parallel=sp,
    )


def shapes(config: Config) -> tuple[Any, Any]:
    student = read_model(config.model.student, "student")[0].hf
    return student, read_model(config.teacher_source, "teacher")[0].hf


def planned(*overrides: str) -> Plan:
    return make_plan(compose(list(overrides)))


# Parameters


REAL = [file for file in sorted(SHIPPED.glob("*.json")) if not file.stem.startswith("toy-")]


@pytest.mark.parametrize("file", REAL, ids=lambda file: file.stem)
def test_shipped_shapes_have_the_parameters_that_transformers_counts(file: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = json.loads(file.read_text())
    hf = AutoConfig.for_model(**settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf)
    shape = as_namespace(settings, file, "model")
    assert parameters(shape) == sum(p.numel() for p in model.parameters())
    assert parameters(shape) / 1e9 == pytest.approx(size_in_name(file.stem), rel=0.16)
    if "-A" in file.stem:  # of these so many active
        active = file.stem.removesuffix("B").rpartition("-A")[2]
        assert touched_parameters(shape, 1) / 1e9 == pytest.approx(float(active), rel=0.16)


def size_in_name(name: str) -> float:
    size = next(part for part in name.split("-") if part.endswith("B"))
    return float(size.removesuffix("B"))


def test_stages_together_hold_the_model_and_its_padding() -> None:
    shape = as_namespace({**TINY, "model_type": "qwen3", "head_dim": 16}, Path("x"), "m")
    whole = parameters(shape)
    assert stage_parameters(shape, split())[0].total == whole + 2 * (384 - 300) * 64
    stages = stage_parameters(shape, split(pp=2, virtual=2))
    assert sum(stage.total for stage in stages) == whole + 2 * (384 - 300) * 64
    assert stages[1].total - stages[0].total == 64  # the final norm
    tied = as_namespace({**vars(shape), "tie_word_embeddings": True}, Path("x"), "m")
    copies = [sum(s.total for s in stage_parameters(tied, split(pp=pp))) for pp in (1, 2)]
    assert copies[1] - copies[0] == 384 * 64  # the last stage's copy of the embedding


# Activations: Korthikanti et al. 2022, equations 1 to 6

SIZES_70B = [(8192, 64, 2048), (8192, 64, 8192), (12288, 96, 2048)]  # h, a, s


@pytest.mark.parametrize(("hidden", "heads", "length"), SIZES_70B)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("tp", [1, 8])
def test_activations_are_the_published_formula(
    hidden: int, heads: int, length: int, batch: int, tp: int
) -> None:
    hf, sbh = gpt(80, hidden, heads), length * batch * hidden
    quadratic = 5 * heads * length / hidden

    def layer(sequence_parallel: bool, recompute: str = "none") -> int:
        return layer_activation_bytes(
            hf,
            length * batch,
            length,
            split(tp, sp=sequence_parallel),
            element=2,
            gated=False,
            dropout=True,
            fused_attention=False,
            recompute=recompute,
        )

    norms = 2 * 4 * length * batch  # statistics, which the formula leaves out
    assert layer(False) == sbh * (10 + 24 / tp + quadratic / tp) + norms
    assert layer(True) == (sbh * (34 + quadratic) + norms) / tp
    assert layer(False, "selective") == sbh * (10 + 24 / tp) + norms
    assert layer(True, "selective") == (sbh * 34 + norms) / tp
    assert layer(False, "full") == 2 * sbh
    assert layer(True, "full") == 2 * sbh / tp


def test_activations_in_flight_are_the_published_ones() -> None:
    """First stage: L layers' worth with 1F1B, L (1 + (p - 1) / (p m)) with m virtual stages."""
    for pp in (2, 4, 8):
        assert micro_batches_in_flight(split(pp=pp), 0) / pp == 1
        assert micro_batches_in_flight(split(pp=pp), pp - 1) == 1
        for virtual in (2, 3):
            first = micro_batches_in_flight(split(pp=pp, virtual=virtual), 0)
            assert first / pp == pytest.approx(1 + (pp - 1) / (pp * virtual))


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_full_recompute_keeps_what_autograd_keeps_of_a_real_model(
    architecture: str, dtype: str, one_rank: Any
) -> None:
    element = {"bf16": 2, "fp32": 4}[dtype]
    kept = [saved_bytes(architecture, layers, dtype, one_rank) for layers in (2, 4)]
    shape = as_namespace({**tiny(architecture), "model_type": architecture}, Path("x"), "m")
    formula = layer_activation_bytes(shape, 2 * 64, 64, split(), element, recompute="full")
    assert kept[1] - kept[0] == 2 * formula


def test_an_adapter_on_experts_keeps_what_autograd_keeps_of_a_real_one(one_rank: Any) -> None:
    shape = as_namespace({**tiny("qwen3_moe"), "model_type": "qwen3_moe"}, Path("x"), "m")
    kept, formula = [], []
    for rank in (4, 20):
        own = ["student.adapter=lora", f"student.adapter.rank={rank}"]
        adapter = compose([*own, "student.adapter.targets=[gate,up,down]"]).student.adapter
        assert adapter is not None
        three, one = (saved_bytes("qwen3_moe", n, "bf16", one_rank, adapter) for n in (3, 1))
        kept.append(three - one)
        formula.append(2 * adapter_activation_bytes(shape, 0, 2 * 64, split(), 2, adapter))
    assert kept[1] - kept[0] == formula[1] - formula[0] > 0


def test_an_adapter_keeps_what_autograd_keeps_of_a_real_one(one_rank: Any) -> None:
    shape = as_namespace(TINY, Path("x"), "m")
    kept, formula = [], []
    for rank, dropout in ((4, 0.0), (20, 0.0), (4, 0.5), (20, 0.5)):
        own = [f"student.adapter.rank={rank}", f"student.adapter.dropout={dropout}"]
        targets = "student.adapter.targets=[q,k,o,up,down]"
        adapter = compose(["student.adapter=lora", *own, targets]).student.adapter
        assert adapter is not None
        # Of two layers that are not the first, into which nothing goes that has a gradient.
        three, one = (saved_bytes("llama", n, "bf16", one_rank, adapter) for n in (3, 1))
        kept.append(three - one)
        formula.append(2 * adapter_activation_bytes(shape, 0, 2 * 64, split(), 2, adapter))
    for less, more in ((0, 1), (2, 3)):  # a higher rank
        assert kept[more] - kept[less] == formula[more] - formula[less] > 0
    more = formula[2] - formula[0]  # with dropout; inputs that are not kept any more are counted
    assert 0.5 * more < kept[2] - kept[0] <= more


def tiny(architecture: str) -> dict[str, Any]:
    from tiny_models import EXPERTS

    sizes = {key: value for key, value in TINY.items() if key != "model_type"}
    return sizes | (EXPERTS if FAMILIES[architecture].sparse else {})


def saved_bytes(
    architecture: str, layers: int, dtype: str, groups: Any, adapter: Adapter | None = None
) -> int:
    """Of the tensors, parameters left out, that a forward pass saves for its backward pass."""
    import torch
    from model_checks import packed

    from nemo_trd.megatron.schedule import run_model

    recompute = "full" if adapter is None else "none"
    model = tiny_model(architecture, layers, dtype, groups, adapter, recompute)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor  # held: its place is not reused
        return tensor

    tokens = torch.zeros(2, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_model(model, packed(tokens))
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def tiny_model(
    architecture: str,
    layers: int,
    dtype: str,
    groups: Any,
    adapter: Adapter | None,
    recompute: Any,
) -> Any:
    """A model of Megatron on one rank, with an adapter on it or none."""
    from tiny_models import CONFIGS

    from nemo_trd.megatron.lora import add_adapters
    from nemo_trd.megatron.model import build_model

    hf = CONFIGS[architecture](**(tiny(architecture) | {"num_hidden_layers": layers}))
    precision = compose([f"precision.dtype={dtype}"]).precision
    (model,) = build_model(hf, split(), groups, precision, recompute=recompute)
    if adapter is not None:
        add_adapters([model], hf, adapter, groups, seed=0)
    return model


# FLOPs: Narayanan et al. 2021


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_frozen_weights_have_no_products_for_gradients(architecture: str, one_rank: Any) -> None:
    """A step of two layers that are not the first, as torch counts it, is that of the plan."""
    sizes = {**tiny(architecture), "model_type": architecture, "num_hidden_layers": 2}
    tokens, shape = 2 * 64, as_namespace(sizes, Path("x"), "m")
    adapter = compose(["student.adapter=lora", "student.adapter.rank=4"]).student.adapter
    assert adapter is not None
    whole, adapted = (
        counted_flops(architecture, 3, one_rank, trained)
        - counted_flops(architecture, 1, one_rank, trained)
        for trained in (None, adapter)
    )
    frozen = forward_flops(shape, tokens, 0, logits=0)
    if experts := experts_of(shape):  # megatron-core forms the gradient of a frozen router as well
        frozen -= 2 * 2 * shape.hidden_size * experts.count * tokens
    matrices = 2 * active_adapter_parameters(shape, adapter) * tokens
    assert whole - adapted == frozen - 3 * matrices


def counted_flops(architecture: str, layers: int, groups: Any, adapter: Adapter | None) -> int:
    """Of a forward and a backward pass over 128 tokens."""
    import torch
    from model_checks import packed
    from torch.utils.flop_counter import FlopCounterMode

    from nemo_trd.megatron.schedule import run_model

    model = tiny_model(architecture, layers, "fp32", groups, adapter, "none")
    with FlopCounterMode(display=False) as counter:
        run_model(model, packed(torch.zeros(2, 64, dtype=torch.long))).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("layers", "hidden", "heads"), [(80, 8192, 64), (96, 12288, 96)])
def test_flops_are_the_published_formula(layers: int, hidden: int, heads: int) -> None:
    vocabulary, length, batch = 51_200, 2048, 16
    hf, tokens = gpt(layers, hidden, heads, vocabulary), batch * length
    base = batch * length * layers * hidden**2
    forward = forward_flops(hf, tokens, length, logits=tokens, gated=False)
    correction = length / (6 * hidden) + vocabulary / (12 * layers * hidden)
    assert 3 * forward == pytest.approx(72 * base * (1 + correction))
    without_logits = forward_flops(hf, tokens, length, logits=0, gated=False)
    recomputed = 3 * forward + without_logits  # appendix: with activation recomputation
    correction = length / (6 * hidden) + vocabulary / (16 * layers * hidden)
    assert recomputed == pytest.approx(96 * base * (1 + correction))


def test_flops_are_about_two_for_each_parameter_and_token() -> None:
    student, _ = shapes(compose(["experiment=trd_70b"]))
    assert forward_flops(student, 1, 0, logits=1) == pytest.approx(2 * 70.55e9, rel=0.02)


def test_experts_cost_what_a_token_passes_through_and_sends() -> None:
    config = compose(["experiment=trd_30b_a3b", "cluster.assumptions.mean_length=1.0"])
    student, teacher = shapes(config)
    embedding = student.vocab_size * student.hidden_size
    outside = 2 * (touched_parameters(student, 1) - embedding)
    assert forward_flops(student, 1, 0, logits=1) == pytest.approx(outside, rel=1e-3)  # no norms
    sent = expert_exchanges(config, student, teacher)
    assert set(sent) == {"student"}  # servers hold the teacher
    tokens = 128 * (1024 + 4096) / 8  # of each GPU of a stage
    # To eight experts of 128 on eight GPUs and back, in 24 layers, forwards and backwards, bf16.
    copies = tokens * 8 * 7 / 8
    assert sent["student"].bytes == pytest.approx(copies * (2048 * 2 * 2 + 4) * 24 * 2)
    assert 0.98 * parameters(student) < touched_parameters(student, 64) < parameters(student)


def test_step_counts_the_loss_at_labels_only_and_recomputation() -> None:
    config = compose(HELD)
    student, teacher = shapes(config)
    flops = step_flops(config, student, teacher)
    labels = 128 * 4096 * 0.5
    assert flops.loss == labels * 128_256 * 2 * (3 * 4096 + 8192)
    full = step_flops(compose([*HELD, "train.recompute=full"]), student, teacher)
    assert full.student == pytest.approx(flops.student * 4 / 3)
    assert (full.teacher, full.loss) == (flops.teacher, flops.loss)


# Memory


@pytest.mark.parametrize(
    ("divergence", "limit"),
    [
        (name, limit)
        for name, divergence in DIVERGENCES.items()
        for limit in ("top_k=null", "top_k=32", "entry_clip=0.001")
        if divergence.estimates is None or limit == "top_k=null"
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_loss_workspace_is_what_the_loss_allocates(
    divergence: str,
    limit: str,
    temperature: float,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The logits of a chunk in one block, as on a GPU; rows and vocabulary as in the formula."""
    import torch

    from nemo_trd.loss import comparison
    from nemo_trd.loss import fused as losses
    from nemo_trd.plan.memory import Lengths, loss_workspace_bytes

    rows, vocabulary, hidden, chunk = 64, 4096, 64, 32
    config = compose(
        [
            f"loss.divergence={divergence}",
            *(f"loss.{limit}", "algorithm.trajectory=rollout"),
            f"loss.chunk_size={chunk}",
            f"loss.temperature={temperature}",
            f"precision.dtype={dtype}",
        ]
    )
    shape = SimpleNamespace(vocab_size=vocabulary, hidden_size=hidden)
    formula = loss_workspace_bytes(config, shape, Lengths(0, 0, rows, rows, rows))
    monkeypatch.setattr(comparison, "CPU_BLOCK_BYTES", 1 << 40)
    exact = torch.bfloat16 if dtype == "bf16" else torch.float32
    student, weight, teacher, teacher_weight = (
        torch.randn(n, hidden, dtype=exact) for n in (rows, vocabulary, rows, vocabulary)
    )
    labels = torch.randint(0, vocabulary, (rows,))
    student.requires_grad_()
    inputs = student, weight, teacher, teacher_weight, labels
    main_grad = torch.zeros(vocabulary, hidden)
    with LiveBytes(beside=(*inputs, main_grad)) as live:
        output = losses.fused_divergence(
            *inputs, config.loss, vocabulary, weight_gradient=main_grad
        )
        output.loss_sum.backward()
    assert live.peak <= formula <= 1.1 * live.peak


def test_offloading_takes_the_teacher_off_the_gpu() -> None:
    plain = planned(*HELD)
    assert peak(plain.memory).peak_phase == "student"
    weights = planned(*HELD, "teacher.offload_weights=true")
    assert "teacher weights" not in peak(weights.memory).phases["student"]
    assert "teacher weights" in peak(weights.memory).phases["teacher"]
    states = planned(*HELD, "teacher.offload_states=true")
    parts = [peak(p.memory).phases["student"]["hidden states"] for p in (plain, states)]
    assert parts[0] == 128 * 4096 * 8192 * 2  # every label of the step
    assert parts[1] == 16_384 * 8192 * 2  # of one micro-batch


def test_a_teacher_that_scores_on_servers_is_on_no_training_gpu() -> None:
    held = planned(*HELD, "loss.top_k=64")
    served = planned(*HELD, "loss.top_k=64", "teacher.scoring=server")
    assert "teacher" in peak(held.memory).phases and "teacher" not in peak(served.memory).phases
    parts = [peak(p.memory).phases["student"] for p in (held, served)]
    gone = {"teacher weights", "teacher output weight", "hidden states"}
    assert {name: size for name, size in parts[0].items() if name not in gone} == parts[1]
    more = planned(
        *(*HELD, "loss.top_k=64", "teacher.scoring=server"),
        "cluster.teacher_server_nodes=2",
    )
    one, two = (step_time(p.config, *shapes(p.config)).teacher for p in (served, more))
    assert two == pytest.approx(one / 2)
    written = planned(*HELD, "loss.top_k=64", "teacher.scoring=generation")
    assert step_time(written.config, *shapes(written.config)).teacher == 0
    assert peak(written.memory).phases == peak(served.memory).phases


def test_a_second_replica_halves_optimizer_and_hidden_states() -> None:
    one, two = (
        peak(planned("experiment=trd_70b", f"cluster.training_nodes={n}").memory) for n in (4, 8)
    )
    for part in ("optimizer", "hidden states"):
        halved = one.phases["student"][part] / 2
        assert two.phases["student"][part] == pytest.approx(halved, rel=1e-6)
    for part in ("weights", "gradients", "activations"):
        assert two.phases["student"][part] == one.phases["student"][part]


def test_context_parallel_ranks_share_tokens_optimizer_and_labels() -> None:
    layouts = [f"parallel={name}" for name in ("tp8_pp4", "tp8_cp2_pp4")]
    common = ("experiment=trd_70b_32k", "cluster.training_nodes=8", "train.prompts_per_step=64")
    apart, together = (peak(planned(*common, layout).memory) for layout in layouts)
    for part in ("weights", "gradients", "optimizer"):  # two replicas share an optimizer too
        assert apart.phases["student"][part] == together.phases["student"][part]
    # Of 33,792 tokens in 4 parts rank 1 holds the two in the middle, which are labels. On their way
    # are states of two micro-batches of the teacher, of half of 73,728 tokens each.
    assert together.phases["student"]["hidden states"] == 64 * 2 * 8448 * 8192 * 2
    assert together.phases["teacher"]["hidden states"] == (64 * 2 * 8448 + 2 * 36_864) * 8192 * 2
    for recompute in ("none", "full"):
        whole, half = (
            layer_activation_bytes(
                gpt(80, 8192, 64), 8192, 8192, split(8, sp=True, cp=cp), 2, recompute=recompute
            )
            for cp in (1, 2)
        )
        assert half == whole / 2


def test_saving_a_distributed_optimizer_takes_all_of_one_state_and_a_share() -> None:
    one, two = (
        peak(planned("experiment=trd_70b", f"cluster.training_nodes={n}").memory) for n in (4, 8)
    )
    parameters = one.phases["student"]["gradients"] // 4
    assert one.phases["checkpoint"]["gathered optimizer state"] == 4 * 2 * parameters
    assert two.phases["checkpoint"]["gathered optimizer state"] == pytest.approx(
        4 * 1.5 * parameters, rel=1e-6
    )
    plain = planned("experiment=trd_70b", "optimizer.distributed=false", "cluster.training_nodes=4")
    assert "checkpoint" not in peak(plain.memory).phases


def test_stages_of_different_pipelines_meet_on_the_ranks_that_hold_them() -> None:
    config = compose(
        [
            "experiment=trd_70b",
            "parallel.teacher.pipeline_model_parallel_size=2",
            "cluster.training_nodes=4",
        ]
    )
    memory = training_memory(config, *shapes(config))
    stages = [(gpu.student_stage, gpu.teacher_stage) for gpu in memory]
    assert stages == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert [len(gpu.ranks) for gpu in memory] == [8, 8, 8, 8]


def test_in_process_generation_is_counted_on_the_training_gpus(tmp_path: Path) -> None:
    plan = planned(f"model.student.path={directory(tmp_path)}", f"model.teacher.path={tmp_path}")
    (gpu,) = plan.memory
    shape = plan.student.hf  # type: ignore[union-attr]
    assert gpu.phases["rollout"]["KV cache"] == 64 * (64 + 1024) * key_value_bytes(shape, 4)
    assert gpu.phases["refinement"]["KV cache"] == 64 * (2048 + 1024) * key_value_bytes(shape, 4)
    assert gpu.parts["generation weights"] == 2 * parameters(shape) * 4
    assert plan.exit_code == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_teacher_that_follows_is_an_average_and_no_second_model(
    dtype: str, tmp_path: Path
) -> None:
    settings = ["algorithm.mode=opsd", "model.teacher=null", f"precision.dtype={dtype}"]
    stages = "pipeline_model_parallel_size=2"
    settings += [f"parallel.student.{stages}", f"parallel.teacher.{stages}"]
    settings += [f"model.student.path={directory(tmp_path)}", "cluster.gpus_per_node=2"]
    frozen, follows = (planned(*settings, *more) for more in ([], ["teacher.ema=0.9"]))
    own, _ = shapes(follows.config)
    for kind, old in zip(follows.memory, frozen.memory, strict=True):
        trained = kind.parts["gradients"] // 4
        for phase, parts in kind.phases.items():
            assert parts["teacher average"] == 4 * trained, phase
        in_place = kind.phases["teacher"].get("teacher weights", 0)
        assert in_place == (0 if dtype == "fp32" else 2 * trained)
        assert "teacher weights" not in kind.phases["student"]
        assert old.phases["student"]["teacher weights"] > 0
        output_weight = kind.phases["student"].get("teacher output weight", 0)
        last = kind.student_stage == 1
        rows = vocabulary_rows(own, follows.config.parallel.student)
        assert output_weight == (2 * rows * own.hidden_size if last and dtype == "bf16" else 0)
    sizes = [checkpoint_bytes(p.config, own)["checkpoint"] for p in (follows, frozen)]
    assert sizes[0] - sizes[1] == 4 * parameters(own)
    assert "the student's own weights, averaged over steps" in text(follows)


ON_EXPERTS = ["experiment=trd_30b_a3b", "student.adapter=lora"]
BAD_ON_EXPERTS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "one of gate and up": (
        ["student.adapter.targets=[q,up]"],
        ("student.adapter.targets = ['q', 'up']", "gate and up are one tensor", "name both"),
    ),
    "dropout": (
        ["student.adapter.dropout=0.1"],
        ("student.adapter.dropout = 0.1", "no dropout there", "set it to 0"),
    ),
    "ranks that split an expert": (
        ["parallel.student.expert_tensor_parallel_size=3"],
        ("parallel.student.expert_tensor_parallel_size = 3", "divide hidden_size", "2048"),
    ),
    "servers that are given the adapter": (
        ["generation.vllm.weight_sync.what=adapter"],
        ("generation.vllm.weight_sync.what = 'adapter'", "linear layers only", "merged"),
    ),
}


@pytest.mark.parametrize("fault", BAD_ON_EXPERTS)
def test_an_adapter_on_experts_that_cannot_be_is_refused(fault: str) -> None:
    overrides, parts = BAD_ON_EXPERTS[fault]
    problems = map(str, planned(*ON_EXPERTS, *overrides).findings.problems)
    assert any(all(part in problem for part in parts) for problem in problems)
    attention = [*overrides, "student.adapter.targets=[q,k,v,o]"]
    rest = map(str, planned(*ON_EXPERTS, *attention).findings.problems)
    assert not any(all(part in problem for part in parts) for problem in rest)


def test_an_adapter_on_experts_is_counted_expert_by_expert() -> None:
    whole, adapted = planned(*ON_EXPERTS[:1]), planned(*ON_EXPERTS, "student.adapter.rank=8")
    assert not adapted.findings.problems
    hf, adapter = shapes(adapted.config)[0], adapted.config.student.adapter
    assert adapter is not None
    attention = 8 * (2 * (2048 + 4096) + 2 * (2048 + 512))  # q and o; k and v
    expert = 8 * ((2048 + 2 * 768) + (768 + 2048))  # gate and up; down
    assert adapter_parameters(hf, adapter) == 48 * (attention + 128 * expert)
    assert active_adapter_parameters(hf, adapter) == 48 * (attention + 8 * expert)
    # PP 2, EP 8, TP 4: of the attention's matrices A or B is whole on each rank.
    split = 8 * ((2048 + 1024) + 2 * (2048 + 128) + (1024 + 2048))  # q; k and v; o
    own = stage_adapter_parameters(hf, adapted.config.parallel.student, adapter)
    assert {stage.experts for stage in own} == {24 * 128 * expert // 8}
    assert {stage.total - stage.experts for stage in own} == {24 * split}
    (before, after) = (plan.memory[0].phases["student"] for plan in (whole, adapted))
    for part in ("gradients", "optimizer"):
        assert after[part] < 0.1 * before[part]


def test_with_an_adapter_there_is_one_base_without_gradients_or_states() -> None:
    recipe = "experiment=paper_qwen3_8b"  # in opsd
    whole, adapted = planned(recipe, "student.adapter=null"), planned(recipe)
    hf, adapter = shapes(adapted.config)[0], adapted.config.student.adapter
    assert adapter is not None
    count = sum(
        adapter.rank * (inputs + outputs)  # of q, o; k, v; gate, up, down
        for inputs, outputs in [
            *[(4096, 4096)] * 2,
            *[(4096, 1024)] * 2,
            *[(4096, 12288)] * 3,
        ]
    )
    assert adapter_parameters(hf, adapter) == 36 * count
    (before, after) = (plan.memory[0].phases["student"] for plan in (whole, adapted))
    for part in ("gradients", "optimizer"):
        assert after[part] < 0.1 * before[part]
    assert before["teacher weights"] and before["teacher output weight"]
    assert not {"teacher weights", "teacher output weight"} & set(after)
    assert whole.flops and adapted.flops
    assert 2 / 3 < adapted.flops.student / whole.flops.student < 0.8
    assert "the student's own weights, without the adapter" in text(adapted)


# Recipes


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_fits_its_nodes(recipe: str, precision: str) -> None:
    if precision not in precisions(recipe):
        with pytest.raises(ConfigError, match="not computed in FP8"):
            raise planned(f"experiment={recipe}", f"precision={precision}").findings.problems[0]
        return
    plan = planned(f"experiment={recipe}", f"precision={precision}")
    assert plan.findings.problems == []
    assert plan.exit_code == 0
    assert plan.memory is not None
    for gpu in plan.memory:
        # What a checkpoint needs is counted, not estimated: less room is left for errors.
        for phase in gpu.phases:
            room = 0.95 if phase == "checkpoint" else 0.9
            assert gpu.total_during(phase) < room * 79.1 * GIB, phase


def precisions(recipe: str) -> list[str]:
    return ["bf16"] if recipe == "trd_30b_a3b" else ["bf16", "fp8"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_states_its_nodes_and_its_layout(recipe: str) -> None:
    from nemo_trd.config.load import conf_dir

    head = (conf_dir() / "experiment" / f"{recipe}.yaml").read_text().split("defaults:")[0]
    cluster = compose([f"experiment={recipe}"]).cluster
    nodes = [
        cluster.training_nodes, cluster.student_server_nodes, cluster.teacher_server_nodes
    ]  # fmt: skip
    assert (
        f"{sum(nodes)} = {nodes[0]} training + {nodes[1]} student servers + {nodes[2]} teacher "
        "servers" in head
    )
    assert "# Layout. " in head
    assert ("precision=fp8" in head) == ("fp8" in precisions(recipe))


@pytest.mark.parametrize("recipe", [*RECIPES, "trd_8b_one_node"])
def test_documented_memory_of_the_recipe_is_what_the_plan_says(recipe: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    (row,) = (line for line in page.splitlines() if line.startswith(f"| `{recipe}` |"))
    totals = [
        peak(planned(f"experiment={recipe}", f"precision={p}").memory).total / GIB
        for p in precisions(recipe)
    ]
    assert [f"{total:.0f} GiB" for total in totals] == re.findall(r"\d+ GiB", row)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_with_half_its_nodes_names_what_does_not_fit(recipe: str) -> None:
    config = compose([f"experiment={recipe}"])
    cluster = config.cluster
    nodes = [cluster.training_nodes, cluster.student_server_nodes, cluster.teacher_server_nodes]
    total = sum(nodes) // 2
    half = [max(1, nodes[0] // 2), nodes[1] // 2, nodes[2] // 2]
    assert sum(half) <= total
    plan = make_plan(with_nodes(config, *half))
    assert plan.exit_code == 2
    if recipe == "trd_70b_32k":
        assert plan.fallback is not None
        assert plan.fallback.parallel.student.context_parallel_size == 1
        assert not plan.fits
    elif recipe == "trd_70b":
        assert plan.fallback is not None
        assert plan.fallback.parallel.student.pipeline_model_parallel_size == 2
        assert not plan.fits
        assert largest_part(peak(plan.memory).parts) == "optimizer"
    elif recipe == "trd_30b_a3b":  # half of the ranks that share out the experts
        assert plan.fallback is not None
        assert plan.fallback.parallel.student.expert_model_parallel_size == 4
        assert "ranks hold the student's experts" in str(plan.findings.problems[0])
        assert not plan.fits
    else:
        assert "one student server takes" in str(plan.findings.problems[0])


@pytest.mark.parametrize(
    ("recipe", "largest"),
    [(HELD, "teacher weights"), (WHOLE, "activations")],
    ids=["trd_8b", "paper_qwen3_8b"],
)
def test_recipe_with_half_its_gpus_names_what_does_not_fit(recipe: list[str], largest: str) -> None:
    plan = planned(*recipe, "cluster.gpus_per_node=4", "cluster.teacher_server_tp=4")
    assert plan.fallback is not None and not plan.fits
    assert largest_part(peak(plan.memory).parts) == largest


def test_layout_reasons_of_the_recipes_hold() -> None:
    def total(*overrides: str) -> float:
        return peak(planned(*overrides).memory).total / GIB

    def tp(size: int) -> list[str]:
        return [f"parallel.{r}.tensor_model_parallel_size={size}" for r in ("student", "teacher")]

    assert total("experiment=trd_70b", "train.recompute=none") > 79.1
    assert total("experiment=trd_8b", *tp(2)) > 0.9 * 79.1
    for precision, apart, together in (("bf16", 66, 60), ("fp8", 68, 62)):
        recipe = ("experiment=trd_70b_32k", f"precision={precision}")
        assert total(*recipe, "parallel=tp8_pp4") == pytest.approx(apart, abs=0.5)
        assert total(*recipe) == pytest.approx(together, abs=0.5)
    for precision, four in (("bf16", 69), ("fp8", 72)):
        recipe = ("experiment=paper_qwen3_8b", f"precision={precision}")
        assert total(*recipe, *tp(4)) == pytest.approx(four, abs=0.5)
    assert four > 0.9 * 79.1
    long, cp2 = (
        "experiment=paper_qwen3_8b_32k",
        [f"parallel.{r}.context_parallel_size=2" for r in ("student", "teacher")],
    )
    assert total(long) == pytest.approx(41, abs=0.5)
    assert total(long, "parallel=tp8") == pytest.approx(50, abs=0.5)
    assert total(long, "parallel=tp8", "train.recompute=none") == pytest.approx(91, abs=0.5)
    two_nodes = ("parallel=tp8", "train.recompute=none", "cluster.training_nodes=2")
    assert total(long, *cp2, *two_nodes) < 79.1
    for recipe in ("paper_qwen3_4b", "paper_qwen3_4b_opd"):
        assert total(f"experiment={recipe}", *tp(2)) > 79.1
    for recipe in ("paper_qwen3_1p7b", "paper_qwen3_1p7b_opd"):
        assert total(f"experiment={recipe}", *single("student"), *single("teacher")) > 79.1
    assert total("experiment=trd_70b_lora", "train.recompute=none") > 79.1


def test_an_adapter_on_70b_takes_three_nodes_a_quarter_longer_than_eight() -> None:
    eight, three = planned("experiment=trd_70b"), planned("experiment=trd_70b_lora")
    more = planned("experiment=trd_70b_lora", "cluster.teacher_server_nodes=2")
    times = [plan.split.time for plan in (eight, three, more) if plan.split]
    assert [round(time.training) for time in times] == [29, 93, 93]
    assert [round(time.generation) for time in times] == [91, 113, 96]
    assert times[1].total / times[0].total == pytest.approx(1.25, abs=0.03)
    begun = ("algorithm.mode=opd", "model.teacher.path=models/Llama-3.1-70B-Instruct")
    begun = (*begun, "student.adapter.init=/not/here")
    notes = planned("experiment=trd_70b_lora", *begun).findings.notes
    assert "student.adapter.init = /not/here: not on this machine" in notes
    parts = peak(three.memory).phases["student"]
    assert parts["weights"] / GIB == pytest.approx(17, abs=0.5)
    assert (parts["gradients"] + parts["optimizer"]) / GIB == pytest.approx(5, abs=0.5)


def single(role: str) -> list[str]:
    return [
        f"parallel.{role}.tensor_model_parallel_size=1",
        f"parallel.{role}.sequence_parallel=false",
    ]


# Advice


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=trd_70b", "train.recompute=none"],
        ["experiment=trd_70b", "cluster.gpu_memory_gib=58.0"],
        ["experiment=paper_qwen3_8b", "cluster.gpu_memory_gib=40.0"],
        # A layout of both models at once, since they are one.
        ["experiment=paper_qwen3_8b", "train.recompute=full", "parallel=tp4",
         "cluster.gpu_memory_gib=18.0"],
        [*HELD, "cluster.gpu_memory_gib=30.0"],  # takes several changes
        [*HELD, "optimizer.distributed=false", "cluster.gpu_memory_gib=45.0",
         "cluster.training_nodes=2"],
    ],
)  # fmt: skip
def test_advice_holds_what_it_promises(overrides: list[str]) -> None:
    config = compose(overrides)
    student, teacher = shapes(config)
    advice = advise(config, student, teacher)
    assert advice is not None and advice.fits
    followed = compose([*overrides, *advice.overrides])
    fullest = peak(training_memory(followed, student, teacher)).total
    assert fullest == advice.peak <= config.cluster.gpu_memory_gib * GIB


def test_advice_says_when_it_is_not_enough() -> None:
    config = compose(["experiment=trd_70b", "cluster.gpu_memory_gib=6.5"])
    advice = advise(config, *shapes(config))
    assert advice is not None and not advice.fits


# Time and balance


def test_time_follows_the_assumptions() -> None:
    config = compose(["experiment=trd_70b"])
    student, teacher = shapes(config)
    base = step_time(config, student, teacher)
    twice = step_time(with_nodes(config, 8, 4, 4), student, teacher)
    assert twice.teacher == pytest.approx(base.teacher / 2, rel=0.05)  # less a longer bubble
    assert twice.rollout < base.rollout
    slower = compose(["experiment=trd_70b", "cluster.assumptions.mfu=0.175"])
    assert step_time(slower, student, teacher).teacher == pytest.approx(base.teacher * 2)
    fp8 = step_time(compose(["experiment=trd_70b", "precision=fp8"]), student, teacher)
    assert fp8.teacher == pytest.approx(base.teacher * (989 * 0.35) / (1979 * 0.25))


def test_the_loss_takes_its_products_and_what_it_moves_through_memory() -> None:
    def seconds(*overrides: str) -> float:
        config = compose(["experiment=trd_70b", *overrides])
        return loss_seconds(config, *shapes(config))

    config = compose(["experiment=trd_70b"])
    gpus, rate, bandwidth = 8, 989e12 * 0.35, 3.35e12 * 0.5
    products = step_flops(config, *shapes(config)).loss / (gpus * rate)
    logits = 128 * 4096 * 0.5 * 128_256 / gpus
    assert seconds() == pytest.approx(products + logits * 18 / bandwidth)
    assert seconds("loss.divergence=jsd") == pytest.approx(products + logits * 30 / bandwidth)
    # A quarter of the products is the weight's gradient, which small chunks read and write often.
    gradient = logits * 8192 * 8 / 128 / bandwidth
    expected = products * 3 / 4 + gradient + logits * 18 / bandwidth
    assert seconds("loss.chunk_size=128") == pytest.approx(expected)


def test_overlapping_steps_take_as_long_as_the_longer_half() -> None:
    config = compose(["experiment=trd_70b"])
    ahead = step_time(config, *shapes(config))
    assert ahead.total == max(ahead.generation, ahead.training)
    config = compose(["experiment=trd_70b", "generation.max_staleness=0"])
    in_turns = step_time(config, *shapes(config))
    assert in_turns.total == ahead.generation + ahead.training


def test_measured_generation_speed_replaces_the_estimate() -> None:
    config = compose(["experiment=trd_70b", "cluster.assumptions.student_tokens_per_second=100.0"])
    student, teacher = shapes(config)
    expected = 128 * 4096 * 0.5 / (100 * 16)
    assert step_time(config, student, teacher).rollout == pytest.approx(expected)


def test_bubble_is_the_published_one() -> None:
    config = compose(["experiment=trd_70b"])  # 128 trajectories, two at mean length in 16k tokens
    assert bubble(config, "student") == bubble(config, "teacher") == pytest.approx(1 + 3 / 64)
    # Stages that interleave fill micro-batches by the student's sequences, less than half as long.
    interleaved = compose(
        ["experiment=trd_70b", "parallel.student.virtual_pipeline_model_parallel_size=4"]
    )
    assert bubble(interleaved, "student") == pytest.approx(1 + 3 / (4 * 24))
    assert bubble(interleaved, "teacher") == pytest.approx(1 + 3 / 64)


def test_keys_and_values_go_around_between_nodes_or_inside_one() -> None:
    config = compose(["experiment=trd_70b_32k"])
    student, teacher = shapes(config)
    rate = 0.35 * 989e12
    between = rings(config, student, teacher, rate)
    # Of 64 trajectories of half the length: two tensors of 8 x 128 in bf16 in 80 layers, over the
    # 8 tensor parallel ranks of a stage; once, in recomputation, and twice in the backward pass.
    sent = 64 * 0.5 * 33_792 / 2 * 4 * 8 * 128 * 80 / 4 / 8 * 4
    assert between["student"].exchange == pytest.approx(sent / 50e9)
    assert between["student"].waiting == 0  # attention takes longer
    inside = compose(["experiment=trd_70b_32k", "cluster.gpus_per_node=16"])
    faster = rings(with_nodes(inside, 4, 1, 1), student, teacher, rate)
    assert faster["student"].exchange == pytest.approx(sent / 450e9)
    slow = compose(["experiment=trd_70b_32k", "cluster.assumptions.network_gb=0.5"])
    waiting = rings(slow, student, teacher, rate)["student"].waiting
    assert waiting > 0
    bubble_factor = bubble(config, "student")
    times = [step_time(c, student, teacher).student for c in (config, slow)]
    assert times[1] - times[0] == pytest.approx(waiting * bubble_factor)
    alone = compose(["experiment=trd_70b"])
    assert rings(alone, *shapes(alone), rate)["teacher"].exchange == 0


def test_best_splits_are_the_best_of_all() -> None:
    plan = planned("experiment=trd_70b", "train.prompts_per_step=1024")
    assert plan.split and plan.fastest and plan.evenest and plan.evening
    config = plan.config
    student, teacher = shapes(config)
    for students in range(1, 4):
        other = step_time(with_nodes(config, 4, students, 4 - students), student, teacher)
        assert plan.fastest.time.total <= other.total
        worse = max(other.generation, other.training)
        assert max(plan.evenest.time.generation, plan.evenest.time.training) <= worse
    servers = (plan.evening.student_servers, plan.evening.teacher_servers)
    assert plan.evening.possible
    even = step_time(with_nodes(config, 4, *servers), student, teacher)
    assert even.generation <= even.training
    fewer = step_time(with_nodes(config, 4, servers[0], servers[1] - 1), student, teacher)
    assert fewer.generation > fewer.training


# Checks


def directory(path: Path, **settings: Any) -> Path:
    """A model directory that holds nothing but config.json."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(TINY | settings))
    return path


def test_a_directory_with_config_json_alone_is_enough(tmp_path: Path) -> None:
    model, note = read_model(ModelSource(path=str(directory(tmp_path / "m"))), "model.student.path")
    assert note is None and parameters(model.hf) > 0
    plan = planned(f"model.student.path={tmp_path / 'm'}", f"model.teacher.path={tmp_path / 'm'}")
    assert plan.exit_code == 0
    assert any("config.json alone" in line for line in plan.findings.notes)


REFUSED: dict[str, tuple[list[str], str]] = {
    "layout that does not divide the model": (
        ["experiment=trd_8b", "parallel.student.pipeline_model_parallel_size=3"],
        "parallel.student.pipeline_model_parallel_size = 3",
    ),
    "world that the layout does not divide": (
        ["experiment=trd_70b", "cluster.training_nodes=5"],
        "world size = 40",
    ),
    "micro-batch that cannot hold the longest sequence": (
        ["experiment=trd_8b", "train.max_tokens_per_micro_batch=8192"],
        "train.max_tokens_per_micro_batch = 8192",
    ),
    "context beyond the model's positions": (
        ["experiment=paper_qwen3_8b", "refinement.max_context_tokens=30000",
         "train.max_tokens_per_micro_batch=50000"],
        "refinement.max_context_tokens = 30000",
    ),
    "context beyond positions that YaRN does not stretch": (
        ["experiment=paper_qwen3_8b_32k", "model.student.path=models/Qwen3-8B"],
        "refinement.max_context_tokens = 40960",
    ),
    "context beyond positions that YaRN stretches": (
        ["experiment=paper_qwen3_8b_32k", "refinement.max_context_tokens=40961",
         "train.max_tokens_per_micro_batch=73729"],
        "refinement.max_context_tokens = 40961",
    ),
    "top k beyond the vocabulary": (
        ["experiment=trd_8b", "loss.top_k=200000"],
        "loss.top_k = 200000",
    ),
    "disk that is too small": (
        ["experiment=trd_70b", "cluster.disk_gib=1000.0"],
        "cluster.disk_gib = 1000.0",
    ),
    "no nodes for servers": (
        ["experiment=trd_8b", "cluster.teacher_server_nodes=0"],
        "cluster.teacher_server_nodes = 0",
    ),
    "nodes for servers that nobody asks": (
        ["experiment=paper_qwen3_4b", "generation=local"],
        "cluster.student_server_nodes = 1",
    ),
    "a server too small for its model": (
        ["experiment=trd_8b", "cluster.teacher_server_tp=1"],
        "cluster.teacher_server_tp = 1",
    ),
    "a server larger than a node": (
        ["experiment=trd_8b", "cluster.gpus_per_node=4", "parallel=tp4"],
        "cluster.teacher_server_tp = 8",
    ),
    "tensor parallelism between nodes": (
        ["experiment=trd_8b", "cluster.gpus_per_node=4", "cluster.training_nodes=2",
         "cluster.teacher_server_nodes=2", "parallel=tp8"],
        "parallel.student.tensor_model_parallel_size = 8",
    ),
    "unknown model": (
        ["experiment=trd_8b", "model.student.path=models/nope"],
        "model.student.path = 'models/nope'",
    ),
    "unknown key": (["train.num_step=3"], "train.num_step = '3'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_setting_that_cannot_work_is_told_with_exit_code_2(
    case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, start = REFUSED[case]
    assert main(overrides) == 2
    told = capsys.readouterr().err.splitlines()
    matching = [line for line in told if line.startswith(f"nemo_trd: {start}")]
    assert matching and "Fix: " in matching[0]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "invalid JSON"),
        (json.dumps(TINY | {"hidden_size": 0}), "hidden_size) = 0: it must be a positive integer"),
        (json.dumps({k: v for k, v in TINY.items() if k != "vocab_size"}), "vocab_size) = None"),
        (json.dumps(TINY | {"model_type": "mixtral"}), "model_type) = 'mixtral'"),
        (json.dumps(TINY | {"rope_scaling": {"type": "dynamic"}}), "rope_type = 'dynamic'"),
        (json.dumps(TINY | {"rope_scaling": {"rope_type": "yarn"}}), "factor = None"),
    ],
)
def test_bad_config_json_is_told(tmp_path: Path, content: str, part: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError) as refused:
        read_model(ModelSource(path=str(tmp_path)), "model.student.path")
    assert part in str(refused.value) and "Fix: " in str(refused.value)


def test_disk_of_an_existing_run_directory_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100 * GIB))
    plan = planned("experiment=trd_70b", f"run.dir={tmp_path}")
    (problem,) = plan.findings.problems
    assert "checkpoint.keep_last = 2" in str(problem)
    assert "2,891 GiB" in str(problem) and "100 GiB are free" in str(problem)


# Command line


def test_figures_and_picture_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    assert main(["experiment=trd_70b", "--json", str(out), "--plot", str(picture)]) == 0
    figures = json.loads(out.read_text())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert figures["parameters"]["student"] == 70_553_706_496
    fullest = max(gpu["total"] for gpu in figures["gpus"])
    assert figures["peak"] == fullest
    for gpu in figures["gpus"]:
        assert gpu["total"] == max(sum(parts.values()) for parts in gpu["phases"].values())
    shown = capsys.readouterr().out
    assert f"Fits: {fullest / GIB:.1f} of 79.1 GiB" in shown
    assert "the largest item is optimizer" in shown


def test_what_does_not_fit_ends_with_1_and_advice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment=trd_70b", "train.recompute=none"]) == 1
    shown = capsys.readouterr().out
    assert "DOES NOT FIT" in shown and "the largest item is activations" in shown
    assert "It fits with train.recompute=full" in shown


def test_the_default_settings_are_planned_from_the_shapes_that_the_warm_start_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nemo_trd.toy import warm_start
    from nemo_trd.toy.tokenizer import build_tokenizer

    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    assert "runs/toy/student: not on this machine; the shipped shape" in capsys.readouterr().out
    for role, recipe in (("student", warm_start.STUDENT), ("teacher", warm_start.TEACHER)):
        made = warm_start.new_model(recipe, build_tokenizer(), seed=0).config
        shipped = json.loads((SHIPPED / f"toy-{role}.json").read_text())
        assert shipped.pop("rope_theta") == made.rope_parameters["rope_theta"]
        assert shipped == {key: getattr(made, key) for key in shipped}
    assert main(["model.student.path=runs/mine/student"]) == 2, "a name alone is not the toy's"


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_file_that_cannot_be_written_is_told(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["experiment=trd_8b", option, str(tmp_path / "none" / "x.png")]) == 2
    assert "none/x.png" in capsys.readouterr().err


def test_planning_imports_neither_torch_nor_megatron() -> None:
    code = (
        "import sys; from nemo_trd.plan.main import main; code = main(['experiment=trd_70b']); "
        "heavy = {'torch', 'megatron', 'transformers', 'matplotlib'} & sys.modules.keys(); "
        "assert not heavy, heavy; sys.exit(code)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
