"""The frozen teacher on Megatron: it only ever gives its final hidden states.

The student's last stage turns them into teacher logits chunk by chunk, with a copy of the
teacher's output weight in the student's vocabulary sharding. So the two models may be split in
different ways, and no teacher logits travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from nemo_trd.config.schema import Config
from nemo_trd.data.types import ContextBatch, Microbatch
from nemo_trd.distributed.process import device, to_device, to_host
from nemo_trd.megatron.context_parallel import label_holders, own_context
from nemo_trd.megatron.hf_weights import load_hf_weights
from nemo_trd.megatron.model import HiddenStatesModel, build_model, load_hf_config
from nemo_trd.megatron.process_groups import process_groups
from nemo_trd.megatron.schedule import is_last_stage, label_rows, run_model, run_schedule

RanksOfParts = list[list[int]]  # for each context parallel rank: ranks that hold its part


class Teacher:
    """Holds this rank's share of the teacher, without gradients or optimizer.

    `micro_batches[d]` below are those of the student's data parallel rank d; every rank has
    the whole plan. All methods are collective.
    """

    def __init__(self, config: Config, student_groups: ProcessGroupCollection) -> None:
        source = config.teacher_source
        self._layout = config.parallel.teacher
        self._offload_weights = config.teacher.offload_weights
        self._offload_states = config.teacher.offload_states
        self._groups = process_groups(self._layout)
        hf = load_hf_config(source.path, source.trust_remote_code)
        self._hidden_size = hf.hidden_size
        self._model: HiddenStatesModel
        (self._model,) = models = build_model(
            hf, self._layout, self._groups, config.precision, fp8=config.precision.teacher_fp8
        )
        load_hf_weights(models, hf, source.path, self._groups)
        self._model.requires_grad_(False).eval()
        self._sources = last_stage_ranks(self._groups)
        self._destinations = last_stage_ranks(student_groups)
        if self._offload_weights:
            self._model.to("cpu")
        # `_hand_over` sends between some ranks of the world's group. NCCL makes a group's
        # communicator at its first use, with all ranks of it: were that a batch of sends in which
        # only some take part, these would wait for the others for ever.
        dist.all_reduce(torch.zeros(1, device=device()))

    @torch.no_grad()
    def states(self, micro_batches: Sequence[Sequence[Microbatch]]) -> list[Tensor | None]:
        """Final hidden states [n, h] at this rank's labels of each of its own micro-batches.

        They are where the student's loss is computed: on its last stage, on the context parallel
        rank that predicts the label. Elsewhere: None.
        """
        teachers = self._groups.dp.size()
        students = len(micro_batches)
        flat = [
            (student, position)
            for position in range(len(micro_batches[0]))
            for student in range(students)
        ]
        own = [micro_batches[s][p] for s, p in flat[self._groups.dp.rank() :: teachers]]
        # A pipeline runs in lock-step with itself only: data parallel teachers may differ by one.
        if self._offload_weights:
            self._model.to(device())
        states = self._forward(own) if own else []
        if self._offload_weights:
            self._model.to("cpu")
        received: dict[int, Tensor] = {}
        for index, (student, position) in enumerate(flat):
            state = self._hand_over(
                states[index // teachers] if states and self._owns(index) else None,
                micro_batches[student][position],
                sources=self._sources[index % teachers],
                destinations=self._destinations[student],
            )
            if state is not None:
                received[position] = to_host(state) if self._offload_states else state
        return [received.get(position) for position in range(len(micro_batches[0]))]

    def _owns(self, index: int) -> bool:
        return index % self._groups.dp.size() == self._groups.dp.rank()

    def _forward(self, micro_batches: Sequence[Microbatch]) -> list[Tensor]:
        cp = self._groups.cp
        packs = [own_context(batch.teacher, cp.size(), cp.rank()) for batch in micro_batches]

        def rows(pack: ContextBatch, hidden: Tensor, non_loss_data: bool) -> Tensor:
            return label_rows(hidden, pack, self._groups, self._layout.sequence_parallel)

        def forward_step(iterator, model):  # noqa: ANN001, ANN202  (megatron's signature)
            pack = next(iterator)
            return run_model(model, pack), partial(rows, pack)

        return run_schedule(
            [self._model],
            forward_step,
            packs,
            packs,
            self._groups,
            forward_only=True,
            collect=True,
        )

    def _hand_over(
        self,
        state: Tensor | None,
        micro_batch: Microbatch,
        sources: RanksOfParts,
        destinations: RanksOfParts,
    ) -> Tensor | None:
        """Bring one micro-batch's states to the ranks that compute the loss at their labels."""
        me = dist.get_rank()
        theirs, rows = label_holders([micro_batch.teacher], len(sources))
        ours, places = label_holders([micro_batch.student], len(destinations))
        operations, pieces = [], []
        for (part, source), (wanted, destination) in routes(sources, destinations):
            labels = ((theirs == part) & (ours == wanted)).nonzero()[:, 0]
            if me not in (source, destination) or not len(labels):
                continue
            piece = self._empty(len(labels)) if me != source else _rows(state, rows[labels])
            if source != destination:
                send = dist.isend if me == source else dist.irecv
                operations.append(dist.P2POp(send, piece, destination if me == source else source))
            if me == destination:
                pieces.append((places[labels], piece))
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        if not any(me in ranks for ranks in destinations):
            return None
        return self._joined(pieces)

    def _joined(self, pieces: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """States of this rank's labels from what it has of each source: (their places, states)."""
        if len(pieces) == 1:
            return pieces[0][1]
        joined = self._empty(sum(len(piece) for _, piece in pieces))
        for places, piece in pieces:
            joined[to_device(places)] = piece
        return joined

    def _empty(self, count: int) -> Tensor:
        dtype = self._model.config.params_dtype
        return torch.empty(count, self._hidden_size, dtype=dtype, device=device())


def _rows(state: Tensor | None, rows: Tensor) -> Tensor:
    """Some rows of the states, in order; all of them are not copied."""
    assert state is not None
    return state.contiguous() if len(rows) == len(state) else state[to_device(rows)]


def routes(
    sources: RanksOfParts, destinations: RanksOfParts
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Who gives states of one micro-batch to whom: pairs of (context parallel rank, rank).

    Every tensor parallel rank of the teacher's last stage has those of its part whole; each serves
    some of the destinations. A rank that is both takes its own.
    """
    wanted = [(part, rank) for part, ranks in enumerate(destinations) for rank in ranks]
    return [
        ((part, rank if rank in ranks else ranks[number % len(ranks)]), (own_part, rank))
        for number, (own_part, rank) in enumerate(wanted)
        for part, ranks in enumerate(sources)
    ]


def last_stage_ranks(groups: ProcessGroupCollection) -> list[RanksOfParts]:
    """For each data parallel rank of a model: the ranks of its last stage. Collective."""
    mine = (groups.dp.rank(), groups.cp.rank(), is_last_stage(groups))
    everyone: list[tuple[int, int, bool]] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return [
        [
            [rank for rank, holds in enumerate(everyone) if holds == (replica, part, True)]
            for part in range(groups.cp.size())
        ]
        for replica in range(groups.dp.size())
    ]
