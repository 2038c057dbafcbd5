"""From refinements to micro-batches: pair the contexts, fill batches, balance them over ranks.

Pure: every rank calls these with the same trajectories and gets the same plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from nemo_trd.config import Config, Train
from nemo_trd.types import (
    ContextBatch,
    FittedContext,
    Microbatch,
    Prompt,
    Refinement,
    Rollout,
    TokenIds,
    Trajectory,
)

PAD_TOKEN = 0  # never attended to by a label position, never a label: any valid id will do


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


def trajectory_length(trajectory: Trajectory) -> int:
    """Tokens of the longer of the two sequences (student's, teacher's) of a trajectory."""
    contexts = len(trajectory.student_context), len(trajectory.teacher_context)
    return max(contexts) + len(trajectory.labels)


def plan_micro_batches(
    trajectories: Sequence[Trajectory],
    train: Train,
    *,
    data_parallel_size: int,
    multiple: int = 1,
    packed: bool = False,
) -> list[list[list[Trajectory]]]:
    """Divide the trajectories of one step: `plan[data parallel rank][micro-batch]`.

    Sorted by length, so that little is padded; filled to `train.micro_batch_size` sequences or
    `train.max_tokens_per_micro_batch` tokens; every rank gets equally many micro-batches, a
    multiple of `multiple`, of about equal cost. Where there are too few trajectories for that,
    some micro-batches are empty. The loss does not depend on the division.
    """
    longest_first = sorted(
        trajectories, key=lambda t: (-trajectory_length(t), t.prompt_index, t.sample_index)
    )
    batches: list[list[Trajectory]] = []
    for trajectory in longest_first:
        if batches and _has_room(batches[-1], trajectory, train, packed):
            batches[-1].append(trajectory)
        else:
            batches.append([trajectory])
    unit = data_parallel_size * multiple
    wanted = max(1, -(-len(batches) // unit)) * unit
    while len(batches) < wanted:
        biggest = max(batches, key=lambda b: (len(b) > 1, _cost(b, packed)), default=[])
        if len(biggest) < 2:
            batches.append([])
        else:
            batches.remove(biggest)
            batches += [biggest[: len(biggest) // 2], biggest[len(biggest) // 2 :]]
    return _balance(batches, data_parallel_size, packed)


def _has_room(batch: list[Trajectory], extra: Trajectory, train: Train, packed: bool) -> bool:
    if train.micro_batch_size is not None:
        return len(batch) < train.micro_batch_size
    assert train.max_tokens_per_micro_batch is not None
    return _cost([*batch, extra], packed) <= train.max_tokens_per_micro_batch


def _cost(batch: Sequence[Trajectory], packed: bool) -> int:
    """Tokens that a micro-batch makes the models compute, padding included."""
    lengths = [trajectory_length(t) for t in batch]
    return sum(lengths) if packed else max(lengths, default=0) * len(lengths)


def _balance(
    batches: list[list[Trajectory]], ranks: int, packed: bool
) -> list[list[list[Trajectory]]]:
    """Longest processing time first, with the same number of micro-batches for every rank."""
    per_rank = len(batches) // ranks
    plan: list[list[list[Trajectory]]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for batch in sorted(batches, key=lambda b: -_cost(b, packed)):
        rank = min((r for r in range(ranks) if len(plan[r]) < per_rank), key=lambda r: load[r])
        plan[rank].append(batch)
        load[rank] += _cost(batch, packed)
    return plan


def make_micro_batch(
    trajectories: Sequence[Trajectory],
    *,
    student_alignment: int = 1,
    teacher_alignment: int = 1,
    packed: bool = False,
    student_shape: tuple[int, int] | None = None,
) -> Microbatch:
    """Build the tensors of one micro-batch; without trajectories a filler without labels.

    `student_shape`, (rows, length), pads the student's side to a shape that is given.
    They stay on the host: every rank holds the plan of all ranks, and runs a part of it.
    """
    labels = [token for t in trajectories for token in t.labels]
    owners = [i for i, t in enumerate(trajectories) for _ in t.labels]
    students = [(t.student_context, t.labels) for t in trajectories]
    teachers = [(t.teacher_context, t.labels) for t in trajectories]
    return Microbatch(
        student=_context_batch(students, student_alignment, packed, student_shape),
        teacher=_context_batch(teachers, teacher_alignment, packed),
        labels=torch.tensor(labels, dtype=torch.long),
        trajectory_index=torch.tensor(owners, dtype=torch.long),
        trajectories=tuple(trajectories),
    )


def _context_batch(
    sequences: Sequence[tuple[TokenIds, TokenIds]],
    alignment: int,
    packed: bool,
    shape: tuple[int, int] | None = None,
) -> ContextBatch:
    """Lay out (context, labels) pairs; label i is predicted at the position before it."""
    # The last label is predicted, never read: its own position would be computed for nothing.
    inputs = [(*context, *labels[:-1]) for context, labels in sequences] or [(PAD_TOKEN,)]
    lengths = [-(-len(ids) // alignment) * alignment for ids in inputs]
    rows, length = shape or (len(inputs), 0)
    if packed and sum(lengths) < length:
        inputs, lengths = [*inputs, (PAD_TOKEN,)], [*lengths, length - sum(lengths)]
    elif not packed:
        inputs = [*inputs, *[(PAD_TOKEN,)] * (rows - len(inputs))]
        lengths = [max(*lengths, length)] * len(inputs)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    padded = [[*ids, *[PAD_TOKEN] * (n - len(ids))] for ids, n in zip(inputs, lengths, strict=True)]
    positions = [
        start + len(context) - 1 + i
        for start, (context, labels) in zip(starts, sequences, strict=False)
        for i in range(len(labels))
    ]
    tokens = torch.tensor([token for row in padded for token in row], dtype=torch.long)
    position_ids = torch.cat([torch.arange(n) for n in lengths])
    view = (1, -1) if packed else (len(inputs), -1)
    borders = torch.tensor([*starts, sum(lengths)], dtype=torch.int32)
    return ContextBatch(
        tokens=tokens.view(view),
        position_ids=position_ids.view(view),
        label_positions=torch.tensor(positions, dtype=torch.long),
        cu_seqlens=borders if packed else None,
    )
