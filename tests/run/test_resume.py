"""What a resumed run takes from its checkpoint, what from its settings, and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from composed_once import compose
from tiny_models import make_model

from nemo_trd.config.errors import ConfigError
from nemo_trd.config.schema import Config
from nemo_trd.data.prompt_digests import DIGESTS_FILE, digests
from nemo_trd.data.types import Prompt
from nemo_trd.megatron.checkpoint import Checkpointer
from nemo_trd.megatron.learning_rate import rate_change, scheduled_lr
from nemo_trd.megatron.student import Student
from nemo_trd.records.checkpoint_dir import STATE_FILE, TrainerState
from nemo_trd.records.trackers import public_settings
from nemo_trd.run.resume import (
    changed_settings,
    changes_since,
    check_matches,
    check_prompts,
    samples_hold,
)

FP32, BF16 = ["precision.dtype=fp32"], ["precision.dtype=bf16"]
DISTRIBUTED = ["optimizer.distributed=true"]
BEFORE = ["train.num_steps=8", "optimizer.lr=1e-2", "optimizer.weight_decay=0.1"]
CHANGES = [
    *("optimizer.lr=4e-3", "optimizer.min_lr=1e-3", "optimizer.warmup_fraction=0.25"),
    *("optimizer.weight_decay=0.3", "optimizer.betas=[0.8,0.7]", "optimizer.eps=1e-3"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48}
    return make_model(tmp_path_factory.mktemp("resume") / "model", "qwen3", **sizes)


def student(model: Path, root: Path, *overrides: str) -> tuple[Student, Checkpointer]:
    paths = [f"model.{role}.path={model}" for role in ("student", "teacher")]
    config = compose(["model=local", *paths, *BEFORE, *overrides])
    made = Student(config)
    return made, Checkpointer(config.checkpoint, root, made, needed=0)


def update(student: Student, numbers: range) -> list[float]:
    """Updates with gradients that depend on their number alone; their learning rates."""
    rates = []
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for parameter in (p for chunk in student.chunks for p in chunk.parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.main_grad.copy_(noise)
        rates.append(student.update()["lr"])
    return rates


def weights(student: Student) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for m in student.models for p in m.parameters()])


@pytest.mark.parametrize("kind", [[], DISTRIBUTED], ids=["plain", "distributed"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_settings_of_the_optimizer_are_those_of_the_run_not_of_its_checkpoint(
    kind: list[str], dtype: list[str], model: Path, one_rank: Any, tmp_path: Path
) -> None:
    before, saver = student(model, tmp_path, *kind, *dtype)
    update(before, range(3))
    saver.save(TrainerState(3, 3, 0, 7, "", {}))
    after, loader = student(model, tmp_path, *kind, *dtype, *CHANGES, "train.num_steps=15")
    loader.load(tmp_path / "step_00000003")
    rates = update(after, range(3, 6))  # of 16 steps the first 4 warm up
    expected = [4e-3, *(1e-3 + 3e-3 * (1 + math.cos(math.pi * n / 12)) / 2 for n in (1, 2))]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert [scheduled_lr(after._config.optimizer, 15, n) for n in (4, 5, 6)] == rates
    decays = set()
    for group in after.optimizer.param_groups:
        assert (group["max_lr"], group["min_lr"], group["eps"]) == (4e-3, 1e-3, 1e-3)
        assert tuple(group["betas"]) == (0.8, 0.7) and group["lr"] == rates[-1]
        decays.add(group["weight_decay"])
    assert decays == {0.3, 0.0}  # none for norms
    # As if the run had been given these settings while it was going on.
    for group, new in zip(before.optimizer.param_groups, after.optimizer.param_groups, strict=True):
        group |= {k: v for k, v in new.items() if k not in ("params", "lr", "step")}
    before.scheduler = after.scheduler
    after.scheduler.optimizer, after.scheduler.num_steps = before.optimizer, 3
    assert update(before, range(3, 6)) == rates
    assert torch.equal(weights(before), weights(after))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("first", [[], DISTRIBUTED], ids=["to-distributed", "from-distributed"])
def test_a_run_goes_on_bit_for_bit_with_the_other_kind_of_optimizer(
    first: list[str], dtype: list[str], model: Path, one_rank: Any, tmp_path: Path
) -> None:
    same = [*dtype, "optimizer.clip_grad=0"]  # the two add up the gradient's norm in other orders
    whole, saver = student(model, tmp_path, *first, *same)
    update(whole, range(3))
    saver.save(TrainerState(3, 3, 0, 7, "", {}))
    other = [] if first else DISTRIBUTED
    resumed, loader = student(model, tmp_path, *other, *same)
    loader.load(tmp_path / "step_00000003")
    assert type(resumed.optimizer.chained_optimizers[0]) is not type(
        whole.optimizer.chained_optimizers[0]
    )
    assert update(resumed, range(3, 6)) == update(whole, range(3, 6))
    assert torch.equal(weights(resumed), weights(whole))


@pytest.mark.parametrize("kind", [[], DISTRIBUTED], ids=["plain", "distributed"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_a_checkpoint_from_before_the_first_update_can_be_resumed(
    kind: list[str], dtype: list[str], model: Path, one_rank: Any, tmp_path: Path
) -> None:
    whole, saver = student(model, tmp_path, *kind, *dtype)
    saver.save(TrainerState(1, 0, 1, 7, "", {}))  # its only step had nothing to train on
    resumed, loader = student(model, tmp_path, *kind, *dtype)
    loader.load(tmp_path / "step_00000001")
    assert update(resumed, range(2)) == update(whole, range(2))
    assert torch.equal(weights(resumed), weights(whole))


# --- settings and data: what is said, what is refused ---


def changed(before: list[str], now: list[str]) -> list[str]:
    record = json.loads(json.dumps(public_settings(compose(before))))  # as a checkpoint holds it
    return [str(change) for change in changed_settings(record, compose(now))]


def test_every_setting_that_changed_is_named_with_both_values() -> None:
    assert changed([], ["run.dir=elsewhere", "checkpoint.resume=never"]) == []
    now = ["optimizer.betas=[0.8,0.7]", "train.num_steps=7", "run.seed=1", "loss.top_k=5"]
    assert changed(["optimizer.lr=1e-3"], [*now, "optimizer.lr=5e-4"]) == [
        "run.seed: 1234 -> 1",
        "loss.top_k: null -> 5",
        "optimizer.lr: 0.001 -> 0.0005",
        "optimizer.betas: [0.9, 0.95] -> [0.8, 0.7]",
        "train.num_steps: 100 -> 7",
    ]
    [thinking] = changed([], ["+data.chat_template_kwargs.enable_thinking=false"])
    assert thinking == "data.chat_template_kwargs.enable_thinking: nothing -> false"
    templates = [f"refinement.templates.system={'word ' * 40}{end} {'x' * 90}" for end in "ab"]
    [template] = changed(templates[:1], templates[1:])
    assert "word a xxx" in template and "word b xxx" in template and len(template) < 200


def test_secrets_are_in_no_checkpoint_and_in_no_message() -> None:
    servers = [f"+data.chat_template_kwargs.api_key={key}" for key in ("one", "two")]
    assert changed(servers[:1], servers[1:]) == []
    assert "one" not in json.dumps(public_settings(compose(servers[:1]))["data"])


def test_the_learning_rate_before_and_after_is_named() -> None:
    def said(now: list[str], updates: int) -> str | None:
        base = ["optimizer.schedule=linear", "optimizer.warmup_fraction=0", "optimizer.lr=1e-2"]
        record = public_settings(compose([*base, "train.num_steps=9"]))
        return rate_change(record, compose([*base, "train.num_steps=9", *now]), updates)

    assert said([], 3) is None and said(["optimizer.eps=1e-3"], 3) is None
    longer = said(["train.num_steps=19"], 3)
    assert longer == "learning rate of update 4: 0.006 -> 0.008; update 3 had 0.007"
    ended = said(["train.num_steps=19"], 9)
    assert ended == "learning rate: update 9 had 0.001, the last one planned; update 10 has 0.005"
    assert said(["train.num_steps=5"], 9) is None  # nothing is left to do
    assert said(["optimizer.lr=2e-2"], 0) == "learning rate of update 1: 0.009 -> 0.018"


def saved(directory: Path, config: Config, known: bytes | None, **state: Any) -> Path:
    record = public_settings(config)
    made = TrainerState(3, 3, 0, 4, config.digest(), {"hidden_size": 32}, record)
    directory.mkdir()
    text = json.dumps({**vars(replace(made, **state)), "files": {}})
    (directory / STATE_FILE).write_text(text)
    if known is not None:
        (directory / DIGESTS_FILE).write_bytes(known)
    return directory


def test_another_precision_is_refused_and_other_settings_are_not(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "c", compose(FP32), None)
    model = {"hidden_size": 32}
    check_matches(checkpoint, model, compose([*FP32, "optimizer.lr=1", "optimizer.min_lr=0.5"]))
    with pytest.raises(ConfigError, match="holds a run in fp32") as refusal:
        check_matches(checkpoint, model, compose(BF16))
    assert str(refusal.value).startswith("precision.dtype = 'bf16'")
    assert "\n" not in str(refusal.value)


def test_a_teacher_cannot_begin_to_follow_in_the_middle_of_a_run(tmp_path: Path) -> None:
    opsd = [*FP32, "algorithm.mode=opsd", "model.teacher=null"]
    follows = [*opsd, "teacher.ema=0.9"]
    model = {"hidden_size": 32}
    checkpoint = saved(tmp_path / "frozen", compose(opsd), None)
    with pytest.raises(ConfigError, match="teacher.ema = 0.9: .* holds no average"):
        check_matches(checkpoint, model, compose(follows))
    checkpoint = saved(tmp_path / "follows", compose(follows), None)
    check_matches(checkpoint, model, compose([*opsd, "teacher.ema=0.99"]))


def test_a_checkpoint_without_a_record_only_knows_that_something_changed(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "c", compose(FP32), None, settings={})
    check_matches(checkpoint, {"hidden_size": 32}, compose(BF16))
    assert changes_since(checkpoint, compose(FP32)) == ([], "")
    assert "does not record which" in changes_since(checkpoint, compose(BF16))[1]


PROMPTS = [Prompt(i, f"{i}+1?", (5, i), f"so {i + 1}", str(i + 1)) for i in range(4)]
ONE, TWO, THREE, FOUR = PROMPTS
EDITS = {
    "swapped": ([ONE, replace(THREE, index=1), replace(TWO, index=2), FOUR], "another order", 2),
    "reversed": ([replace(p, index=3 - p.index) for p in PROMPTS[::-1]], "another order", 1),
    "problem": (
        [ONE, TWO, replace(THREE, problem="x", token_ids=(5,)), FOUR],
        "1 of 4 usable prompts differ, first at DATA line 3 (another problem, tokens)",
        3,
    ),
    "answer": ([*PROMPTS[:3], replace(FOUR, answer="5")], "(another answer)", 4),
    "reference": ([replace(ONE, reference_solution="y"), *PROMPTS[1:]], "reference solution)", 1),
    "fewer": (PROMPTS[:3], "made with 4 usable prompts and there are 3 now; the last 1 are", None),
    "more": ([*PROMPTS, Prompt(4, "new", (1,))], "there are 5 now; the first new one is", 5),
    "tokens": ([replace(p, token_ids=(6, p.index)) for p in PROMPTS], "chat template", 1),
    "row before left out": (
        [ONE, *(replace(p, index=p.index + 1) for p in PROMPTS[1:])],
        "stand in other rows (seeds depend on them): DATA line 3 was row 2",
        3,
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    file.write_text('{"problem": "1"}\n' * 5)
    return file


@pytest.mark.parametrize("edit", EDITS)
def test_changed_data_is_refused_with_its_first_row_unless_accepted(
    edit: str, data: Path, tmp_path: Path
) -> None:
    config = compose([f"data.train.path={data}"])
    checkpoint = saved(tmp_path / "c", config, digests(PROMPTS))
    assert check_prompts(checkpoint, digests(PROMPTS), config) is None
    now, words, line = EDITS[edit]
    with pytest.raises(ConfigError) as refusal:
        check_prompts(checkpoint, digests(now), config)
    assert words.replace("DATA", str(data)) in str(refusal.value)
    assert line is None or f"{data} line {line}" in str(refusal.value)
    assert "checkpoint.accept_changed_data=true" in str(refusal.value)
    accepted = compose([f"data.train.path={data}", "checkpoint.accept_changed_data=true"])
    notice = check_prompts(checkpoint, digests(now), accepted)
    assert notice and words.replace("DATA", str(data)) in notice


def test_the_setting_that_changed_the_prompts_is_named(data: Path, tmp_path: Path) -> None:
    path = f"data.train.path={data}"
    checkpoint = saved(tmp_path / "c", compose([path]), digests(PROMPTS))
    now = digests([replace(p, token_ids=(6, p.index)) for p in PROMPTS])
    with pytest.raises(ConfigError, match='data.system_prompt: null -> "be short"'):
        check_prompts(checkpoint, now, compose([path, "data.system_prompt='be short'"]))


def test_a_checkpoint_that_knows_only_the_number_of_prompts_compares_that(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "c", compose([]), None)
    assert check_prompts(checkpoint, digests(PROMPTS[::-1]), compose([])) is None
    with pytest.raises(ConfigError, match="with 4 usable prompts and there are 3 now"):
        check_prompts(checkpoint, digests(PROMPTS[:3]), compose([]))


def test_samples_drawn_ahead_hold_only_for_the_settings_that_they_depend_on() -> None:
    record = public_settings(compose([]))

    def hold(*now: str) -> bool:
        return samples_hold(changed_settings(record, compose(list(now))))

    assert hold("optimizer.lr=1", "train.num_steps=7", "loss.top_k=5", "logging.progress=false")
    for change in ("run.seed=1", "train.prompts_per_step=3", "generation.rollout.temperature=0.1"):
        assert not hold(change)
