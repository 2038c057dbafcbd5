"""The frozen teacher on servers only: it gives its most likely tokens, and nobody else holds it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from nemo_trd.data.types import Microbatch, TokenScores, Trajectory
from nemo_trd.distributed.exchange import fail_together, merge_shares, own_share
from nemo_trd.distributed.process import new_group
from nemo_trd.generation.api import Wanted
from nemo_trd.generation.vllm import VllmGenerator
from nemo_trd.loss.top_k import TopK
from nemo_trd.megatron.context_parallel import label_holders
from nemo_trd.megatron.schedule import is_last_stage
from nemo_trd.models.vocabulary import Vocabulary
from nemo_trd.run.generated_scores import GeneratedScores
from nemo_trd.run.turns import Turn


def wanted_scores(top_k: int, vocab_size: int, teacher: Vocabulary) -> Wanted:
    """What the loss needs of each label: `top_k` ids among the first `vocab_size`.

    Beside these a server may name some that only pad its output layer, or that only the teacher's
    tokenizer knows.
    """
    return Wanted(top_k, vocab_size, min(teacher.columns - vocab_size, 16 + top_k // 4))


class ServerTeacher:
    """Stands where `nemo_trd.megatron.teacher.Teacher` does. All methods are collective.

    The ranks that share a student's data parallel rank divide its trajectories among them, and
    exchange what the servers answer: k ids and log-probabilities for each label. What the servers
    computed while they wrote (`generated`) is not asked for again. They are asked within `turn`.
    """

    def __init__(
        self,
        scorer: VllmGenerator,
        wanted: Wanted,
        student_groups: ProcessGroupCollection,
        generated: GeneratedScores | None = None,
        turn: Turn = nullcontext,
    ) -> None:
        self._turn = turn
        self._scorer = scorer
        self._wanted = wanted
        self._generated = generated
        self._dp_rank = student_groups.dp.rank()
        self._cp = student_groups.cp
        self._computes_loss = is_last_stage(student_groups)
        # On the host: what is exchanged never needs a device.
        dp_ranks = merge_shares([self._dp_rank])
        self._first_ranks = [dp_ranks.index(d) for d in range(student_groups.dp.size())]
        for dp_rank in range(student_groups.dp.size()):
            ranks = [rank for rank, other in enumerate(dp_ranks) if other == dp_rank]
            group = new_group(ranks, backend="gloo")
            if dp_rank == self._dp_rank:
                self._group = group
        self._check()

    def _check(self) -> None:
        """Servers that do not give as many log-probabilities refuse before the first step."""
        sequences = [((0, 0), 1)] if dist.get_rank() == 0 else []
        with self._turn():
            fail_together(lambda: self._scorer.score(sequences, self._wanted, "check of scores"))

    def states(self, micro_batches: Sequence[Sequence[Microbatch]]) -> list[TopK | None]:
        """The teacher's top k at this rank's labels of each of its own micro-batches.

        They are where the student's loss is computed: on its last stage. Elsewhere: None.

        Raises:
            GenerationFailed: on all ranks.
        """
        own = micro_batches[self._dp_rank]
        trajectories = [t for micro_batch in own for t in micro_batch.trajectories]
        known = self._known(micro_batches)
        unknown = [position for position in range(len(trajectories)) if position not in known]
        share = [trajectories[position] for position in own_share(unknown, self._group)]
        with self._turn() if any(merge_shares([bool(unknown)])) else nullcontext():
            answers = merge_shares(fail_together(lambda: self._ask(share)), self._group)
        known |= dict(zip(unknown, answers, strict=True))
        if not self._computes_loss:
            return [None] * len(own)
        states: list[TopK | None] = []
        remaining = iter(known[position] for position in range(len(trajectories)))
        for micro_batch in own:
            joined = self._join([next(remaining) for _ in micro_batch.trajectories])
            holders, _ = label_holders([micro_batch.student], self._cp.size())
            states.append(joined[holders == self._cp.rank()])
        return states

    def _known(self, micro_batches: Sequence[Sequence[Microbatch]]) -> dict[int, TokenScores]:
        """Scores that came with the rewrites, by position of this rank's trajectories."""
        if self._generated is None:
            return {}
        taken = self._generated.send(micro_batches, self._first_ranks)
        return dict(merge_shares(list(taken.items()), self._group))

    def _ask(self, trajectories: Sequence[Trajectory]) -> list[TokenScores]:
        sequences = [(t.teacher_context + t.labels, len(t.teacher_context)) for t in trajectories]
        return self._scorer.score(sequences, self._wanted, "scores")

    def _join(self, scores: Sequence[TokenScores]) -> TopK:
        """The states of one micro-batch, in the order of its labels; no rows for a filler."""
        ids = torch.empty(0, self._wanted.top_k, dtype=torch.long)
        log_probs, labels = torch.empty(0, self._wanted.top_k), torch.empty(0)
        return TopK(
            torch.cat([ids, *(torch.from_numpy(s.top_ids) for s in scores)]),
            torch.cat([log_probs, *(torch.from_numpy(s.top_logprobs) for s in scores)]),
            torch.cat([labels, *(torch.from_numpy(s.label_logprobs) for s in scores)]),
        )
