"""Settings with NeMo-Aligner's keys, as the example recipe has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from nemo_trd.adapters.aligner_config import config_from_aligner
from nemo_trd.config.errors import ConfigError
from nemo_trd.config.load import compose

RECIPE = Path(__file__).parents[2] / "examples" / "nemo_aligner" / "conf" / "gpt_trd.yaml"

LORA = {"model__peft__peft_scheme": "lora"}


def recipe(**changes: Any) -> DictConfig:
    """The example, with what it asks for; keys of `changes` have __ for a dot."""
    cfg = OmegaConf.load(RECIPE)
    assert isinstance(cfg, DictConfig)
    given = {
        "exp_manager__explicit_log_dir": "/runs/mine",
        "pretrained_checkpoint__restore_from_path": "/models/student",
        "model__data__train": "/data/train.jsonl",
        "model__trd__model__teacher__path": "/models/teacher",
    }
    for key, value in {**given, **changes}.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    return cfg


def test_example_recipe_says_the_same_as_our_own_settings() -> None:
    cfg = recipe(
        trainer__trd__max_steps=49,
        trainer__trd__num_rollouts_per_prompt=4,
        model__data__validation="/data/validation.jsonl",
        model__tensor_model_parallel_size=2,
        model__sequence_parallel=True,
        model__trd__loss={"divergence": "jsd", "beta": 0.3},
        model__trd__data={"train": {"limit": 5}},
    )
    columns = "{problem: question, messages: null, reference_solution: answer, answer: null}"
    rest = r"name: null, split: train, answer_pattern: '####\s*(.+)', limit: 5"
    expected = compose(
        [
            *(
                "model=local",
                "data=gsm8k",
                "run.dir=/runs/mine",
                "model.student.path=/models/student",
            ),
            *("model.teacher.path=/models/teacher", "data.train.path=/data/train.jsonl"),
            "data.train.limit=5",
            f"data.validation={{path: /data/validation.jsonl, columns: {columns}, {rest}}}",
            *("train.num_steps=49", "train.rollouts_per_prompt=4", "train.prompts_per_step=16"),
            *("train.micro_batch_size=1", "train.max_tokens_per_micro_batch=null"),
            *("evaluation.interval=10", "checkpoint.save_interval=10", "optimizer.clip_grad=1.0"),
            "parallel.student.tensor_model_parallel_size=2",
            *("parallel.student.sequence_parallel=true", "precision.dtype=bf16"),
            *("optimizer.warmup_fraction=0.2", "loss.divergence=jsd", "loss.beta=0.3"),
        ]
    )
    assert config_from_aligner(cfg) == expected


def test_an_adapter_has_aligners_names() -> None:
    assert config_from_aligner(recipe()).student.adapter is None
    adapted = recipe(
        model__peft__peft_scheme="lora",
        model__peft__restore_from_path="/adapters/mine",
        model__peft__lora_tuning__target_modules=["mlp_fc2", "attention"],
        model__peft__lora_tuning__adapter_dim=8,
        model__peft__lora_tuning__alpha=None,
        model__peft__lora_tuning__adapter_dropout=0.1,
    )
    expected = compose(
        [
            *("student.adapter=lora", "student.adapter.rank=8", "student.adapter.alpha=8"),
            *("student.adapter.dropout=0.1", "student.adapter.init=/adapters/mine"),
            "student.adapter.targets=[down,q,k,v,o]",
        ]
    )
    adapter = config_from_aligner(adapted).student.adapter
    assert adapter is not None and adapter == expected.student.adapter
    cfg = recipe()
    del cfg.model.peft
    assert config_from_aligner(cfg).student.adapter is None


def test_without_validation_data_nothing_is_evaluated() -> None:
    config = config_from_aligner(recipe())
    assert config.data.validation is None and config.evaluation.interval is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model__data__train": "???"}, ["model.data.train has no value"]),
        ({"trainer__trd__max_epoch": 3}, ["trainer.trd.max_epoch", "nothing reads"]),
        ({"model__optim__name": "adam"}, ["model.optim.name", "nothing reads"]),
        ({"model__trd__loss__top_kk": 3}, ["loss.top_kk", "did you mean"]),
        ({"model__trd__groups__data": "gsm9k"}, ["gsm9k"]),
        ({"trainer__precision": 16}, ["trainer.precision", "bf16"]),
        ({"model__global_batch_size": 6, "trainer__trd__num_rollouts_per_prompt": 4}, ["divide"]),
        ({"model__optim__sched__warmup_steps": 101}, ["warmup_steps", "trainer.trd.max_steps"]),
        ({"model__peft__peft_scheme": "sdlora"}, ["model.peft.peft_scheme", "none, lora"]),
        ({"model__peft__lora_tuning__weight_tying": True}, ["weight_tying", "nothing reads"]),
        (
            {**LORA, "model__peft__lora_tuning__target_modules": ["all", "lm_head"]},
            ["model.peft.lora_tuning.target_modules = 'lm_head'", "mlp_fc1"],
        ),
        (
            {**LORA, "model__peft__lora_tuning__variant": "nemo"},
            ["model.peft.lora_tuning.variant", "an A each", "canonical"],
        ),
        (
            {**LORA, "model__peft__lora_tuning__dropout_position": "post"},
            ["model.peft.lora_tuning.dropout_position", "input of A"],
        ),
        ({**LORA, "model__peft__lora_tuning__adapter_dim": 0}, ["student.adapter.rank = 0"]),
        ({"exp_manager__max_time_per_run": "00:03:55:00"}, ["max_time_per_run", "SIGUSR1"]),
    ],
)
def test_what_nothing_would_read_is_refused(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        config_from_aligner(recipe(**change))
    for word in words:
        assert word in str(refused.value)
