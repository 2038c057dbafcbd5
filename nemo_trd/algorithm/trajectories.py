"""Trajectories: the two contexts of every sequence that is trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from nemo_trd.config.schema import Config
from nemo_trd.data.types import FittedContext, Prompt, Refinement, Rollout, TokenIds, Trajectory


class RefinementError(RuntimeError):
    """A rewrite cannot be trained on and `refinement.on_failure` is `error`."""


def pair(
    refinements: Sequence[Refinement],
    config: Config,
    teacher_prompt: Callable[[Prompt], FittedContext],
) -> list[Trajectory]:
    """Give every trained sequence its two contexts: x for the student, c_T for the teacher.

    An accepted rewrite becomes y. Where there is none, y is the rollout or nothing, as
    `refinement.others` (not in the subset to refine) and `refinement.on_failure` say; the
    teacher then sees `teacher_prompt`: asked to rewrite y_o, it would only be judged on
    copying it. Vanilla distillation is the case in which no rollout is in the subset.

    Args:
        teacher_prompt: x, in OPSD with y*, as the teacher sees it: `teacher_context=prompt`.

    Raises:
        RefinementError: naming the sample and the reason.
    """
    trajectories = []
    for refinement in refinements:
        request, prompt = refinement.request, refinement.request.rollout.prompt
        if refinement.rejection is None:
            assert request.scoring_context is not None
            uses_prompt = config.algorithm.teacher_context == "prompt"
            own = FittedContext(request.scoring_context, request.shortened)
            context = teacher_prompt(prompt) if uses_prompt else own
            trajectory = refinement_trajectory(refinement, context.token_ids)
        elif _falls_back_to_rollout(refinement, config):
            context = teacher_prompt(prompt)
            trajectory = rollout_trajectory(request.rollout, context.token_ids)
        else:
            continue
        trajectories.append(replace(trajectory, shortened=context.shortened))
    return trajectories


def _falls_back_to_rollout(refinement: Refinement, config: Config) -> bool:
    rollout = refinement.request.rollout
    if refinement.rejection != "subset" and config.refinement.on_failure == "error":
        raise RefinementError(
            f"prompt {rollout.prompt.index} sample {rollout.sample_index}: the rewrite is not "
            f"usable ({refinement.rejection}) and refinement.on_failure = 'error'. Fix: raise "
            "the limit that it met, or set refinement.on_failure=drop or rollout."
        )
    if rollout.completion.finish_reason == "abort" or not rollout.completion.token_ids:
        return False  # nothing to train on
    if config.algorithm.trajectory == "rollout":
        return True
    if refinement.rejection == "subset":
        return config.refinement.others == "rollout"
    return config.refinement.on_failure == "rollout"


def refinement_trajectory(refinement: Refinement, teacher_context: TokenIds) -> Trajectory:
    """Train on y_r."""
    assert refinement.completion is not None
    return Trajectory(
        prompt_index=refinement.request.rollout.prompt.index,
        sample_index=refinement.request.rollout.sample_index,
        source="refinement",
        student_context=refinement.request.rollout.prompt.token_ids,
        teacher_context=teacher_context,
        labels=refinement.completion.token_ids,
        weight_version=refinement.request.rollout.completion.weight_version,
    )


def rollout_trajectory(rollout: Rollout, teacher_context: TokenIds) -> Trajectory:
    """Train on y_o itself."""
    return Trajectory(
        prompt_index=rollout.prompt.index,
        sample_index=rollout.sample_index,
        source="rollout",
        student_context=rollout.prompt.token_ids,
        teacher_context=teacher_context,
        labels=rollout.completion.token_ids,
        weight_version=rollout.completion.weight_version,
    )


def sequence_lengths(trajectory: Trajectory) -> tuple[int, int]:
    """Tokens that student and teacher compute of a trajectory.

    The last label is predicted, never read: its own position would be computed for nothing.
    """
    predicting = len(trajectory.labels) - 1
    contexts = trajectory.student_context, trajectory.teacher_context
    return len(contexts[0]) + predicting, len(contexts[1]) + predicting
