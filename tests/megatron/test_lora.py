"""LoRA as Hugging Face PEFT computes it, in every layout, with one base for student and teacher."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import launch
from model_checks import logits, of_each_expert
from oracles import make_loss
from parallel_layouts import (
    CP2,
    DISTRIBUTED,
    EP2,
    ETP2,
    PP2,
    SP,
    TEACHER_CP2,
    TEACHER_PP2,
    TEACHER_TP2,
    TP2,
    VPP2,
    student,
    trajectories,
)
from tiny_models import make_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers_oracle import load_balancing

from nemo_trd.config.load import compose
from nemo_trd.config.schema import Adapter
from nemo_trd.loss.formulas import dense_divergence

pytestmark = pytest.mark.distributed

VOCABULARY = 120
RELATIVE = 1e-5
ALL = ["q", "k", "v", "o", "gate", "up", "down"]
# An odd rank, one that is larger than a rank's heads, and layers of which not all are targets.
ADAPTERS: dict[str, dict[str, Any]] = {
    "llama": {"rank": 3, "alpha": 8, "rslora": False, "targets": ALL},
    "qwen2": {"rank": 16, "alpha": 12, "rslora": True, "targets": ["q", "v", "down"]},
    "qwen3": {"rank": 4, "alpha": 4, "rslora": True, "targets": ["k", "o", "up", "gate"]},
}
DENSE = list(ADAPTERS)
ATTENTION, EXPERTS = "qwen3_moe", "qwen3_moe-experts"  # what of such a model is adapted
ADAPTERS[ATTENTION] = {"rank": 4, "alpha": 8, "rslora": False, "targets": ["q", "v", "o"]}
ADAPTERS[EXPERTS] = {"rank": 3, "alpha": 2, "rslora": True, "targets": ["k", "down", "up", "gate"]}
ADAPTERS["qwen3_moe-gate"] = {"rank": 5, "alpha": 8, "rslora": False, "targets": ["up", "gate"]}
ADAPTERS["qwen3_moe-down"] = {"rank": 4, "alpha": 8, "rslora": False, "targets": ["q", "down"]}
ON_EXPERTS = [EXPERTS, "qwen3_moe-gate", "qwen3_moe-down"]
# In PEFT's words, where one of a model's layers is dense and where none is.
PARAMETERS = {
    EXPERTS: [
        *("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate_proj.weight"),
        *("mlp.up_proj.weight", "mlp.down_proj.weight"),
    ],
    "qwen3_moe-gate": ["mlp.experts.gate_up_proj"],
    "qwen3_moe-down": ["mlp.experts.down_proj"],
}
LAYERS = {EXPERTS: {"mlp_only_layers": [1]}}
TWO_LAYERS = {"num_hidden_layers": 4, "intermediate_size": 48, "num_attention_heads": 4}
SIZES = {**TWO_LAYERS, "vocab_size": VOCABULARY, "hidden_size": 32, "num_key_value_heads": 2}
OPD, OPSD = ["algorithm.mode=opd"], ["algorithm.mode=opsd", "model.teacher=null"]
DROPOUT, OUTPUTS_SPLIT = "student.adapter.dropout=0.4", "student.adapter.targets=[q,gate]"
LAYOUTS: dict[int, dict[str, list[str]]] = {
    1: {"one rank": [], "recomputed": ["train.recompute=full"]},
    2: {
        "tp2": TP2,
        "tp2 sp": [*TP2, *SP, "train.recompute=full"],
        "pp2 vpp2": PP2 + VPP2 + TEACHER_PP2,
        "dp2 distributed": DISTRIBUTED,
        "cp2": CP2 + TEACHER_CP2,
    },
    4: {
        "tp2 pp2 sp": TP2 + PP2 + SP + TEACHER_TP2,
        "cp2 tp2 sp": [*CP2, *TP2, *SP, *DISTRIBUTED],
        "tp2 dp2 distributed": TP2 + DISTRIBUTED,
        "pp4": student(pipeline_model_parallel_size=4),
    },
}


COEFFICIENTS = {"qwen3_moe": 0.03}  # of the load-balancing loss; its router is frozen
WITH_FILLERS = ("tp2", "dp2 distributed", "tp2 dp2 distributed", "ep2 distributed")
SPARSE_LAYOUTS: dict[int, dict[str, list[str]]] = {
    1: {"recomputed": ["train.recompute=full"]},
    2: {"ep2 distributed": EP2 + DISTRIBUTED, "tp2 sp ep2": TP2 + SP + EP2},
}
EXPERT_LAYOUTS: dict[int, dict[str, list[str]]] = {
    1: {"one rank": [], "recomputed": ["train.recompute=full"]},
    2: {
        "ep2 distributed": EP2 + DISTRIBUTED,
        "etp2": ETP2,
        "tp2 sp": TP2 + SP,
        "tp2 sp etp2": [*TP2, *SP, *ETP2, "train.recompute=full"],
        "pp2 vpp2": PP2 + VPP2 + TEACHER_PP2,
    },
    4: {
        "tp2 sp ep2 etp2": TP2 + SP + EP2 + ETP2,
        "pp2 ep2": PP2 + EP2,
        "dp4 ep2 distributed": EP2 + DISTRIBUTED,
        "cp2 tp2 sp etp2 distributed": CP2 + TP2 + SP + ETP2 + DISTRIBUTED,
    },
}
GROUPED_LAYOUTS = {name: EXPERT_LAYOUTS[2][name] for name in ("ep2 distributed", "tp2 sp etp2")}


def settings(architecture: str, init: str = "kaiming", **others: Any) -> Adapter:
    adapter = {"kind": "lora", "dropout": 0.0, "init": init, **ADAPTERS[architecture], **others}
    return Adapter(**adapter)


def overrides(adapter: Adapter) -> list[str]:
    values = adapter.model_dump(exclude={"kind"}).items()
    return ["student.adapter=lora", *(f"student.adapter.{k}={v}" for k, v in values)]


def peft_adapter(base: Path, out: Path, architecture: str) -> Any:
    """An adapter of PEFT with random A and B, saved in `out`, on its model in float64."""
    from peft import LoraConfig, PeftModel, get_peft_model

    own = ADAPTERS[architecture]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=own["rank"],
        lora_alpha=own["alpha"],
        use_rslora=own["rslora"],
        target_modules=[
            f"{target}_proj"
            for target in own["targets"]
            if architecture not in PARAMETERS or target in ("q", "k", "v", "o")
        ],
        target_parameters=PARAMETERS.get(architecture),
    )
    adapted = get_peft_model(model, lora)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapted.save_pretrained(out)
    # Grouped products of experts know no float64.
    base_model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float64, experts_implementation="eager"
    )
    return PeftModel.from_pretrained(base_model, out, is_trainable=True).double()


def label_logits(model: Any, context: tuple[int, ...], labels: tuple[int, ...]) -> Tensor:
    found = model(input_ids=torch.tensor([context + labels])).logits
    return found[0, len(context) - 1 : -1, :VOCABULARY].double()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, adapters of PEFT on them, and the loss and gradients that PEFT gives."""
    root = tmp_path_factory.mktemp("models")
    make_model(root / "teacher", "qwen3", seed=1, head_dim=8, **SIZES)
    other = AutoModelForCausalLM.from_pretrained(root / "teacher", dtype=torch.float64)
    config = compose(["model=local", "model.student.path=a", "model.teacher.path=b"])
    expected = {}
    for number, architecture in enumerate(ADAPTERS):
        base = root / architecture
        tied = architecture == "qwen2"
        sizes = SIZES | LAYERS.get(architecture, {})
        family = architecture.split("-")[0]
        make_model(base, family, tie_word_embeddings=tied, head_dim=8, **sizes)
        adapted = peft_adapter(base, root / f"{architecture}_adapter", architecture)
        total, count = torch.zeros((), dtype=torch.float64), 0
        for t in trajectories(config, number):
            with torch.no_grad():
                of_teacher = label_logits(other, t.teacher_context, t.labels)
            own = label_logits(adapted, t.student_context, t.labels)
            total = total + dense_divergence(own, of_teacher, make_loss()).sum()
            count += len(t.labels)
        (total / count).backward()
        figures = {"loss": (total / count).item()}
        if coefficient := COEFFICIENTS.get(architecture):
            balance, load = load_balancing(adapted, trajectories(config, number))
            (coefficient * balance).backward()
            mean = balance.item() / SIZES["num_hidden_layers"]
            figures |= {"load_balancing_loss": mean, "max_expert_load": load}
        gradients = {
            name.replace(".default", ""): parameter.grad
            for name, parameter in adapted.named_parameters()
            if parameter.grad is not None
        }
        merged = of_each_expert(dict(adapted.merge_and_unload().state_dict()))
        expected[architecture] = figures, gradients, merged
    torch.save(expected, root / "expected.pt")
    return root


