"""The frozen teacher on Megatron: it only ever gives its final hidden states.

The student's last stage turns them into teacher logits chunk by chunk, with a copy of the
teacher's output weight in the student's vocabulary sharding. So the two models may be split in
different ways, and no teacher logits travel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from nemo_trd.config.schema import Config
from nemo_trd.data.types import ContextBatch, Microbatch
from nemo_trd.distributed.process import device, to_host
from nemo_trd.megatron.hf_weights import load_hf_weights
from nemo_trd.megatron.model import HiddenStatesModel, build_model, load_hf_config
from nemo_trd.megatron.process_groups import process_groups
from nemo_trd.megatron.schedule import is_last_stage, label_rows, run_model, run_schedule


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
        """Final hidden states [n, h] at the labels of each of this rank's own micro-batches.

        They are where the student's loss is computed: on its last stage. Elsewhere: None.
        """
        teachers = self._groups.dp.size()
        students = len(micro_batches)
        flat = [
            (student, position)
            for position in range(len(micro_batches[0]))
            for student in range(students)
        ]
        own = flat[self._groups.dp.rank() :: teachers]
        packs = [pack for s, p in own for pack in micro_batches[s][p].teacher]
        # A pipeline runs in lock-step with itself only: replicas may have different numbers.
        if self._offload_weights:
            self._model.to(device())
        states = deque(self._forward(packs) if packs else [])
        if self._offload_weights:
            self._model.to("cpu")
        received: dict[int, Tensor] = {}
        for index, (student, position) in enumerate(flat):
            batch, own_state = micro_batches[student][position], None
            if states and index % teachers == self._groups.dp.rank():
                own_state = torch.cat([states.popleft() for _ in batch.teacher])
            state = self._hand_over(
                own_state,
                len(batch.labels),
                sources=self._sources[index % teachers],
                destinations=self._destinations[student],
            )
            if state is not None:
                received[position] = to_host(state) if self._offload_states else state
        return [received.get(position) for position in range(len(micro_batches[0]))]

    def _forward(self, packs: Sequence[ContextBatch]) -> list[Tensor]:
        """Final hidden states at the labels of each pack, on the last stage; elsewhere nothing."""

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
        self, state: Tensor | None, count: int, sources: list[int], destinations: list[int]
    ) -> Tensor | None:
        """Bring one micro-batch's states to every rank that computes a part of its loss."""
        me = dist.get_rank()
        operations = []
        result = state if me in destinations else None
        for source, destination in routes(sources, destinations):
            if me == source:
                assert state is not None
                operations.append(dist.P2POp(dist.isend, state.contiguous(), destination))
            elif me == destination:
                result = torch.empty(
                    count, self._hidden_size, dtype=self._model.config.params_dtype, device=device()
                )
                operations.append(dist.P2POp(dist.irecv, result, source))
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        return result


def routes(sources: Sequence[int], destinations: Sequence[int]) -> list[tuple[int, int]]:
    """Who sends the states of one micro-batch to whom: (source, destination).

    Every tensor parallel rank of the teacher's last stage has them whole; each serves some of the
    destinations. A rank that is both keeps its own.
    """
    return [
        (sources[number % len(sources)], destination)
        for number, destination in enumerate(destinations)
        if destination not in sources
    ]


def last_stage_ranks(groups: ProcessGroupCollection) -> list[list[int]]:
    """For each data parallel rank of a model: the ranks of its last stage. Collective."""
    mine = (groups.dp.rank(), is_last_stage(groups))
    everyone: list[tuple[int, bool]] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return [
        [rank for rank, (replica, last) in enumerate(everyone) if last and replica == wanted]
        for wanted in range(groups.dp.size())
    ]
