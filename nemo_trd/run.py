"""What surrounds the loop: loading and checking, resuming, evaluating, recording, saving."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nemo_trd import preflight, trackers
from nemo_trd.checkpoint_dir import (
    TrainerState,
    check_matches,
    check_prompts,
    find_checkpoint,
    model_identity,
)
from nemo_trd.config import Config
from nemo_trd.evaluate import evaluate
from nemo_trd.generation.local import LocalGenerator
from nemo_trd.megatron.checkpoint import Checkpointer
from nemo_trd.megatron.hf_weights import save_hf_directory
from nemo_trd.megatron.runtime import StopRequest
from nemo_trd.megatron.student import StepResult, Student
from nemo_trd.megatron.teacher import Teacher
from nemo_trd.metrics import RunLogger, Timers
from nemo_trd.prompts import LoadedPrompts, load_prompts, prompts_of_step
from nemo_trd.refinement import (
    check_templates,
    fitting_prompts,
    privileged_context,
    refinement_counts,
)
from nemo_trd.samples import Sample
from nemo_trd.sampling import Sampler, reject_outside_support
from nemo_trd.types import Prompt, Refinement, TokenIds, Trajectory
from nemo_trd.verifiers import verifier

log = logging.getLogger(__name__)

CHANGES = ("wrong_to_right", "wrong_to_wrong", "right_to_right", "right_to_wrong")


@dataclass(frozen=True)
class Inputs:
    """What a run reads before it builds any model."""

    student_tokenizer: Any
    teacher_tokenizer: Any
    prompts: LoadedPrompts
    validation: list[Prompt]
    checkpoint: Path | None  # to resume from


def load_inputs(config: Config, world_size: int) -> Inputs:
    """Check everything that can be checked, and read data and tokenizers.

    Raises:
        ConfigError: what is wrong and how to mend it. Nothing has been written.
    """
    student, teacher = preflight.check(config, world_size)
    student_tokenizer, teacher_tokenizer = student.tokenizer, teacher.tokenizer
    trackers.check_packages(config.logging)
    check_templates(config, teacher_tokenizer)
    prompts = load_prompts(config.data.train, "data.train", config.data, student_tokenizer)
    prompts = fitting_prompts(prompts, config, teacher_tokenizer)
    validation: list[Prompt] = []
    if config.data.validation is not None:
        validation = load_prompts(
            config.data.validation, "data.validation", config.data, student_tokenizer
        ).prompts
    checkpoint = find_checkpoint(config.checkpoint, config.run_dir / "checkpoints")
    if checkpoint is not None:
        check_matches(checkpoint, model_identity(student.hf), config.digest())
        check_prompts(checkpoint, len(prompts.prompts))
    return Inputs(student_tokenizer, teacher_tokenizer, prompts, validation, checkpoint)


class Run:
    """One run of TRD: its models and generators, where it stands, and its records.

    All methods are collective.
    """

    def __init__(self, config: Config, inputs: Inputs, stop: StopRequest) -> None:
        self.config = config
        self._inputs = inputs
        self._stop = stop
        self._verify = verifier(config.data.verifier)
        self.student = Student(config)
        self.teacher = Teacher(config, self.student.groups)
        self._generator, teacher_generator = _generators(config)
        self.sampler = Sampler(
            config,
            self._generator,
            teacher_generator,
            inputs.student_tokenizer,
            inputs.teacher_tokenizer,
        )
        self._checkpointer = Checkpointer(
            config.checkpoint, config.run_dir / "checkpoints", self.student
        )
        self._state = TrainerState(
            step=0,
            weight_version=0,
            failed_steps=0,
            num_prompts=len(inputs.prompts.prompts),
            digest=config.digest(),
            model=model_identity(self.student.hf),
        )
        self._saved_step: int | None = None
        if inputs.checkpoint is not None:
            self._state = replace(
                self._checkpointer.load(inputs.checkpoint), digest=config.digest()
            )
            self._saved_step = self._state.step
            self.sync_weights(self._state.weight_version)
        self.timers = Timers()
        self._logger = RunLogger(config, dist.get_rank() == 0, self._state.step)
        self._announce()

    def _announce(self) -> None:
        config, layout = self.config, self.student.layout
        log.info(
            "%s run in %s: %d prompts (left out: %s), %d ranks, student tp %d pp %d dp %d",
            config.algorithm.mode.upper(),
            config.run_dir,
            self._state.num_prompts,
            self._inputs.prompts.skipped or "none",
            dist.get_world_size(),
            layout.tensor_model_parallel_size,
            layout.pipeline_model_parallel_size,
            self.student.groups.dp.size(),
        )
        if self._inputs.checkpoint is not None:
            log.info("resumed from %s", self._inputs.checkpoint)

    @property
    def step(self) -> int:
        """Steps done."""
        return self._state.step

    def start(self) -> None:
        """Evaluate the student that the run begins with."""
        if self.config.evaluation.at_start and self.step == 0:
            self._evaluate()
        self.timers.take()

    def prompts(self) -> list[Prompt]:
        """x: the prompts of this step."""
        return prompts_of_step(
            self._inputs.prompts.prompts,
            self.step,
            self.config.train.prompts_per_step,
            self.config.run.seed,
        )

    def teacher_prompt(self, prompt: Prompt) -> TokenIds:
        """What the teacher sees in the place of a refinement prompt: x, in OPSD (x, y*)."""
        return privileged_context(prompt, self.config, self._inputs.teacher_tokenizer)

    def within_support(self, refinements: Sequence[Refinement]) -> Sequence[Refinement]:
        """Reject rewrites that lie too far from what the student would say."""
        largest_gap = self.config.refinement.max_student_nll_gap
        if largest_gap is None or all(r.rejection for r in refinements):
            return refinements
        return reject_outside_support(refinements, self.student.mean_nll, largest_gap)

    def watched(self, trajectories: Sequence[Trajectory]) -> list[str]:
        """Names of the trajectories that the samples of this step show."""
        if not self._logger.wants_samples(self.step + 1):
            return []
        return [t.name for t in trajectories[: self.config.logging.samples_count]]

    def sync_weights(self, version: int) -> None:
        """Bring the student's weights to its generator."""
        self._generator.load_weights(self.student.export_hf_weights(), version)

    def finish_step(
        self,
        refinements: Sequence[Refinement],
        trajectories: Sequence[Trajectory],
        result: StepResult | None,
    ) -> int | None:
        """Record, evaluate and save as configured. An exit code when the run is to stop now.

        Raises:
            RuntimeError: `train.max_failed_steps` in a row had nothing to train on.
        """
        counts = refinement_counts(refinements)
        self._state = replace(
            self._state,
            step=self.step + 1,
            weight_version=self.step + 1 if result else self._state.weight_version,
            failed_steps=0 if result else self._state.failed_steps + 1,
        )
        metrics = {**counts, **(result.metrics if result else {})}
        self._logger.step(self.step, metrics, self.timers.take())
        if self._logger.wants_samples(self.step):
            self._write_samples(refinements, trajectories, result)
        if self._state.failed_steps >= self.config.train.max_failed_steps:
            reasons = {name: n for name, n in counts.items() if name.startswith("rejected_") and n}
            raise RuntimeError(
                f"{self._state.failed_steps} steps in a row (train.max_failed_steps) had nothing "
                f"to train on; in the last one: {reasons or counts}. Fix: look at "
                f"{self.config.run_dir / 'samples'}; raise generation.refinement.max_tokens or "
                "refinement.max_context_tokens, or set refinement.on_failure=rollout."
            )
        interval = self.config.evaluation.interval
        if interval is not None and self.step % interval == 0:
            with self.timers("evaluation"):
                self._evaluate()
        with self.timers("checkpoint"):
            self._checkpointer.poll()
            exit_code = self._stop.exit_code()
            if exit_code is not None or self.step % self.config.checkpoint.save_interval == 0:
                self._save()
        if exit_code is not None:
            self._checkpointer.wait()
            log.info("stopped on request after step %d; the run can be resumed", self.step)
        return exit_code

    def finish(self) -> None:
        """The last evaluation, checkpoint, export and summary."""
        self._save()
        self._checkpointer.wait()
        if self.config.evaluation.at_end:
            self._evaluate()
        export = self.config.run_dir / "export"
        if self.config.checkpoint.export_hf:
            save_hf_directory(
                self.student.export_hf_weights(), self.config.model.student.path, export
            )
        self._write_summary(export if self.config.checkpoint.export_hf else None)

    def close(self, succeeded: bool) -> None:
        self._checkpointer.close()
        self._logger.close(succeeded)

    def _save(self) -> None:
        if self._saved_step != self.step:
            self._checkpointer.save(self._state)
            self._saved_step = self.step

    def _evaluate(self) -> None:
        if not self._inputs.validation:
            return
        accuracy = evaluate(
            self.sampler.complete,
            self._inputs.validation,
            self.config.evaluation,
            self.config.run.seed,
            self._verify,
            lambda ids: self._inputs.student_tokenizer.decode(ids, skip_special_tokens=True),
        )
        self._logger.evaluation(self.step, accuracy)

    def _write_samples(
        self,
        refinements: Sequence[Refinement],
        trajectories: Sequence[Trajectory],
        result: StepResult | None,
    ) -> None:
        trained = {(t.prompt_index, t.sample_index): t for t in trajectories}
        samples = []
        for refinement in refinements:
            rollout = refinement.request.rollout
            trajectory = trained.get((rollout.prompt.index, rollout.sample_index))
            divergence = None
            if trajectory is not None and result is not None:
                divergence = result.token_divergence.get(trajectory.name)
            shown = None if refinement.rejection == "subset" else refinement
            samples.append(Sample(rollout, shown, trajectory, divergence))
        self._logger.samples(
            self.step, samples, lambda token: self._inputs.student_tokenizer.decode([token])
        )

    def _write_summary(self, export: Path | None) -> None:
        if dist.get_rank() != 0:
            return
        evaluations = self._logger.evaluations()
        run_dir = self.config.run_dir
        self._logger.summary(
            {
                "steps": self.step,
                "before": evaluations.get(0),
                "after": evaluations.get(self.step),
                "refinement": {
                    name: int(count) for name, count in self._logger.total(CHANGES).items()
                },
                "paths": {
                    "checkpoint": (run_dir / "checkpoints" / "latest").resolve(),
                    "export": export,
                    "metrics": run_dir / "metrics.jsonl",
                    "samples": run_dir / "samples",
                    "tensorboard": run_dir / "tensorboard",
                },
            }
        )


def _generators(config: Config) -> tuple[LocalGenerator, LocalGenerator]:
    """Student's and teacher's."""
    progress = config.logging.progress and dist.get_rank() == 0

    def generator(source: Any) -> LocalGenerator:
        return LocalGenerator(
            source.path, config.generation.local, source.trust_remote_code, progress
        )

    student = generator(config.model.student)
    if config.algorithm.trajectory == "rollout":
        return student, student  # no rewrite is ever asked for: a second model would idle
    return student, generator(config.teacher_source)
