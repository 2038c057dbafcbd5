"""Scores that the teacher's servers computed while they wrote, until they are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch.distributed as dist

from nemo_trd.data.types import Completion, Microbatch, TokenIds, TokenScores, Trajectory
from nemo_trd.distributed.process import new_group

Scored = tuple[TokenIds, TokenIds]  # the teacher's context, and the labels after it


class GeneratedScores:
    """The scores of this rank's rewrites. They stay here: only where they are used they are sent.

    They are found by what they are of. A trajectory with another context than the one in which the
    teacher wrote, or with other labels than it wrote, has none.
    """

    def __init__(self, steps_ahead: int) -> None:
        """Args: steps_ahead: how far sampling runs ahead of training, at most."""
        self._steps_ahead = steps_ahead
        self._by_step: dict[int, dict[Scored, TokenScores]] = {}
        self._group = new_group(backend="gloo")

    def begin(self, step: int) -> None:
        """Begin to sample a step. Scores of those that have yet to train stay."""
        first = step - max(1, self._steps_ahead)
        kept = {s: scores for s, scores in self._by_step.items() if first <= s < step}
        self._by_step = {**kept, step: {}}  # at one go: another thread may look for scores

    def keep(self, step: int, context: TokenIds, completion: Completion) -> Completion:
        """Keep the scores of what was written after `context`. Returns it without them."""
        if completion.scores is not None:
            self._by_step[step][context, completion.token_ids] = completion.scores
        return replace(completion, scores=None)

    def send(
        self, micro_batches: Sequence[Sequence[Microbatch]], receivers: Sequence[int]
    ) -> dict[int, TokenScores]:
        """Send each data parallel rank the scores of its trajectories. Collective.

        Args:
            micro_batches: of every data parallel rank.
            receivers: the rank that takes those of each of them.

        Returns:
            What this rank takes: scores by position of the trajectory in its micro-batches.
        """
        taken: dict[int, TokenScores] = {}
        for own, receiver in zip(micro_batches, receivers, strict=True):
            trajectories = [t for micro_batch in own for t in micro_batch.trajectories]
            held = {
                position: scores
                for position, trajectory in enumerate(trajectories)
                if (scores := self._find(trajectory)) is not None
            }
            parts: list[dict[int, TokenScores]] = []
            if dist.get_rank() == receiver:
                parts = [{} for _ in range(dist.get_world_size())]
            dist.gather_object(held, parts or None, receiver, self._group)
            for part in parts:
                taken |= part
        return taken

    def _find(self, trajectory: Trajectory) -> TokenScores | None:
        scored = trajectory.teacher_context, trajectory.labels
        return next((s[scored] for s in self._by_step.values() if scored in s), None)
