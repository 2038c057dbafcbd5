"""Brings the teacher's states to the ranks that compute the loss, while the teacher computes on.

Round k of a step hands over the kth micro-batch of every data parallel teacher. The sends and
receives of a rank in one round are one batch, and no host waits for them.

Why ranks never wait for each other in a circle: NCCL runs what a rank asks of a communicator in the
order in which it was asked, and a GPU may run nothing else until the partners in it have come. So
what ranks ask for, of all communicators together, must be in one order that holds for all of them.
This one does, at times t = 0, 1, ...:

  1. each stage p of each teacher passes its micro-batch t - p forward;
  2. it sends the result to the stage behind, the last stages first;
  3. round t - (stages - 1) is handed over: what the last stages have just computed.

A rank of stage p comes to its ith micro-batch at time i + p, having started the rounds before
i - (stages - 1 - p); when it has passed its last one it starts the rest. So it does not matter
which ranks hold which stages of teacher and student.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from nemo_trd.data.types import Microbatch
from nemo_trd.distributed.process import device, to_host
from nemo_trd.megatron.schedule import is_last_stage

Round = list[tuple[int, int]]  # for each teacher: student and position in its plan


class HandOver:
    """The states of one step on their way. Every rank makes one.

    Attributes:
        computed: states [n, h] that this rank's teacher has computed, to be handed over in turn;
            on the teacher's last stage only.
    """

    def __init__(
        self,
        plan: Sequence[Sequence[Microbatch]],
        rounds: Sequence[Round],
        sources: Sequence[Sequence[int]],
        destinations: Sequence[Sequence[int]],
        like: Tensor,
        *,
        offload: bool,
    ) -> None:
        """Prepare the rounds of a step.

        Args:
            plan: `plan[d]`, micro-batches of the student's data parallel rank d.
            rounds: see `rounds_of`.
            sources: for each teacher, the ranks that compute its states; see `last_stage_ranks`.
            destinations: for each data parallel rank of the student, the ranks that need them.
            like: [0, h], whose dtype and device states have.
            offload: whether they are kept in host memory.
        """
        self.computed: deque[Tensor] = deque()
        self._plan, self._rounds, self._like = plan, rounds, like
        self._sources, self._destinations = sources, destinations
        self._offload = offload
        self._started = 0
        self._works: list[dist.Work] = []  # of the round under way, with the tensors in it
        self._sent: list[Tensor] = []
        self._arriving: dict[int, Tensor] = {}
        self._arrived: dict[int, Tensor] = {}

    def start(self, count: int) -> None:
        """Start the first `count` rounds, those that have not been started. Two at most overlap."""
        for states in self._rounds[self._started : max(0, count)]:
            self._end_round()
            self._start_round(states)
            self._started += 1

    def finish(self) -> list[Tensor | None]:
        """Start the rounds that are left; return the states of this rank's own micro-batches.

        None on ranks that compute no loss.
        """
        self.start(len(self._rounds))
        self._end_round()
        return [self._arrived.get(position) for position in range(len(self._plan[0]))]

    def _start_round(self, states: Round) -> None:
        me, operations = dist.get_rank(), []
        for (student, position), sources in zip(states, self._sources, strict=False):
            destinations = self._destinations[student]
            own = self.computed.popleft() if me in sources else None
            if own is not None and me in destinations:
                self._arriving[position] = own
            for source, destination in routes(sources, destinations):
                if me == source:
                    assert own is not None
                    self._sent.append(own.contiguous())
                    operations.append(dist.P2POp(dist.isend, self._sent[-1], destination))
                elif me == destination:
                    labels = len(self._plan[student][position].labels)
                    state = self._arriving[position] = self._like.new_empty(
                        labels, self._like.shape[1]
                    )
                    operations.append(dist.P2POp(dist.irecv, state, source))
        if operations:
            self._works = dist.batch_isend_irecv(operations)

    def _end_round(self) -> None:
        for work in self._works:
            work.wait()
        for position, state in self._arriving.items():
            self._arrived[position] = to_host(state) if self._offload else state
        self._works, self._sent, self._arriving = [], [], {}


def rounds_of(plan: Sequence[Sequence[Microbatch]], teachers: int) -> list[Round]:
    """Divide a step among data parallel teachers; the last round may not have one for each.

    `rounds[k][t]` is the kth micro-batch of teacher t.
    """
    students, positions = range(len(plan)), range(len(plan[0]))
    order = [(student, position) for position in positions for student in students]
    return [order[first : first + teachers] for first in range(0, len(order), teachers)]


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


def open_communicator() -> None:
    """Use the world's group once. Collective.

    NCCL makes a group's communicator at its first use, with all ranks of it: were that a batch of
    sends in which only some take part, these would wait for the others for ever.
    """
    dist.all_reduce(torch.zeros(1, device=device()))
