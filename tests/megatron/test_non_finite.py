"""A hidden state or gradient that is not finite stops the step before anything has moved."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
from launch import launch, run_ranks
from parallel_layouts import CP2, PP2, SP, TP2
from tiny_models import make_model

pytestmark = pytest.mark.distributed

NAME = "prompt 2 sample 0 (refinement)"  # which meets the bad value
CONTEXT = 4  # tokens of every student context; the teacher's has one more
SETTINGS = ["model=local", "precision.dtype=fp32", "optimizer.lr=1e-2"]
SETTINGS += ["train.max_tokens_per_micro_batch=null", "train.micro_batch_size=2"]
ADAPTER = ["student.adapter=lora", "student.adapter.rank=4"]


# Layout -> the first token of the rank that meets the bad value, and the position there. Of the 12
# tokens of prompt 2, padded, the second context parallel rank holds those from 3 to 8.
LAYOUTS = {
    "tp2 pp2": (TP2 + PP2, 2, CONTEXT),
    "tp2 sp dp2, an adapter": (TP2 + SP + ADAPTER, 2, CONTEXT),
    "cp2 dp2": (CP2, (2 + 7 * 3) % 60, 1),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings that name a student and a teacher."""
    root = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2}
    for seed, role in enumerate(("student", "teacher")):
        make_model(root / role, "qwen3", seed=seed, tie_word_embeddings=True, **sizes)
    return [f"model.{role}.path={root / role}" for role in ("student", "teacher")]


def trajectories() -> list[Any]:
    from nemo_trd.data.types import Trajectory

    def tokens(start: int, count: int) -> tuple[int, ...]:
        return tuple((start + 7 * i) % 60 for i in range(count))

    return [
        Trajectory(i, 0, "refinement", tokens(i, CONTEXT), tokens(i, CONTEXT + 1), tokens(i, n), 0)
        for i, n in enumerate((5, 1, 6, 3))
    ]


