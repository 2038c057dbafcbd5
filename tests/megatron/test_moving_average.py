"""A teacher that follows the student, against transformers in float64."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch
from oracles import make_loss
from parallel_layouts import CP2, DISTRIBUTED, PP2, SP, TP2, VPP2, trajectories
from tiny_models import make_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from nemo_trd.config.load import compose
from nemo_trd.loss.formulas import dense_divergence

pytestmark = pytest.mark.distributed

VOCABULARY, EMA, RELATIVE, STEPS = 120, 0.8, 1e-5, 3
RANK, ALPHA = 4, 12
ADAPTER = [
    *("student.adapter=lora", f"student.adapter.rank={RANK}", f"student.adapter.alpha={ALPHA}"),
    "student.adapter.dropout=0.0",
]
LAYOUTS = {
    1: {"one rank": [], "recomputed": ["train.recompute=full"]},
    2: {
        "tp2 sp": TP2 + SP,
        "pp2 vpp2": PP2 + VPP2,
        "dp2 distributed": DISTRIBUTED,
        "cp2": CP2,
    },
    4: {"tp2 pp2 sp": TP2 + PP2 + SP, "tp2 dp2 distributed": TP2 + DISTRIBUTED},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 4}
    for name, tied in (("tied", True), ("untied", False)):
        make_model(root / name, "qwen3", tie_word_embeddings=tied, **sizes)
    return root


def composed(path: Path, *others: str) -> Any:
    same = [o.replace("parallel.student", "parallel.teacher") for o in others if "parallel." in o]
    return compose(
        [
            *("model=local", f"model.student.path={path}", "model.teacher=null"),
            *("algorithm.mode=opsd", f"teacher.ema={EMA}", "precision.dtype=fp32"),
            *("optimizer.lr=1e-2", "optimizer.eps=1e-4", "optimizer.clip_grad=0.0"),
            *("train.max_tokens_per_micro_batch=80", *others, *same),
        ]
    )


def made(config: Any) -> tuple[Any, Any]:
    from nemo_trd.megatron.student import Student
    from nemo_trd.megatron.teacher import Teacher

    own = Student(config)
    return own, Teacher(config, own.groups, own.models, own.average)


def test_every_layout_trains_with_the_average_as_transformers_would(
    directory: Path, one_rank: Any
) -> None:
    check_layouts(str(directory), LAYOUTS[1])


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_so_do_several_ranks(ranks: int, directory: Path) -> None:
    output = launch(ranks, check_on_ranks, str(directory), LAYOUTS[ranks])
    assert output.count("as transformers has it") == ranks


def check_on_ranks(directory: str, layouts: dict[str, list[str]]) -> None:
    from nemo_trd.distributed.process import init_distributed

    watch = init_distributed(timeout_minutes=2)
    check_layouts(directory, layouts)
    print("as transformers has it", flush=True)
    watch.close()


def check_layouts(directory: str, layouts: dict[str, list[str]]) -> None:
    for (name, layout), model in product(layouts.items(), ("tied", "untied", "adapter")):
        path = Path(directory) / ("tied" if model == "adapter" else model)
        config = composed(path, *layout, *(ADAPTER if model == "adapter" else []))
        check_steps(config, path, f"{name}, {model}")


def check_steps(config: Any, path: Path, where: str) -> None:
    """Each step's loss and norm of the gradient, and the average after it."""
    own, teacher = made(config)
    start = dict(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).state_dict())
    average = trained(own)
    for step in range(STEPS):
        plan = own.pack(trajectories(config, step))
        batch, states = trajectories(config, step), teacher.states(plan)
        expected, norm = reference(
            config, path, whole(own.export_hf_weights()), merged(average, start)
        )
        measured = own.compute_gradients(plan, states).metrics["loss"]
        assert measured == pytest.approx(expected(batch), rel=RELATIVE), f"{where}, step {step}"
        if own.adapter is None:
            assert own.update()["grad_norm"] == pytest.approx(norm(), rel=RELATIVE), where
        else:
            own.update()
        now = trained(own)
        average = {k: EMA * average[k] + (1 - EMA) * now[k] for k in average}
        before = whole(own.export_hf_weights())
        followed = merged(average, start)
        for key, tensor in whole(own.export_teacher_weights()).items():
            torch.testing.assert_close(tensor, followed[key].float(), msg=f"{where}, {key}")
        for key, tensor in whole(own.export_hf_weights()).items():
            assert torch.equal(tensor, before[key]), f"{where}, {key}"
    gap = max((before[k].double() - followed[k]).abs().max() for k in before)
    assert gap > 1e-3, "the teacher is the student"


