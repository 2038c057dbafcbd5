"""Inputs of a run, read and checked before any model is built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_trd.algorithm.refinement import fitting_prompts, privileged_context
from nemo_trd.algorithm.refinement_checks import check_openings, check_templates
from nemo_trd.config.schema import Config
from nemo_trd.data.prompt_digests import digests
from nemo_trd.data.prompts import LoadedPrompts, load_prompts, prompts_of_step
from nemo_trd.data.types import FittedContext, Prompt, TokenIds
from nemo_trd.plan.memory import checkpoint_bytes
from nemo_trd.preflight import models as preflight
from nemo_trd.records import disk_space
from nemo_trd.records.checkpoint_dir import find_checkpoint, read_state
from nemo_trd.run.resume import check_matches, check_prompts, model_identity


@dataclass(frozen=True)
class Inputs:
    """Prompts and tokenizers of a run, and the checkpoint that it goes on from."""

    config: Config
    student_tokenizer: Any
    teacher_tokenizer: Any
    training_prompts: list[Prompt]  # in the order of the data
    left_out: dict[str, int]  # reason -> rows of data.train
    validation_prompts: list[Prompt]
    checkpoint: Path | None  # to resume from
    prompt_digests: bytes  # of the training prompts

    def prompts(self, step: int) -> list[Prompt]:
        """x: the prompts of a step, counted from 0."""
        train, seed = self.config.train, self.config.run.seed
        return prompts_of_step(self.training_prompts, step, train.prompts_per_step, seed)

    def teacher_prompt(self, prompt: Prompt) -> FittedContext:
        """Context of the teacher in the place of a refinement prompt: x, in OPSD (x, y*)."""
        return privileged_context(prompt, self.config, self.teacher_tokenizer)

    def decode(self, token_ids: TokenIds) -> str:
        """Text of token ids by the student's tokenizer, without special tokens."""
        return self.student_tokenizer.decode(token_ids, skip_special_tokens=True)


def load_training_prompts(
    config: Config, student_tokenizer: Any, teacher_tokenizer: Any
) -> LoadedPrompts:
    """Read data.train, check the templates, and keep the prompts that fit both models.

    Raises:
        ConfigError: data or templates that cannot be used.
    """
    check_templates(config, teacher_tokenizer)
    prompts = load_prompts(
        config.data.train,
        "data.train",
        config.data,
        student_tokenizer,
        needs_reference=config.algorithm.mode == "opsd",
        stored_for=config.generation,
    )
    check_openings(config, student_tokenizer, teacher_tokenizer)
    return fitting_prompts(prompts, config, teacher_tokenizer)


def load_inputs(config: Config, world_size: int) -> Inputs:
    """Check everything that can be checked, and read data and tokenizers.

    Raises:
        ConfigError: what is wrong and how to mend it. Nothing has been written.
    """
    student, teacher = preflight.check(config, world_size)
    student_tokenizer, teacher_tokenizer = student.tokenizer, teacher.tokenizer
    prompts = load_training_prompts(config, student_tokenizer, teacher_tokenizer)
    validation: list[Prompt] = []
    if config.data.validation is not None:
        validation = load_prompts(
            config.data.validation, "data.validation", config.data, student_tokenizer
        ).prompts
    known = digests(prompts.prompts)
    root = config.run_dir / "checkpoints"
    checkpoint = find_checkpoint(config.checkpoint, root)
    if checkpoint is not None:
        identity = model_identity(student.hf, config.student.adapter)
        check_matches(checkpoint, identity, config)
        check_prompts(checkpoint, known, config)
    if checkpoint is None or read_state(checkpoint).step < config.train.num_steps:
        disk_space.check_before_start(root, first_checkpoint_bytes(config, student.hf))
    return Inputs(
        config,
        student_tokenizer,
        teacher_tokenizer,
        prompts.prompts,
        prompts.skipped,
        validation,
        checkpoint,
        known,
    )


def first_checkpoint_bytes(config: Config, hf: Any) -> int:
    """Estimate the bytes of a checkpoint before there is one."""
    weights = checkpoint_bytes(config, hf)["checkpoint"]
    return disk_space.first_checkpoint(weights, hf.num_hidden_layers)
