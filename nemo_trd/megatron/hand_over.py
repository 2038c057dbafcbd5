"""Brings the teacher's states to the ranks that compute the loss, while the teacher computes on.

Round k of a step hands over the kth micro-batch of every data parallel teacher; on the teacher's
side that is one pack of sequences or several. The sends and receives of a rank in one round are one
batch, and no host waits for them.

Why ranks never wait for each other in a circle: NCCL runs what a rank asks of a communicator in the
order in which it was asked, and a GPU may run nothing else until the partners in it have come. So
what ranks ask for, of all communicators together, must be in one order that holds for all of them.
Teachers meet in rounds only, so an order of each one's passes and of the rounds is enough. Here it
is, at times t = 0, 1, ... of a teacher:

  1. each stage p passes pack t - p forward;
  2. it sends the result to the stage behind, the last stages first;
  3. the round is handed over of which the last stage has just computed the last pack.

A rank of stage p comes to its ith pack at time i + p, having started the rounds that end before
pack i - (stages - 1 - p); when it has passed its last one it starts the rest. So it does not matter
which ranks hold which stages of teacher and student.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from nemo_trd.data.types import Microbatch
from nemo_trd.distributed.process import device, to_device, to_host
from nemo_trd.megatron.context_parallel import label_holders
from nemo_trd.megatron.schedule import is_last_stage

Round = list[tuple[int, int]]  # for each teacher: student and position in its plan
RanksOfParts = list[list[int]]  # for each context parallel rank: ranks that hold its part


@dataclass(frozen=True)
class Piece:
    """States of one micro-batch that one rank gives another, or itself."""

    source: int
    destination: int
    rows: Tensor  # int64 [m], numbers of their labels among those of the source
    places: Tensor  # int64 [m], numbers of their labels among those of the destination

    def exchange(self, me: int, state: Tensor) -> dist.P2POp:
        """This rank's side of it, with the tensor to send or to fill."""
        if me == self.source:
            return dist.P2POp(dist.isend, state, self.destination)
        return dist.P2POp(dist.irecv, state, self.source)


class HandOver:
    """The states of one step on their way. Every rank makes one.

    Attributes:
        computed: states [n, h] of each pack that this rank's teacher has computed, to be handed
            over in turn; on the teacher's last stage only.
    """

    def __init__(
        self,
        plan: Sequence[Sequence[Microbatch]],
        rounds: Sequence[Round],
        sources: Sequence[RanksOfParts],
        destinations: Sequence[RanksOfParts],
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
        # Made before the passes: it takes the host some time.
        self._pieces = [
            [
                pieces_of(plan[student][position], parts, destinations[student])
                for (student, position), parts in zip(states, sources, strict=False)
            ]
            for states in rounds
        ]
        self._started = 0
        self._works: list[dist.Work] = []  # of the round under way, with the tensors in it
        self._sent: list[Tensor] = []
        self._arriving: dict[int, list[tuple[Tensor, Tensor]]] = {}  # (places, states) of pieces
        self._arrived: dict[int, Tensor] = {}

    def start(self, count: int) -> None:
        """Start the first `count` rounds, those that have not been started. Two at most overlap."""
        while self._started < min(count, len(self._rounds)):
            self._end_round()
            self._start_round(self._started)
            self._started += 1

    def finish(self) -> list[Tensor | None]:
        """Start the rounds that are left; return the states of this rank's own micro-batches.

        None on ranks that compute no loss.
        """
        self.start(len(self._rounds))
        self._end_round()
        return [self._arrived.get(position) for position in range(len(self._plan[0]))]

    def _start_round(self, number: int) -> None:
        me, operations = dist.get_rank(), []
        for (student, position), parts, pieces in zip(
            self._rounds[number], self._sources, self._pieces[number], strict=False
        ):
            own = None
            if _is_in(me, parts):
                packs = self._plan[student][position].teacher
                own = torch.cat([self.computed.popleft() for _ in packs])
            if _is_in(me, self._destinations[student]):
                self._arriving[position] = []
            for piece in pieces:
                state = _rows(own, piece.rows) if me == piece.source else self._empty(piece.rows)
                if piece.source != piece.destination:
                    operations.append(piece.exchange(me, state))
                if me == piece.destination:
                    self._arriving[position].append((piece.places, state))
                else:
                    self._sent.append(state)
        if operations:
            self._works = dist.batch_isend_irecv(operations)

    def _end_round(self) -> None:
        for work in self._works:
            work.wait()
        for position, pieces in self._arriving.items():
            state = self._joined(pieces)
            self._arrived[position] = to_host(state) if self._offload else state
        self._works, self._sent, self._arriving = [], [], {}

    def _joined(self, pieces: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """States of this rank's labels of one micro-batch."""
        if len(pieces) == 1:
            return pieces[0][1]
        joined = self._like.new_empty(sum(len(state) for _, state in pieces), self._like.shape[1])
        for places, state in pieces:
            joined[to_device(places)] = state
        return joined

    def _empty(self, rows: Tensor) -> Tensor:
        return self._like.new_empty(len(rows), self._like.shape[1])


def _is_in(rank: int, parts: RanksOfParts) -> bool:
    return any(rank in ranks for ranks in parts)


def _rows(state: Tensor | None, rows: Tensor) -> Tensor:
    """Some rows of the states, in order; all of them are not copied."""
    assert state is not None
    return state if len(rows) == len(state) else state[to_device(rows)]


def rounds_of(plan: Sequence[Sequence[Microbatch]], teachers: int) -> list[Round]:
    """Divide a step among data parallel teachers; the last round may not have one for each.

    `rounds[k][t]` is the kth micro-batch of teacher t.
    """
    students, positions = range(len(plan)), range(len(plan[0]))
    order = [(student, position) for position in positions for student in students]
    return [order[first : first + teachers] for first in range(0, len(order), teachers)]


def pieces_of(
    micro_batch: Microbatch, sources: RanksOfParts, destinations: RanksOfParts
) -> list[Piece]:
    """Pieces in which the states of one micro-batch go from the teacher to the student.

    Those alone which this rank gives or takes, in the order in which all ranks know them.
    """
    me = dist.get_rank()
    theirs, rows = label_holders(micro_batch.teacher, len(sources))
    ours, places = label_holders([micro_batch.student], len(destinations))
    pieces = []
    for (part, source), (wanted, destination) in routes(sources, destinations):
        if me not in (source, destination):
            continue
        labels = ((theirs == part) & (ours == wanted)).nonzero()[:, 0]
        if len(labels):
            pieces.append(Piece(source, destination, rows[labels], places[labels]))
    return pieces


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


def open_communicator() -> None:
    """Use the world's group once. Collective.

    NCCL makes a group's communicator at its first use, with all ranks of it: were that a batch of
    sends in which only some take part, these would wait for the others for ever.
    """
    dist.all_reduce(torch.zeros(1, device=device()))