def check_layouts(directory: str, layouts: dict[str, list[str]], names: list[str]) -> None:
    """On every rank: loss, gradients and merged weights of each model against PEFT's."""
    from nemo_trd.distributed.process import init_distributed
    from nemo_trd.megatron.student import Student
    from nemo_trd.megatron.teacher import Teacher

    watch = init_distributed(timeout_minutes=2)
    expected = torch.load(Path(directory) / "expected.pt")
    for (layout, chosen), model in product(layouts.items(), names):
        where, number = f"{layout}, {model}", list(ADAPTERS).index(model)
        config = compose(
            [
                *("model=local", "precision.dtype=fp32", "train.max_tokens_per_micro_batch=80"),
                f"cluster.gpus_per_node={dist.get_world_size()}",
                f"model.student.path={directory}/{model}",
                f"model.teacher.path={directory}/teacher",
                *overrides(settings(model, f"{directory}/{model}_adapter")),
                f"student.moe_aux_loss_coeff={COEFFICIENTS.get(model, 0)}",
                *chosen,
            ]
        )
        own = Student(config)
        frozen = Teacher(config, own.groups)
        figures, exact, merged = expected[model]
        for name, tensor in own.export_hf_weights():
            torch.testing.assert_close(tensor, merged[name].float(), msg=f"{where}, {name}")
        plan = own.pack(trajectories(config, number))
        for packed in (plan, *([with_fillers(plan)] if layout in WITH_FILLERS else [])):
            metrics = own.compute_gradients(packed, frozen.states(packed)).metrics
            measured = {name: metrics[name] for name in figures}
            assert measured == pytest.approx(figures, rel=RELATIVE), where
            seen = gradients(own)
            assert seen.keys() == exact.keys(), where
            for name, gradient in seen.items():
                error = (gradient.double() - exact[name]).norm() / exact[name].norm()
                assert error < RELATIVE, f"{where}, {name}: {error:.1e}"
        norm = torch.stack([g.norm() for g in exact.values()]).norm().item()
        assert own.update()["grad_norm"] == pytest.approx(norm, rel=RELATIVE), where
        check_frozen(own)
    for chosen in layouts.values():
        if names == DENSE:
            check_one_base(Path(directory), chosen)
    print("as PEFT has it", flush=True)
    watch.close()