def whole(tensors: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors}


def trained(own: Any) -> dict[str, Tensor]:
    """In float64 what is averaged: all weights, or A and B."""
    tensors = own.export_hf_weights() if own.adapter is None else own.export_adapter()
    return {name: tensor.double() for name, tensor in whole(tensors).items()}


def merged(average: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the teacher; with an adapter W + alpha / rank B A of averaged A and B."""
    if not any("lora_" in name for name in average):
        return average
    weights = dict(start)
    for name, a in average.items():
        if ".lora_A." in name:
            b = average[name.replace(".lora_A.", ".lora_B.")]
            weight = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            weights[weight] = weights[weight] + ALPHA / RANK * b @ a
    return weights


def reference(
    config: Any, path: Path, own: dict[str, Tensor], followed: dict[str, Tensor]
) -> tuple[Any, Any]:
    """Mean divergence of a batch by transformers in float64, and then the norm of its gradient."""
    student, teacher = (load(path, weights) for weights in (own, followed))

    def logits(model: Any, context: tuple[int, ...], labels: tuple[int, ...]) -> Tensor:
        found = model(torch.tensor([context + labels])).logits
        return found[0, len(context) - 1 : -1, :VOCABULARY]

    def loss(batch: Any) -> float:
        values = []
        for t in batch:
            with torch.no_grad():
                other = logits(teacher, t.teacher_context, t.labels)
            of_student = logits(student, t.student_context, t.labels)
            values.append(dense_divergence(of_student, other, make_loss()))
        mean = torch.cat(values).mean()
        mean.backward()
        return mean.item()

    def norm() -> float:
        return torch.stack([p.grad.norm() for p in student.parameters()]).norm().item()

    return loss, norm


def load(path: Path, weights: dict[str, Tensor]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    tied = model.config.tie_word_embeddings
    model.get_input_embeddings().padding_idx = None  # or the gradient of token 0 is left out
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= ({"lm_head.weight"} if tied else set()) and not unexpected
    return model


def test_in_bf16_the_average_moves_by_less_than_bf16_can_tell(
    directory: Path, one_rank: Any
) -> None:
    """2^-9 of a weight at most from one bf16 number to the next."""
    settings = ["precision.dtype=bf16", "teacher.ema=0.999", "optimizer.warmup_fraction=0.0"]
    config = composed(directory / "untied", *settings)
    own, teacher = made(config)
    start = [average.clone() for average in own.average.tensors]
    parameters = [p for model in own.models for p in model.parameters()]
    expected = [average.double() for average in start]
    for step in range(STEPS):
        plan = own.pack(trajectories(config, step))
        own.train_step(plan, teacher.states(plan))
        for place, parameter in enumerate(parameters):
            expected[place] = 0.999 * expected[place] + 0.001 * parameter.detach().double()
    for average, exact, before in zip(own.average.tensors, expected, start, strict=True):
        assert average.dtype == torch.float32 and (average != before).any()
        torch.testing.assert_close(average.double(), exact, rtol=1e-6, atol=1e-8)
    pairs = zip(own.average.tensors, start, strict=True)
    # Of some parameters an average in bf16 would have stayed where it was.
    assert any(torch.equal(a.bfloat16(), b.bfloat16()) for a, b in pairs)
    with own.average.in_place():
        assert all(p.dtype == torch.bfloat16 for p in parameters)


def test_the_student_has_its_weights_again_after_an_exception(
    directory: Path, one_rank: Any
) -> None:
    config = composed(directory / "tied")
    own, teacher = made(config)
    plan = own.pack(trajectories(config, 0))
    own.train_step(plan, teacher.states(plan))
    before = whole(own.export_hf_weights())

    def broken(*_: Any) -> None:
        raise RuntimeError("on purpose")

    hook = own.models[0].decoder.layers[-1].register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="on purpose"):
        teacher.states(plan)
    hook.remove()
    assert own.models[0].training
    for name, tensor in own.export_hf_weights():
        assert torch.equal(tensor, before[name])