@contextmanager
def states_poisoned(model: Any, token: int, bad: float, position: int) -> Iterator[None]:
    """Put `bad` into one final hidden state of the sequence that starts with `token`."""

    def poison(module: Any, arguments: Any, inputs: dict[str, Any], hidden: Any) -> Any:
        if not module.post_process:
            return hidden
        import torch

        mask = torch.zeros_like(hidden, dtype=torch.bool)
        offset = module.pg_collection.tp.rank() * len(hidden)
        local = position - (offset if module.config.sequence_parallel else 0)
        if 0 <= local < len(hidden):
            mask[local, inputs["input_ids"][:, 0] == token, 3] = True
        return hidden.masked_fill(mask, bad)

    handle = model.register_forward_hook(poison, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def fail_and_go_on(overrides: list[str]) -> None:
    """One process, both optimizers, all parameters or an adapter."""
    from nemo_trd.config.load import compose
    from nemo_trd.distributed.process import init_distributed

    watch = init_distributed(timeout_minutes=2)
    for distributed, trained in product(("false", "true"), ([], ADAPTER)):
        chosen = [*trained, f"optimizer.distributed={distributed}"]
        check_failed_steps(compose([*overrides, *chosen]))
        print("nothing moved", flush=True)
    watch.close()


def check_failed_steps(config: Any) -> None:
    """Nothing has moved after a failed step, and the next is as if it had never been tried."""
    from nemo_trd.megatron.finite import NonFiniteError
    from nemo_trd.megatron.student import Student
    from nemo_trd.megatron.teacher import Teacher

    student = Student(config)
    teacher = Teacher(config, student.groups)
    twin = Student(config)  # never meets a bad value
    plan = student.pack(trajectories())
    states = teacher.states(plan)
    for either in (student, twin):
        either.train_step(plan, states)
    model = student.models[-1]
    owner = next(i for i, batch in enumerate(plan[0]) for t in batch.trajectories if t.name == NAME)
    bad_states = [s.clone() for s in states]  # type: ignore[union-attr]
    first = [t.name for t in plan[0][owner].trajectories].index(NAME)
    row = int((plan[0][owner].trajectory_index == first).nonzero()[2])
    last = CONTEXT + 6 - 2  # the position that predicts the last label of prompt 2
    for bad in (float("nan"), float("-inf"), float("inf")):
        for position in (0, CONTEXT - 1, last):  # position 0 predicts no label
            before = everything(student)
            with states_poisoned(model, 2, bad, position), pytest.raises(NonFiniteError) as info:
                student.train_step(plan, states)
            assert re.search(rf"{re.escape(NAME)}: .* token {position} has {bad}", str(info.value))
            assert "No weight was changed. Fix: " in str(info.value)
            assert_same(everything(student), before)
        bad_states[owner][row, 1] = bad
        with pytest.raises(NonFiniteError, match=r"of label 2 is .*teacher's hidden state") as info:
            student.train_step(plan, bad_states)
        assert str(info.value).startswith(NAME)
        assert_same(everything(student), before)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, parameter in (trained[0], trained[-1]):
        hook = parameter.register_hook(lambda gradient: gradient * float("inf"))
        found = rf"found (NaN|Inf) in local grad norm of rank 0: .*{re.escape(name)}"
        with pytest.raises(NonFiniteError, match=found):
            student.train_step(plan, states)
        hook.remove()
        assert_same(everything(student), before)
    ours, theirs = (either.train_step(plan, states) for either in (student, twin))
    assert ours == theirs
    assert_same(everything(student), everything(twin))


def everything(student: Any) -> list[Any]:
    """Copies of parameters, optimizer state and learning rate schedule, as a flat list."""
    import torch

    def leaves(value: Any) -> Iterator[Any]:
        if isinstance(value, dict | list | tuple):
            for item in value.items() if isinstance(value, dict) else value:
                yield from leaves(item)
        else:
            yield value.detach().clone() if isinstance(value, torch.Tensor) else value

    parameters = [p for model in student.models for p in model.parameters()]
    states = [student.optimizer.state_dict(), student.scheduler.state_dict()]
    optimizers = getattr(student.optimizer, "chained_optimizers", [student.optimizer])
    return list(leaves([parameters, states, [o.optimizer.state_dict() for o in optimizers]]))


def assert_same(a: list[Any], b: list[Any]) -> None:
    import torch

    assert len(a) == len(b) > 30
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def fail_on_some_rank(overrides: list[str], token: int, position: int) -> None:
    """Several ranks: as the command line does it. One of them meets a bad value."""
    from nemo_trd.config.load import compose
    from nemo_trd.distributed.process import init_distributed
    from nemo_trd.megatron.student import Student
    from nemo_trd.megatron.teacher import Teacher

    watch = init_distributed(timeout_minutes=2)
    config = compose(overrides)
    student = Student(config)
    teacher = Teacher(config, student.groups)
    plan = student.pack(trajectories())
    states = teacher.states(plan)
    student.train_step(plan, states)
    student.optimizer.step = lambda: print("the optimizer moved", flush=True)
    print("second step", flush=True)
    try:
        with states_poisoned(student.models[-1], token, float("nan"), position):
            student.train_step(plan, states)
    except BaseException as error:
        watch.fail(error)


def test_nothing_moves_on_a_bad_value_and_its_sample_is_named(models: list[str]) -> None:
    output = launch(1, fail_and_go_on, [*SETTINGS, *models])
    assert output.count("nothing moved") == 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_value_ends_all_ranks_before_the_optimizer_moves(
    layout: str, models: list[str]
) -> None:
    sizes, token, position = LAYOUTS[layout]
    settings = [*SETTINGS, *models, *sizes]
    code, output = run_ranks(4, fail_on_some_rank, settings, token, position, timeout=400)
    assert code not in (0, -1), output[-4000:]  # failed by itself, not by the time limit
    assert output.count("second step") == 4, output[-4000:]
    assert re.search(rf"failed first: NonFiniteError: {re.escape(NAME)}: ", output), output[-4000:]
    assert "the optimizer moved" not in output