def with_fillers(plan: Any) -> Any:
    """The same trajectories in one micro-batch of many: others have no labels, nor have ranks."""
    from nemo_trd.algorithm.micro_batches import make_micro_batch

    empty = make_micro_batch([])
    full = make_micro_batch([t for rank in plan for batch in rank for t in batch.trajectories])
    return [[empty, full if rank == 0 else empty, empty] for rank in range(len(plan))]


def gradients(own: Any) -> dict[str, Tensor]:
    """Those of the adapter, by PEFT's names, as the optimizer sees them."""
    from nemo_trd.megatron import lora

    parameters = [p for model in own.models for p in model.parameters() if p.requires_grad]
    before = [p.data.clone() for p in parameters]
    if own._config.optimizer.distributed:  # each data parallel rank has a share of them
        for chunk in own.chunks:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                group = buffer.data_parallel_group
                shards = list(buffer.grad_data.chunk(group.size()))
                mine = shards[group.rank()].clone()
                dist.all_gather(shards, mine, group=group)
                buffer.grad_data.copy_(torch.cat(shards))
    for parameter in parameters:
        parameter.data.copy_(parameter.main_grad)
    found = lora.export_adapter(own.models, own.hf, own.adapter, own.groups)
    seen = {name: tensor.clone() for name, tensor in found}
    for parameter, value in zip(parameters, before, strict=True):
        parameter.data.copy_(value)
    return seen


