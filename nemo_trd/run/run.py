"""The life of a run around the loop: starting, resuming, counting, evaluating, saving, ending."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from nemo_trd.algorithm.acceptance import refinement_counts, reject_outside_support
from nemo_trd.config.schema import Config
from nemo_trd.data.types import Refinement
from nemo_trd.distributed.exchange import from_first_rank
from nemo_trd.distributed.stop import StopRequest
from nemo_trd.evaluate.accuracy import Accuracy
from nemo_trd.evaluate.in_run import evaluate
from nemo_trd.megatron.checkpoint import Checkpointer
from nemo_trd.megatron.learning_rate import rate_change
from nemo_trd.megatron.student import StepResult, Student
from nemo_trd.megatron.verification import verified_checkpoint
from nemo_trd.models.peft import begins_from_directory, check_base_of_beginning, weights_digest
from nemo_trd.models.write import save_adapter_directory, save_hf_directory
from nemo_trd.records.checkpoint_dir import TrainerState, read_samples_ahead
from nemo_trd.records.timers import Timers
from nemo_trd.records.trackers import Tracker, public_settings
from nemo_trd.records.under_way import UnderWay
from nemo_trd.run import agreement, outcome
from nemo_trd.run.inputs import Inputs, first_checkpoint_bytes
from nemo_trd.run.journal import Journal
from nemo_trd.run.open import open_teacher_and_generators
from nemo_trd.run.resume import (
    BASE,
    changes_since,
    check_base,
    check_prompts,
    model_identity,
    samples_hold,
)
from nemo_trd.run.run_lock import RunLock
from nemo_trd.run.sampling import Sampler
from nemo_trd.run.stored import StoredSampler
from nemo_trd.run.teacher_check import check_teacher_servers
from nemo_trd.verifiers.select import verifier

log = logging.getLogger(__name__)

SamplesAhead = Callable[[bool], Mapping[int, list[Refinement]]]


class Run:
    """One run of TRD: its inputs, models, generators and journal, and where it stands.

    Methods that all ranks must call together say so: "collective".
    """

    def __init__(
        self,
        config: Config,
        inputs: Inputs,
        stop: StopRequest,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        """Build everything, and go on from a checkpoint if there is one. Collective."""
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
        """Build all that a run holds; `notices` are logged when there is a log."""
        config, root = self.config, self.config.run_dir / "checkpoints"
        # Found again: another process may have held the directory until now.
        checkpoint, defects = verified_checkpoint(config.checkpoint, root)
        self.inputs = inputs = replace(inputs, checkpoint=checkpoint)
        self._stop = stop
        self._verify = verifier(config.data.verifier, config.sandbox)
        self._base = from_first_rank(lambda: _checked_base(config, checkpoint))
        self.student = Student(config)
        self.teacher, self._generators = open_teacher_and_generators(
            config, self.student, stop.signalled
        )
        self._under_way = UnderWay(
            root.parent / "under_way",
            dist.get_rank(),
            config.digest(),
            config.generation.max_staleness,
        )
        sampler = Sampler if config.generation.stored is None else StoredSampler
        self.sampler = sampler(
            config,
            self._generators.student,
            self._generators.teacher,
            inputs.student_tokenizer,
            inputs.teacher_tokenizer,
            self._under_way,
            self._generators.generated_scores,
            self._generators.turn,
        )
        needed = first_checkpoint_bytes(config, self.student.hf)
        self._checkpointer = Checkpointer(config.checkpoint, root, self.student, needed)
        self._state = TrainerState(
            step=0,
            weight_version=0,
            failed_steps=0,
            num_prompts=len(inputs.training_prompts),
            digest=config.digest(),
            model=model_identity(self.student.hf, config.student.adapter) | self._base,
            settings=public_settings(config),
            slurm_job=os.environ.get("SLURM_JOB_ID"),
        )
        self._saved_step: int | None = None
        self._evaluated_step: int | None = None  # by this process, with its settings
        self._last_line: str | None = None  # of the log, where the run ends as it was meant to
        self.samples_ahead: dict[int, list[Refinement]] = {}  # drawn before the run was cut off
        resumed = [] if inputs.checkpoint is None else self._resume(inputs.checkpoint)
        adapter = config.student.adapter
        begins_adapted = adapter is not None and begins_from_directory(adapter)
        if inputs.checkpoint is not None or self._generators.on_servers or begins_adapted:
            self.sync_weights()  # whatever a server has been given before
        self.timers = Timers()
        notices += [*defects, *self._checkpointer.begin(inputs.checkpoint)]
        notices += self._under_way.notices
        compared = self._generators.compared_rollouts
        self.journal = Journal(
            config, inputs, self.student, compared, self.timers, self.step, trackers
        )
        self.journal.announce(resumed, notices)

    def _resume(self, checkpoint: Path) -> list[str]:
        """Go on from a checkpoint. Returns lines about that for the log."""
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
        accepted = check_prompts(checkpoint, self.inputs.prompt_digests, self.config)
        self.samples_ahead = read_samples_ahead(checkpoint)
        redrawn = None
        if self.samples_ahead and (accepted or not samples_hold(changes)):
            steps = ", ".join(str(step + 1) for step in self.samples_ahead)
            redrawn = f"what was sampled for step {steps} before the change is sampled again"
            self.samples_ahead = {}
        return lines + [line for line in (rate, accepted, redrawn) if line]

    @property
    def step(self) -> int:
        """Steps done."""
        return self._state.step

    @property
    def weight_version(self) -> int:
        """Version of the student's weights: the step that made them, 0 at the beginning."""
        return self._state.weight_version

    def start(self) -> int | None:
        """Check the servers, and evaluate the student that the run begins with. Collective.

        Returns:
            An exit code when the run has been asked to stop meanwhile.

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
            self._check_servers()
            if self._evaluation_missing():
                self.evaluate()
            exit_code = self._stop.exit_code()
        if exit_code is not None:
            self._last_line = outcome.stopped_line(self.config, self.step)
        self.timers.take()
        return exit_code

    def _evaluation_missing(self) -> bool:
        """Whether the evaluation at the start, or after the step of the resumed run, is due."""
        if self.step == 0:
            return self.config.evaluation.at_start
        evaluated = self.journal.is_evaluated(self.step)
        return self._evaluation_due() and not evaluated

    def _evaluation_due(self) -> bool:
        interval = self.config.evaluation.interval
        return interval is not None and self.step % interval == 0

    def _check_servers(self) -> None:
        """Compare what the servers of student and teacher say with what they should serve."""
        generators, inputs = self._generators, self.inputs
        if generators.on_servers:
            agreement.check_student_servers(
                self.config,
                inputs.training_prompts[: generators.compared_rollouts],
                self.sampler.complete,
                self.student.token_nll,
                inputs.student_tokenizer,
            )
        if generators.teacher_servers is not None:
            check_teacher_servers(
                self.config,
                generators.teacher_servers,
                inputs.teacher_tokenizer,
                inputs.training_prompts[0].token_ids,
                self.student,
                self.teacher,
                self.step,
            )

    def within_support(self, refinements: Sequence[Refinement]) -> Sequence[Refinement]:
        """Reject rewrites too far from what the student would say. Collective."""
        largest_gap = self.config.refinement.max_student_nll_gap
        if largest_gap is None or all(r.rejection for r in refinements):
            return refinements
        return reject_outside_support(refinements, self.student.token_nll, largest_gap)

    def sync_weights(self) -> None:
        """Bring the generators the student's weights, and those of a teacher that follows it.

        Collective.
        """
        alone, student = self.config.served_adapter is not None, self.student
        version = self._state.weight_version
        weights = student.export_scaled_adapter() if alone else student.export_hf_weights()
        self._generators.load_student(weights, version)
        if student.average is not None and self.config.draws_rewrites:
            self._generators.load_teacher(student.export_teacher_weights(), version)

    def advance(self, result: StepResult | None, refinements: Sequence[Refinement]) -> None:
        """Count a step, with the same arguments on all ranks.

        Args:
            result: None where there was nothing to train on; the weights are then those before.
            refinements: the step's, for the message.

        Raises:
            RuntimeError: `train.max_failed_steps` in a row had nothing to train on.
        """
        state = self._state
        self._state = replace(
            state,
            step=state.step + 1,
            weight_version=state.step + 1 if result else state.weight_version,
            failed_steps=0 if result else state.failed_steps + 1,
        )
        if self._state.failed_steps >= self.config.train.max_failed_steps:
            counts = refinement_counts(refinements, ())
            reasons = {name: n for name, n in counts.items() if name.startswith("rejected_") and n}
            raise RuntimeError(
                f"{self._state.failed_steps} steps in a row (train.max_failed_steps) had nothing "
                f"to train on; in the last one: {reasons or counts}. Fix: look at "
                f"{self.config.run_dir / 'samples'}; raise generation.refinement.max_tokens or "
                "refinement.max_context_tokens, or set refinement.on_failure=rollout."
            )

    def finish_step(self, samples_ahead: SamplesAhead) -> int | None:
        """Evaluate and save as configured. Collective.

        Args:
            samples_ahead: tells the refinements by step that are drawn for steps to come; told
                that the run ends, with those that are under way.

        Returns:
            An exit code when the run is to stop now.
        """
        exit_code = self._stop.exit_code()  # who asks may not have the time for an evaluation
        if exit_code is None and self._evaluation_due():
            with self.timers("evaluation"):
                self.evaluate()
            exit_code = self._stop.exit_code()
        with self.timers("checkpoint"):
            self._checkpointer.poll()
            if exit_code is not None or self.step % self.config.checkpoint.save_interval == 0:
                self.save(samples_ahead(exit_code is not None))
        if exit_code is not None:
            self._checkpointer.wait()
            self._last_line = outcome.stopped_line(self.config, self.step)
        return exit_code

    def finish(self) -> None:
        """Save, evaluate, export and sum up. Collective."""
        self.save()
        self._checkpointer.wait()
        self._under_way.end()
        if self.config.evaluation.at_end and self._evaluated_step != self.step:
            self.evaluate()
        export = self.config.run_dir / "export"
        self._export(export)
        self.journal.summarize(self.step, export if self.config.checkpoint.export_hf else None)
        looked_at = outcome.where_to_look(self.config.run_dir, self.config.checkpoint.export_hf)
        self._last_line = f"finished after step {self.step}; {looked_at}"

    def _export(self, directory: Path) -> None:
        """Write what `checkpoint.export_hf` and `export_merged` ask for. Collective."""
        student, source = self.student, self.config.model.student.path
        if self.config.checkpoint.export_hf and student.adapter is None:
            save_hf_directory(student.export_hf_weights(), source, directory)
        elif self.config.checkpoint.export_hf:
            assert student.adapter is not None
            adapter, digest = student.export_adapter(), self._base[BASE]
            save_adapter_directory(adapter, student.hf, student.adapter, source, digest, directory)
        if self.config.checkpoint.export_merged:
            merged = directory.with_name(outcome.MERGED)
            save_hf_directory(student.export_hf_weights(), source, merged)

    def close(self, succeeded: bool) -> None:
        """End what the run has started and opened. Collective unless it has failed."""
        with ExitStack() as last_first:  # each is closed, whatever becomes of the others
            last_first.callback(self._lock.release)
            last_first.callback(self._generators.close)
            last_first.push(
                lambda error, *_: self.journal.close(
                    succeeded and error is None, self._last_line if error is None else None
                )
            )
            last_first.callback(self._checkpointer.close, succeeded)

    def save(self, samples_ahead: Mapping[int, list[Refinement]] | None = None) -> None:
        """Write a checkpoint with `samples_ahead`, unless there is one of this step. Collective."""
        if self._saved_step != self.step:
            from_first_rank(self._lock.check)
            self._checkpointer.save(self._state, samples_ahead, self.inputs.prompt_digests)
            self._saved_step = self.step

    def evaluate(self) -> Accuracy | None:
        """Let the student solve the validation problems, if any, and record it. Collective."""
        if not self.inputs.validation_prompts:
            return None
        accuracy = evaluate(
            self.sampler.complete,
            self.inputs.validation_prompts,
            self.config.evaluation,
            self.config.run.seed,
            self._verify,
            self.inputs.student_tokenizer,
            self.sampler.map_shares,
        )
        self.journal.record_evaluation(self.step, accuracy)
        self._evaluated_step = self.step
        return accuracy


def _checked_base(config: Config, checkpoint: Path | None) -> dict[str, str]:
    """What identifies the weights below an adapter; nothing without one. Reads all of them.

    Raises:
        ConfigError: the adapter that the run begins with, or goes on with, is one of others.
    """
    adapter, source = config.student.adapter, Path(config.model.student.path)
    if adapter is None:
        return {}
    digest = weights_digest(source, "model.student.path")
    if checkpoint is None:
        check_base_of_beginning(adapter, digest, str(source))
    else:
        check_base(checkpoint, digest)
    return {BASE: digest}
