"""What a run reads and checks before it builds any model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_trd.algorithm.refinement import fitting_prompts
from nemo_trd.algorithm.refinement_checks import check_openings, check_templates
from nemo_trd.config.schema import Config
from nemo_trd.data.prompt_digests import digests
from nemo_trd.data.prompts import LoadedPrompts, load_prompts
from nemo_trd.data.types import Prompt
from nemo_trd.plan.memory import checkpoint_bytes
from nemo_trd.preflight import models as preflight
from nemo_trd.records import disk_space
from nemo_trd.records.checkpoint_dir import find_checkpoint, read_state
from nemo_trd.run.resume import check_matches, check_prompts, model_identity


@dataclass(frozen=True)
class Inputs:
    """What a run reads before it builds any model."""

    student_tokenizer: Any
    teacher_tokenizer: Any
    prompts: LoadedPrompts
    validation: list[Prompt]
    checkpoint: Path | None  # to resume from
    prompt_digests: bytes


def load_inputs(config: Config, world_size: int) -> Inputs:
    """Check everything that can be checked, and read data and tokenizers.

    Raises:
        ConfigError: what is wrong and how to mend it. Nothing has been written.
    """
    student, teacher = preflight.check(config, world_size)
    student_tokenizer, teacher_tokenizer = student.tokenizer, teacher.tokenizer
    check_templates(config, teacher_tokenizer)
    prompts = load_prompts(
        config.data.train,
        "data.train",
        config.data,
        student_tokenizer,
        needs_reference=config.algorithm.mode == "opsd",
    )
    check_openings(config, student_tokenizer, teacher_tokenizer)
    prompts = fitting_prompts(prompts, config, teacher_tokenizer)
    validation: list[Prompt] = []
    if config.data.validation is not None:
        validation = load_prompts(
            config.data.validation, "data.validation", config.data, student_tokenizer
        ).prompts
    known = digests(prompts.prompts)
    root = config.run_dir / "checkpoints"
    checkpoint = find_checkpoint(config.checkpoint, root)
    if checkpoint is not None:
        check_matches(checkpoint, model_identity(student.hf), config)
        check_prompts(checkpoint, known, config)
    if checkpoint is None or read_state(checkpoint).step < config.train.num_steps:
        disk_space.check_before_start(root, _first_checkpoint(config, student.hf))
    return Inputs(student_tokenizer, teacher_tokenizer, prompts, validation, checkpoint, known)


def _first_checkpoint(config: Config, hf: Any) -> int:
    weights = checkpoint_bytes(config, hf)["checkpoint"]
    return disk_space.first_checkpoint(weights, hf.num_hidden_layers)