def check_frozen(own: Any) -> None:
    """Nothing but A and B has a gradient, a buffer for one, or a state of the optimizer."""
    from nemo_trd.plan.memory import model_state_bytes

    trained = 0
    for model in own.models:
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (".adapter." in name), name
            assert parameter.requires_grad or parameter.grad is None, name
            assert parameter.requires_grad == hasattr(parameter, "main_grad"), name
            trained += parameter.numel() * parameter.requires_grad
    planned = model_state_bytes(own._config, own.hf, own.groups.pp.rank())
    assert planned["gradients"] == 4 * trained
    assert planned["weights"] == 4 * sum(p.numel() for m in own.models for p in m.parameters())
    distributed = own._config.optimizer.distributed
    buffers = [b for c in own.chunks for b in (*c.buffers, *c.expert_parallel_buffers)]
    padding = sum(64 * len(c.params_with_grad) for c in own.chunks) if distributed else 0
    assert trained <= sum(b.numel_unpadded for b in buffers) <= trained + padding
    parts = [p for p in own.optimizer.chained_optimizers if not p.is_stub_optimizer]
    states = [state for part in parts for state in part.optimizer.state.values()]
    moments = sum(state["exp_avg"].numel() for state in states)
    assert moments <= trained and (distributed or moments == trained)
    totals = torch.tensor([8 * moments, planned["optimizer"]], dtype=torch.float64)
    dist.all_reduce(totals)
    rounding = 8 * len(parts) * dist.get_world_size()
    assert totals[0] <= totals[1] <= totals[0] + rounding, totals


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_loss_gradients_and_merged_weights_are_those_of_peft(ranks: int, directory: Path) -> None:
    output = launch(ranks, check_layouts, str(directory), LAYOUTS[ranks], DENSE)
    assert output.count("as PEFT has it") == ranks


@pytest.mark.parametrize("ranks", SPARSE_LAYOUTS)
def test_so_are_they_beside_frozen_experts(ranks: int, directory: Path) -> None:
    output = launch(ranks, check_layouts, str(directory), SPARSE_LAYOUTS[ranks], [ATTENTION])
    assert output.count("as PEFT has it") == ranks


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_so_are_those_of_experts(ranks: int, directory: Path) -> None:
    output = launch(ranks, check_layouts, str(directory), EXPERT_LAYOUTS[ranks], ON_EXPERTS)
    assert output.count("as PEFT has it") == ranks


def test_so_are_they_where_products_of_experts_are_grouped(directory: Path) -> None:
    """As TransformerEngine's layers have them."""
    arguments = (str(directory), GROUPED_LAYOUTS, ON_EXPERTS)
    output = launch(2, check_layouts, *arguments, transformer_engine=True)
    assert output.count("as PEFT has it") == 2


@pytest.mark.parametrize(("ranks", "layout"), [(1, "recomputed"), (2, "tp2 sp")])
def test_so_are_they_with_the_layers_of_transformer_engine(
    ranks: int, layout: str, directory: Path
) -> None:
    """Whose norms are in the linear layers: the adapter sees the normalised input."""
    layouts = {layout: LAYOUTS[ranks][layout]}
    output = launch(ranks, check_layouts, str(directory), layouts, DENSE, transformer_engine=True)
    assert output.count("as PEFT has it") == ranks


def composed(directory: Path, *others: str, model: str = "llama") -> Any:
    """A run in OPSD that begins with an adapter of its own on a model."""
    base = ["model=local", f"model.student.path={directory}/{model}", *OPSD]
    numbers = ["precision.dtype=fp32", "optimizer.lr=1e-2", "optimizer.eps=1e-4"]
    numbers += ["train.max_tokens_per_micro_batch=80"]  # the teacher has three packs for two
    return compose([*base, *numbers, *overrides(settings(model)), *others])


def made(config: Any, *, shared: bool = True) -> tuple[Any, Any]:
    """Student and teacher, as a run makes them or with a copy of the weights for the teacher."""
    from nemo_trd.megatron.student import Student
    from nemo_trd.megatron.teacher import Teacher

    own = Student(config)
    if shared:
        return own, Teacher(config, own.groups, own.models)
    if own.models[-1].post_process:
        own._head.read_teacher_weight(config.teacher_source, own.models[-1].output_weight())
    return own, Teacher(config, own.groups)


