"""The frozen teacher on servers only: it gives its most likely tokens, and nobody else holds it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from nemo_trd.config.schema import Config
from nemo_trd.data.types import Microbatch, TokenIds, TokenScores, Trajectory
from nemo_trd.distributed.exchange import fail_together, merge_shares, own_share
from nemo_trd.generation.api import Wanted
from nemo_trd.generation.vllm import VllmGenerator
from nemo_trd.loss.top_k import TopK
from nemo_trd.megatron.context_parallel import label_holders
from nemo_trd.megatron.schedule import is_last_stage


class ServerTeacher:
    """Stands where `nemo_trd.megatron.teacher.Teacher` does. All methods are collective.

    The ranks that share a student's data parallel rank divide its trajectories among them, and
    exchange what the servers answer: k ids and log-probabilities for each label.
    """

    def __init__(
        self,
        config: Config,
        scorer: VllmGenerator,
        student_groups: ProcessGroupCollection,
        vocab_size: int,
    ) -> None:
        assert config.loss.top_k is not None
        self._scorer = scorer
        self._top_k = config.loss.top_k
        # Beside the ids that the loss is about, a server may name some that only pad its output
        # layer, or that only the teacher's tokenizer knows.
        spare = min(scorer.vocabulary.columns - vocab_size, 16 + self._top_k // 4)
        self._wanted = Wanted(self._top_k, vocab_size, spare)
        self._dp_rank = student_groups.dp.rank()
        self._cp = student_groups.cp
        self._computes_loss = is_last_stage(student_groups)
        # On the host: what is exchanged never needs a device.
        dp_ranks = merge_shares([self._dp_rank])
        for dp_rank in range(student_groups.dp.size()):
            ranks = [rank for rank, other in enumerate(dp_ranks) if other == dp_rank]
            group = dist.new_group(ranks, backend="gloo")
            if dp_rank == self._dp_rank:
                self._group = group
        self._check()

    def _check(self) -> None:
        """Servers that do not give as many log-probabilities refuse before the first step."""
        sequences = [((0, 0), 1)] if dist.get_rank() == 0 else []
        fail_together(lambda: self._score(sequences, "check of scores"))

    def states(self, micro_batches: Sequence[Sequence[Microbatch]]) -> list[TopK | None]:
        """The teacher's top k at this rank's labels of each of its own micro-batches.

        They are where the student's loss is computed: on its last stage. Elsewhere: None.

        Raises:
            GenerationFailed: on all ranks.
        """
        own = micro_batches[self._dp_rank]
        trajectories = [t for micro_batch in own for t in micro_batch.trajectories]
        share = own_share(trajectories, self._group)
        scores = merge_shares(fail_together(lambda: self._ask(share)), self._group)
        if not self._computes_loss:
            return [None] * len(own)
        states: list[TopK | None] = []
        remaining = iter(scores)
        for micro_batch in own:
            known = self._join([next(remaining) for _ in micro_batch.trajectories])
            holders, _ = label_holders([micro_batch.student], self._cp.size())
            states.append(known[holders == self._cp.rank()])
        return states

    def _ask(self, trajectories: Sequence[Trajectory]) -> list[TokenScores]:
        sequences = [(t.teacher_context + t.labels, len(t.teacher_context)) for t in trajectories]
        return self._score(sequences, "scores")

    def _score(
        self, sequences: Sequence[tuple[TokenIds, int]], description: str
    ) -> list[TokenScores]:
        return self._scorer.score(sequences, self._wanted, description)

    def _join(self, scores: Sequence[TokenScores]) -> TopK:
        """The states of one micro-batch, in the order of its labels; no rows for a filler."""
        ids = torch.empty(0, self._top_k, dtype=torch.long)
        log_probs, labels = torch.empty(0, self._top_k), torch.empty(0)
        return TopK(
            torch.cat([ids, *(torch.from_numpy(s.top_ids) for s in scores)]),
            torch.cat([log_probs, *(torch.from_numpy(s.top_logprobs) for s in scores)]),
            torch.cat([labels, *(torch.from_numpy(s.label_logprobs) for s in scores)]),
        )
