"""What surrounds the loop: loading and checking, resuming, evaluating, recording, saving."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from nemo_trd.algorithm.acceptance import refinement_counts, reject_outside_support
from nemo_trd.algorithm.change import change, mean_change, rewritten, rollout_nll
from nemo_trd.algorithm.refinement import privileged_context
from nemo_trd.config.schema import Config
from nemo_trd.data.prompts import prompts_of_step
from nemo_trd.data.types import (
    FittedContext,
    GenerationRequest,
    Prompt,
    Refinement,
    Rollout,
    TokenIds,
    Trajectory,
)
from nemo_trd.distributed.exchange import from_first_rank, merge_shares, own_share
from nemo_trd.distributed.stop import StopRequest
from nemo_trd.evaluate.accuracy import Accuracy
from nemo_trd.evaluate.in_run import evaluate
from nemo_trd.generation.protocol import request_seed
from nemo_trd.megatron.checkpoint import Checkpointer
from nemo_trd.megatron.learning_rate import rate_change
from nemo_trd.megatron.student import StepResult, Student
from nemo_trd.megatron.verification import verified_checkpoint
from nemo_trd.models.write import save_hf_directory
from nemo_trd.records import latest
from nemo_trd.records.checkpoint_dir import (
    TrainerState,
    read_samples_ahead,
)
from nemo_trd.records.run_logger import RunLogger
from nemo_trd.records.samples import Sample
from nemo_trd.records.timers import Timers
from nemo_trd.records.trackers import Tracker, public_settings
from nemo_trd.run import agreement
from nemo_trd.run.inputs import Inputs, _first_checkpoint
from nemo_trd.run.open import open_teacher_and_generators
from nemo_trd.run.outcome import where_to_look
from nemo_trd.run.resume import (
    changes_since,
    check_prompts,
    model_identity,
    samples_hold,
)
from nemo_trd.run.run_lock import RunLock
from nemo_trd.run.sampling import Sampler
from nemo_trd.run.teacher_check import check_teacher_servers
from nemo_trd.serve.open import Servers
from nemo_trd.verifiers import verifier

log = logging.getLogger(__name__)

CHANGES = ("wrong_to_right", "wrong_to_wrong", "right_to_right", "right_to_wrong")


class Run:
    """One run of TRD: its models and generators, where it stands, and its records.

    All methods are collective.
    """

    def __init__(
        self,
        config: Config,
        inputs: Inputs,
        stop: StopRequest,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.config = config
        self._lock = RunLock(config.run_dir)
        notices = from_first_rank(self._lock.acquire)
        try:
            self._build(inputs, stop, trackers, notices)
        except BaseException:
            self._lock.release()
            raise

    def _build(
        self,
        inputs: Inputs,
        stop: StopRequest,
        trackers: Sequence[Tracker],
        notices: list[str],
    ) -> None:
        """Everything that a run holds; `notices` are logged when there is a log."""
        config, root = self.config, self.config.run_dir / "checkpoints"
        # Found again: another process may have held the directory until now.
        checkpoint, found = verified_checkpoint(config.checkpoint, root)
        inputs = replace(inputs, checkpoint=checkpoint)
        self._inputs = inputs
        self._stop = stop
        self._verify = verifier(config.data.verifier, config.sandbox)
        self.student = Student(config)
        self.teacher, self._generators = open_teacher_and_generators(
            config, self.student, stop.signalled
        )
        self.sampler = Sampler(
            config,
            self._generators.student,
            self._generators.teacher,
            inputs.student_tokenizer,
            inputs.teacher_tokenizer,
        )
        needed = _first_checkpoint(config, self.student.hf)
        self._checkpointer = Checkpointer(config.checkpoint, root, self.student, needed)
        self._state = TrainerState(
            step=0,
            weight_version=0,
            failed_steps=0,
            num_prompts=len(inputs.prompts.prompts),
            digest=config.digest(),
            model=model_identity(self.student.hf),
            settings=public_settings(config),
        )
        self._saved_step: int | None = None
        self._last_line: str | None = None  # of the log, where the run ends as it was meant to
        self.samples_ahead: dict[int, list[Refinement]] = {}  # drawn before the run was cut off
        resumed = [] if inputs.checkpoint is None else self._resume(inputs.checkpoint)
        if inputs.checkpoint is not None or self._generators.on_servers:
            self.sync_weights()  # whatever a server has been given before
        self.timers = Timers()
        notices += [*found, *self._checkpointer.begin(inputs.checkpoint)]
        self._logger = RunLogger(config, dist.get_rank() == 0, self._state.step, trackers)
        self._announce(resumed, notices)

    def _resume(self, checkpoint: Path) -> list[str]:
        """Go on from a checkpoint. Returns what there is to say about that, for the log."""
        saved, own = self._checkpointer.load(checkpoint), self._state
        self._state = replace(
            own,
            step=saved.step,
            weight_version=saved.weight_version,
            failed_steps=saved.failed_steps,
        )
        self._saved_step = saved.step
        changes, changed = changes_since(checkpoint, self.config)
        lines = [f"resumed from {checkpoint}{'; ' if changed else ''}{changed}"]
        rate = rate_change(saved.settings, self.config, self.student.scheduler.num_steps)
        accepted = check_prompts(checkpoint, self._inputs.prompt_digests, self.config)
        self.samples_ahead = read_samples_ahead(checkpoint)
        redrawn = None
        if self.samples_ahead and (accepted or not samples_hold(changes)):
            steps = ", ".join(str(step + 1) for step in self.samples_ahead)
            redrawn = f"what was sampled for step {steps} before the change is sampled again"
            self.samples_ahead = {}
        return lines + [line for line in (rate, accepted, redrawn) if line]

    def _announce(self, resumed: Sequence[str], notices: Sequence[str]) -> None:
        config, layout = self.config, self.student.layout
        for line in resumed:
            log.info("%s", line)
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
        prompts, asked = self._state.num_prompts, config.train.prompts_per_step
        if prompts < asked and dist.get_rank() == 0:
            log.warning(
                "data.train has %d usable prompts, and train.prompts_per_step = %d: a step holds "
                "each of them %.3g times on average, each time with samples of its own",
                prompts,
                asked,
                asked / prompts,
            )
        if dist.get_rank() == 0:
            for notice in notices:
                log.warning("%s", notice)

    @property
    def step(self) -> int:
        """Steps done."""
        return self._state.step

    @property
    def training_prompts(self) -> list[Prompt]:
        """All of them, in the order of the data."""
        return self._inputs.prompts.prompts

    @property
    def validation_prompts(self) -> list[Prompt]:
        return self._inputs.validation

    def decode(self, token_ids: TokenIds) -> str:
        """As the student's tokenizer does, without special tokens."""
        return self._inputs.student_tokenizer.decode(token_ids, skip_special_tokens=True)

    def start(self) -> int | None:
        """Check the servers, and evaluate the student that the run begins with.

        Returns: an exit code when the run has been asked to stop meanwhile.

        Raises:
            Disagreement: the servers' log-probabilities are not the trainer's.
            ConfigError: the teacher's servers serve something else.
        """
        if self.step >= self.config.train.num_steps:
            log.info(
                "no step is left to do: %d are done, and train.num_steps is %d",
                self.step,
                self.config.train.num_steps,
            )
        exit_code = self._stop.exit_code()
        if exit_code is None:
            if self._generators.on_servers:
                self._check_servers(self._generators.compared_rollouts)
            if self._generators.teacher_servers is not None:
                self._check_teacher_servers(self._generators.teacher_servers)
            if self._evaluation_missing():
                self.evaluate()
            exit_code = self._stop.exit_code()
        if exit_code is not None:
            self._note_stopped()
        self.timers.take()
        return exit_code

    def _evaluation_missing(self) -> bool:
        """At the start, or of the step after which a run was stopped."""
        if self.step == 0:
            return self.config.evaluation.at_start
        evaluated = from_first_rank(lambda: self.step in self._logger.evaluations())
        return self._evaluation_due() and not evaluated

    def _evaluation_due(self) -> bool:
        interval = self.config.evaluation.interval
        return interval is not None and self.step % interval == 0

    def _check_teacher_servers(self, servers: Servers) -> None:
        check_teacher_servers(
            self.config,
            servers,
            self._inputs.teacher_tokenizer,
            self.training_prompts[0].token_ids,
            self.student,
            self.teacher,
            self.step,
        )

    def _check_servers(self, prompts: int) -> None:
        """Compare the log-probabilities of short answers to a few prompts."""
        asked = self._inputs.prompts.prompts[:prompts]
        seed, rollout = self.config.run.seed, self.config.generation.rollout
        sampling = rollout.model_copy(
            update={"max_tokens": min(64, rollout.max_tokens), "stop": []}
        )
        completions = self.sampler.complete(
            [GenerationRequest(p.token_ids, request_seed(seed, "check", p.index)) for p in asked],
            sampling,
            "log-probability check",
        )
        answers = zip(asked, completions, strict=True)
        found = self._differences([Rollout(p, 0, answer, "", None) for p, answer in answers])
        agreement.check(found, self.config.precision.dtype, self._inputs.student_tokenizer)
        log.info("servers and trainer agree: %s", agreement.figures(found))

    def prompts(self, step: int) -> list[Prompt]:
        """x: the prompts of a step."""
        return prompts_of_step(
            self.training_prompts,
            step,
            self.config.train.prompts_per_step,
            self.config.run.seed,
        )

    def teacher_prompt(self, prompt: Prompt) -> FittedContext:
        """What the teacher sees in the place of a refinement prompt: x, in OPSD (x, y*)."""
        return privileged_context(prompt, self.config, self._inputs.teacher_tokenizer)

    def within_support(self, refinements: Sequence[Refinement]) -> Sequence[Refinement]:
        """Reject rewrites that lie too far from what the student would say."""
        largest_gap = self.config.refinement.max_student_nll_gap
        if largest_gap is None or all(r.rejection for r in refinements):
            return refinements
        return reject_outside_support(refinements, self.student.token_nll, largest_gap)

    def measure(self, refinements: Sequence[Refinement]) -> dict[str, float]:
        """What is known of a step's samples before the student moves: age, rewriting, servers."""
        rollouts = [refinement.request.rollout for refinement in refinements]
        versions = [rollout.completion.weight_version for rollout in rollouts]
        rewrites = [refinement.completion for refinement in refinements if refinement.completion]
        return {
            "staleness": self._state.weight_version - sum(versions) / len(versions),
            "generated_tokens": sum(
                len(completion.token_ids)
                for completion in (*(rollout.completion for rollout in rollouts), *rewrites)
            ),
            **mean_change(merge_shares([change(*p) for p in own_share(rewritten(refinements))])),
            **rollout_nll(rollouts),
            **agreement.figures(self._differences(rollouts)),
        }

    def _differences(self, rollouts: Sequence[Rollout]) -> list[agreement.Difference]:
        compared = rollouts[: self._generators.compared_rollouts]
        return agreement.differences(compared, self.student.token_nll)

    def watched(self, trajectories: Sequence[Trajectory]) -> list[str]:
        """Names of the trajectories that the samples of this step show."""
        if not self._logger.wants_samples(self.step + 1):
            return []
        return [t.name for t in trajectories[: self.config.logging.samples_count]]

    def sync_weights(self) -> None:
        """Bring the student's weights to its generator."""
        version = self._state.weight_version
        self._generators.student.load_weights(self.student.export_hf_weights(), version)

    def record(
        self,
        refinements: Sequence[Refinement],
        trajectories: Sequence[Trajectory],
        result: StepResult | None,
        measured: Mapping[str, float],
    ) -> None:
        """Count the step, and write its line, metrics and samples.

        Raises:
            RuntimeError: `train.max_failed_steps` in a row had nothing to train on.
        """
        counts = refinement_counts(refinements, trajectories)
        self._state = replace(
            self._state,
            step=self.step + 1,
            weight_version=self.step + 1 if result else self._state.weight_version,
            failed_steps=0 if result else self._state.failed_steps + 1,
        )
        metrics = {**counts, **measured, **(result.metrics if result else {})}
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

    def finish_step(self, samples_ahead: Mapping[int, list[Refinement]]) -> int | None:
        """Evaluate and save as configured. An exit code when the run is to stop now."""
        exit_code = self._stop.exit_code()  # who asks may not have the time for an evaluation
        if exit_code is None and self._evaluation_due():
            with self.timers("evaluation"):
                self.evaluate()
            exit_code = self._stop.exit_code()
        with self.timers("checkpoint"):
            self._checkpointer.poll()
            if exit_code is not None or self.step % self.config.checkpoint.save_interval == 0:
                self.save(samples_ahead)
        if exit_code is not None:
            self._checkpointer.wait()
            self._note_stopped()
        return exit_code

    def _note_stopped(self) -> None:
        self._last_line = (
            f"stopped on request after step {self.step}; the run can be resumed: start again with "
            f"run.dir={self.config.run_dir}"
        )

    def finish(self) -> None:
        """The last evaluation, checkpoint, export and summary."""
        self.save()
        self._checkpointer.wait()
        if self.config.evaluation.at_end:
            self.evaluate()
        export = self.config.run_dir / "export"
        if self.config.checkpoint.export_hf:
            save_hf_directory(
                self.student.export_hf_weights(), self.config.model.student.path, export
            )
        self._write_summary(export if self.config.checkpoint.export_hf else None)
        looked_at = where_to_look(self.config.run_dir, self.config.checkpoint.export_hf)
        self._last_line = f"finished after step {self.step}; {looked_at}"

    def close(self, succeeded: bool) -> None:
        try:
            self._checkpointer.close()
            self._logger.close(succeeded, self._last_line)
            self._generators.close()
        finally:
            self._lock.release()

    def save(self, samples_ahead: Mapping[int, list[Refinement]] | None = None) -> None:
        """Write a checkpoint, unless there is one of this step; `samples_ahead` are kept in it."""
        if self._saved_step != self.step:
            from_first_rank(self._lock.check)
            self._checkpointer.save(self._state, samples_ahead, self._inputs.prompt_digests)
            self._saved_step = self.step

    def evaluate(self) -> Accuracy | None:
        """Let the student solve the validation problems, if there are any, and record how well."""
        if not self._inputs.validation:
            return None
        accuracy = evaluate(
            self.sampler.complete,
            self._inputs.validation,
            self.config.evaluation,
            self.config.run.seed,
            self._verify,
            self._inputs.student_tokenizer,
            self.sampler.map_shares,
        )
        self._logger.evaluation(self.step, accuracy.summary(), str(accuracy))
        return accuracy

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
            figures = None
            if trajectory is not None and result is not None:
                figures = result.watched.get(trajectory.name)
            shown = None if refinement.rejection == "subset" else refinement
            samples.append(Sample(rollout, shown, trajectory, figures))
        self._logger.samples(self.step, samples, self._inputs.student_tokenizer.decode)

    def _write_summary(self, export: Path | None) -> None:
        if dist.get_rank() != 0:
            return
        evaluations = self._logger.evaluations()
        run_dir = self.config.run_dir
        self._logger.summary(
            {
                "steps": self.step,
                "prompts": self._state.num_prompts,
                "prompts_left_out": self._inputs.prompts.skipped,
                "before": evaluations.get(0),
                "after": evaluations.get(self.step),
                "refinement": {
                    name: int(count) for name, count in self._logger.total(CHANGES).items()
                },
                "paths": {
                    "checkpoint": latest.read((run_dir / "checkpoints").resolve()),
                    "export": export,
                    "metrics": run_dir / "metrics.jsonl",
                    "samples": run_dir / "samples",
                    "tensorboard": run_dir / "tensorboard",
                },
            }
        )