def losses(config: Any, own: Any, frozen: Any, steps: range) -> list[tuple[float, float]]:
    seen = []
    for step in steps:
        plan = own.pack(trajectories(config, step))
        metrics = own.train_step(plan, frozen.states(plan)).metrics
        seen.append((metrics["loss"], metrics["grad_norm"]))
    return seen


def held_bytes(own: Any, frozen: Any) -> int:
    """Bytes of all weights that student and teacher hold on this rank, each once."""
    models = [*own.models, *frozen._models]
    tensors = [p.data for model in models for p in model.parameters()]
    tensors += [own._head.teacher_weight] if own._head.teacher_weight is not None else []
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def check_one_base(directory: Path, chosen: list[str], model: str = "llama") -> None:
    """Student and teacher on one base train as with two copies, and hold the weights once."""
    own_layout = [setting for setting in chosen if not setting.startswith("parallel.teacher")]
    same = [setting.replace("parallel.student", "parallel.teacher") for setting in own_layout]
    config = composed(directory, *own_layout, *same, model=model)
    own, frozen = made(config)
    weights = sum(p.numel() for model in own.models for p in model.parameters())
    assert held_bytes(own, frozen) == 4 * weights
    seen = losses(config, own, frozen, range(3))
    two, copy = made(config, shared=False)
    assert held_bytes(two, copy) > 1.6 * held_bytes(own, frozen)
    again = losses(config, two, copy, range(3))
    assert torch.tensor(again) == pytest.approx(torch.tensor(seen), rel=1e-6), chosen
    assert seen[2][0] != pytest.approx(seen[0][0], rel=1e-2)  # it has learned something


@pytest.mark.parametrize("model", ["llama", EXPERTS])
def test_one_base_serves_student_and_teacher(model: str, directory: Path, one_rank: Any) -> None:
    check_one_base(directory, [], model)


def test_the_adapter_is_on_again_after_an_exception(directory: Path, one_rank: Any) -> None:
    config = composed(directory)
    own, frozen = made(config)
    losses(config, own, frozen, range(1))
    plan = own.pack(trajectories(config, 1))
    states = frozen.states(plan)
    before = own.compare(plan, states).metrics["loss"]

    def broken(*_: Any) -> None:
        raise RuntimeError("on purpose")

    hook = own.models[0].decoder.layers[-1].register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="on purpose"):
        frozen.states(plan)
    hook.remove()
    assert own.compare(plan, states).metrics["loss"] == before
    assert torch.equal(torch.cat(frozen.states(plan)), torch.cat(states))


