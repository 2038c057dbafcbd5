"""Records of a run: figures of its steps, samples, evaluations and the summary."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nemo_trd.algorithm.acceptance import refinement_counts
from nemo_trd.algorithm.change import (
    change,
    draft_metrics,
    mean_change,
    rewritten,
    rollout_nll,
)
from nemo_trd.config.schema import Config
from nemo_trd.data.types import Refinement, Rollout, Trajectory
from nemo_trd.distributed.exchange import from_first_rank, merge_shares, own_share
from nemo_trd.evaluate.accuracy import Accuracy
from nemo_trd.loss.divergences import DIVERGENCES
from nemo_trd.megatron.student import StepResult, Student
from nemo_trd.records import latest
from nemo_trd.records.run_logger import RunLogger
from nemo_trd.records.samples import Sample
from nemo_trd.records.timers import Timers
from nemo_trd.records.trackers import Tracker
from nemo_trd.run import agreement
from nemo_trd.run.inputs import Inputs

log = logging.getLogger(__name__)

CHANGES = ("wrong_to_right", "wrong_to_wrong", "right_to_right", "right_to_wrong")


class Journal:
    """Measures the steps of a run and writes its records, on the first rank.

    `measure` and `is_evaluated` are collective, the other methods are not.
    """

    def __init__(
        self,
        config: Config,
        inputs: Inputs,
        student: Student,
        compared_rollouts: int,
        timers: Timers,
        step: int,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        """Open the records; those of steps after `step` are dropped.

        Args:
            compared_rollouts: number of rollouts of a step whose log-probabilities are compared
                with the servers'.
        """
        self._config = config
        self._inputs = inputs
        self._student = student
        self._compared_rollouts = compared_rollouts
        self._timers = timers
        self._logger = RunLogger(config, dist.get_rank() == 0, step, trackers)

    def announce(self, resumed: Sequence[str], notices: Sequence[str]) -> None:
        """Log where the run starts from, its size, and `notices`."""
        config, layout, inputs = self._config, self._student.layout, self._inputs
        for line in resumed:
            log.info("%s", line)
        prompts, per_step = len(inputs.training_prompts), config.train.prompts_per_step
        log.info(
            "%s run in %s: %d prompts (left out: %s), %d ranks, student tp %d pp %d dp %d",
            config.algorithm.mode.upper(),
            config.run_dir,
            prompts,
            inputs.left_out or "none",
            dist.get_world_size(),
            layout.tensor_model_parallel_size,
            layout.pipeline_model_parallel_size,
            self._student.groups.dp.size(),
        )
        if dist.get_rank() != 0:
            return
        if prompts < per_step:
            log.warning(
                "data.train has %d usable prompts, and train.prompts_per_step = %d: a step holds "
                "each of them %.3g times on average, each time with samples of its own",
                prompts,
                per_step,
                per_step / prompts,
            )
        estimated = DIVERGENCES[config.loss.divergence].estimates
        if estimated is not None and not config.generation.rollout.draws_from(
            config.loss.temperature
        ):
            log.warning(
                "loss.divergence=%s is a biased estimate of %s: generation.rollout does not sample "
                "from the student's whole distribution at loss.temperature = %g",
                config.loss.divergence,
                estimated,
                config.loss.temperature,
            )
        for notice in notices:
            log.warning("%s", notice)

    def measure(self, refinements: Sequence[Refinement], weight_version: int) -> dict[str, float]:
        """Measure a step's samples before the student moves: age, rewriting, servers. Collective.

        Args:
            weight_version: of the student as it is now.
        """
        rollouts = [refinement.request.rollout for refinement in refinements]
        versions = [rollout.completion.weight_version for rollout in rollouts]
        rewrites = [refinement.completion for refinement in refinements if refinement.completion]
        drawn = [*(rollout.completion for rollout in rollouts), *rewrites]
        if self._config.generation.stored is not None:
            drawn = []
        redrawn = sum(rollout.completion.redrawn for rollout in rollouts)
        return {
            **({"redrawn": redrawn} if self._config.generation.max_staleness > 1 else {}),
            "staleness": weight_version - sum(versions) / len(versions),
            "generated_tokens": sum(len(completion.token_ids) for completion in drawn),
            **mean_change(merge_shares([change(*p) for p in own_share(rewritten(refinements))])),
            **rollout_nll(rollouts),
            **draft_metrics(rewrites),
            **agreement.metrics(self._differences(rollouts)),
        }

    def _differences(self, rollouts: Sequence[Rollout]) -> list[agreement.Difference]:
        compared = rollouts[: self._compared_rollouts]
        return agreement.differences(compared, self._student.token_nll)

    def watched(self, step: int, trajectories: Sequence[Trajectory]) -> list[str]:
        """Names of the trajectories that the samples of `step`, counted from 1, show."""
        if not self._logger.wants_samples(step):
            return []
        return [t.name for t in trajectories[: self._config.logging.samples_count]]

    def record(
        self,
        step: int,
        refinements: Sequence[Refinement],
        trajectories: Sequence[Trajectory],
        result: StepResult | None,
        measured: Mapping[str, float],
    ) -> None:
        """Write the line, metrics and samples of a step.

        Args:
            step: counted from 1.
            result: None where there was nothing to train on.
            measured: the result of `measure`.
        """
        counts = refinement_counts(refinements, trajectories)
        metrics = {**counts, **measured, **(result.metrics if result else {})}
        self._logger.step(step, metrics, self._timers.take())
        if self._logger.wants_samples(step):
            samples = _samples(refinements, trajectories, result)
            self._logger.samples(step, samples, self._inputs.student_tokenizer.decode)

    def record_evaluation(self, step: int, accuracy: Accuracy) -> None:
        """Write the accuracy of the student after `step` steps."""
        self._logger.evaluation(step, accuracy.summary(), str(accuracy))

    def is_evaluated(self, step: int) -> bool:
        """Whether there is an evaluation after `step` steps. Collective."""
        return from_first_rank(lambda: step in self._logger.evaluations())

    def summarize(self, step: int, export: Path | None) -> None:
        """Write the figures of the whole run.

        Args:
            step: steps done.
            export: directory of the exported student, if there is one.
        """
        if dist.get_rank() == 0:
            self._logger.summary(self._summary(step, export))

    def _summary(self, step: int, export: Path | None) -> dict[str, Any]:
        evaluations, run_dir = self._logger.evaluations(), self._config.run_dir
        return {
            "steps": step,
            "prompts": len(self._inputs.training_prompts),
            "prompts_left_out": self._inputs.left_out,
            "before": evaluations.get(0),
            "after": evaluations.get(step),
            "refinement": {name: int(count) for name, count in self._logger.total(CHANGES).items()},
            "paths": {
                "checkpoint": latest.read((run_dir / "checkpoints").resolve()),
                "export": export,
                "metrics": run_dir / "metrics.jsonl",
                "samples": run_dir / "samples",
                "tensorboard": run_dir / "tensorboard",
            },
        }

    def close(self, succeeded: bool, last_line: str | None) -> None:
        """End the records, with `last_line` in the log."""
        self._logger.close(succeeded, last_line)


def _samples(
    refinements: Sequence[Refinement],
    trajectories: Sequence[Trajectory],
    result: StepResult | None,
) -> list[Sample]:
    """Join each rollout with its refinement, its trajectory, and the values at its labels."""
    trained = {(t.prompt_index, t.sample_index): t for t in trajectories}
    samples = []
    for refinement in refinements:
        rollout = refinement.request.rollout
        trajectory = trained.get((rollout.prompt.index, rollout.sample_index))
        values = None
        if trajectory is not None and result is not None:
            values = result.watched.get(trajectory.name)
        shown = None if refinement.rejection == "subset" else refinement
        samples.append(Sample(rollout, shown, trajectory, values))
    return samples