@pytest.mark.parametrize("model", ["llama", EXPERTS])
def test_peft_loads_what_is_written_and_a_run_begins_with_it(
    model: str, directory: Path, one_rank: Any, tmp_path: Path
) -> None:
    from peft import PeftModel

    from nemo_trd.models.peft import check_beginning, weights_digest
    from nemo_trd.models.write import save_adapter_directory, save_hf_directory

    config, base = composed(directory, model=model), directory / model
    own, frozen = made(config)
    losses(config, own, frozen, range(3))
    before = [p.clone() for model in own.models for p in model.parameters()]
    digest = weights_digest(base, "model.student.path")
    adapter = own.export_adapter(), own.hf, own.adapter
    save_adapter_directory(*adapter, str(base), digest, tmp_path / "export")
    save_hf_directory(own.export_hf_weights(), str(base), tmp_path / "merged")
    after = [p for model in own.models for p in model.parameters()]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    tokens = torch.randint(0, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(0))
    actual = logits(own.models, tokens, VOCABULARY, one_rank)

    def read_model(path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    readers = [
        PeftModel.from_pretrained(read_model(base), tmp_path / "export"),
        read_model(tmp_path / "merged"),
    ]
    for read in readers:
        with torch.no_grad():
            expected = read(input_ids=tokens).logits[..., :VOCABULARY]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    untrained = logits(made(config)[0].models, tokens, VOCABULARY, one_rank)
    assert (untrained - actual).abs().max() > 1e-3

    of_another = [*OPD, f"model.teacher={{path: {directory}/teacher}}"]
    begun = f"student.adapter.init={tmp_path}/export"
    second = composed(directory, begun, *of_another, model=model)
    assert not list(check_beginning(own.hf, second.student.adapter))
    again, _ = made(second, shared=False)
    assert torch.equal(logits(again.models, tokens, VOCABULARY, one_rank), actual)


def test_adapters_begin_as_those_of_peft_do(directory: Path, one_rank: Any) -> None:
    from peft import LoraConfig, get_peft_model

    for init, model in product(("kaiming", "gaussian"), ("llama", EXPERTS)):
        chosen = [f"student.adapter.init={init}", "student.adapter.rank=16"]
        own, _ = made(composed(directory, *chosen, model=model))
        ours = {name: tensor.clone() for name, tensor in own.export_adapter()}
        kind = True if init == "kaiming" else init
        lora = LoraConfig(
            r=16,
            target_modules=["q_proj", "down_proj"] if model == "llama" else ["k_proj"],
            target_parameters=PARAMETERS.get(model),
            init_lora_weights=kind,
        )
        base = AutoModelForCausalLM.from_pretrained(directory / model, dtype=torch.float32)
        torch.manual_seed(0)  # of PEFT's draw
        for name, theirs in get_peft_model(base, lora).named_parameters():
            if "lora_" not in name:
                continue
            matrix = ours[name.replace(".default", "")]
            assert matrix.std().item() == pytest.approx(theirs.std().item(), rel=0.15, abs=0), name
            assert matrix.abs().max() == pytest.approx(theirs.abs().max().item(), rel=0.3), name


def test_dropout_is_the_same_when_activations_are_recomputed(
    directory: Path, one_rank: Any
) -> None:
    seen = {}
    for dropout, recompute in product((0.0, 0.4), ("none", "full")):
        config = composed(
            directory, f"student.adapter.dropout={dropout}", f"train.recompute={recompute}"
        )
        own, frozen = made(config)
        state = torch.get_rng_state()
        seen[dropout, recompute] = losses(config, own, frozen, range(3))
        assert torch.equal(torch.get_rng_state(), state)
        plan = own.pack(trajectories(config, 0))
        states = frozen.states(plan)
        one, two = (own.compare(plan, states).metrics["loss"] for _ in range(2))
        assert one == two  # nothing is dropped where nothing is trained
    for dropout in (0.0, 0.4):
        recomputed = torch.tensor(seen[dropout, "full"])
        assert recomputed == pytest.approx(torch.tensor(seen[dropout, "none"]), rel=1e-6)
    assert seen[0.4, "none"][0][0] == seen[0.0, "none"][0][0]  # B is still zero
    assert seen[0.4, "none"][2][0] != pytest.approx(seen[0.0, "none"][2][0], rel=1e-4)


def check_dropout(directory: str, alone: list[list[float]]) -> None:
    """On two tensor parallel ranks: matrices that both have whole stay the same on both."""
    from nemo_trd.distributed.process import init_distributed

    watch = init_distributed(timeout_minutes=2)
    split = [*TP2, *TEACHER_TP2]
    sequences = [*SP, "parallel.teacher.sequence_parallel=true"]
    for layout in (split, [*split, *sequences]):
        config = composed(Path(directory), DROPOUT, *layout)
        own, frozen = made(config)
        losses(config, own, frozen, range(3))
        for name, matrix in own.models[0].named_parameters():
            if matrix.requires_grad and not getattr(matrix, "tensor_model_parallel", False):
                both = [torch.empty_like(matrix) for _ in range(2)]
                dist.all_gather(both, matrix.detach(), group=own.groups.tp)
                assert torch.equal(*both), f"{layout}: {name}"
    config = composed(Path(directory), DROPOUT, OUTPUTS_SPLIT, *split)
    seen = losses(config, *made(config), range(3))
    assert torch.tensor(seen) == pytest.approx(torch.tensor(alone), rel=RELATIVE)
    watch.close()


def test_tensor_parallel_ranks_drop_the_same_of_what_they_all_have(
    directory: Path, one_rank: Any
) -> None:
    config = composed(directory, DROPOUT, OUTPUTS_SPLIT)
    launch(2, check_dropout, str(directory), losses(config, *made(config), range(3)))
