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
RanksOfParts = list[list[int]]  # for each context parallel rank: ranks that have its part


@dataclass(frozen=True)
class Piece:
    """States of some labels of a micro-batch that go from one rank to another, or stay."""

    source: int
    destination: int
    rows: Tensor  # int64 [m], on the host: numbers of these labels among the source's
    places: Tensor  # and among the destination's


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
        self._plan, self._rounds = plan, rounds
        self._like, self._offload = like, offload
        self._sources, self._destinations = sources, destinations
        # Found beforehand: within the passes nothing is read, on the host either.
        self._pieces = {
            (student, position): _pieces_of_rank(plan[student][position], of_teacher, wanted)
            for states in rounds
            for (student, position), of_teacher in zip(states, sources, strict=False)
            for wanted in [destinations[student]]
        }
        self._started = 0
        self._works: list[dist.Work] = []  # of the round under way, with the tensors in it
        self._sent: list[Tensor] = []
        self._arriving: dict[int, list[tuple[Tensor, Tensor]]] = {}
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
            own, arriving = None, []
            if _is_among(me, sources):
                packs = self._plan[student][position].teacher
                own = torch.cat([self.computed.popleft() for _ in packs])
            for piece in self._pieces[student, position]:
                if me == piece.source:
                    assert own is not None
                    state = _rows(own, piece.rows)
                else:
                    state = self._like.new_empty(len(piece.places), self._like.shape[1])
                if me == piece.destination:
                    arriving.append((piece.places, state))
                if piece.source != piece.destination:
                    operations.append(_exchange(piece, state))
                    self._sent.append(state)
            if _is_among(me, self._destinations[student]):
                self._arriving[position] = arriving
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
        """States of all of this rank's labels from what it has of each source: (places, states)."""
        if len(pieces) == 1:
            return pieces[0][1]
        count = sum(len(state) for _, state in pieces)
        joined = self._like.new_empty(count, self._like.shape[1])
        for places, state in pieces:
            joined.index_copy_(0, to_device(places), state)
        return joined


def _exchange(piece: Piece, state: Tensor) -> dist.P2POp:
    """This rank's half of an exchange."""
    if dist.get_rank() == piece.source:
        return dist.P2POp(dist.isend, state, piece.destination)
    return dist.P2POp(dist.irecv, state, piece.source)


def _rows(states: Tensor, rows: Tensor) -> Tensor:
    """Some rows of states, in their order; all of them are not copied."""
    if len(rows) == len(states):
        return states
    return states.index_select(0, to_device(rows))


def _is_among(rank: int, parts: RanksOfParts) -> bool:
    return any(rank in ranks for ranks in parts)


def _pieces_of_rank(
    batch: Microbatch, sources: RanksOfParts, destinations: RanksOfParts
) -> list[Piece]:
    """Pieces of one micro-batch that this rank sends, gets or keeps: each has labels."""
    me = dist.get_rank()
    if not _is_among(me, sources) and not _is_among(me, destinations):
        return []
    theirs, rows = label_holders(batch.teacher, len(sources))
    ours, places = label_holders([batch.student], len(destinations))
    pieces = []
    for (part, source), (wanted, destination) in routes(sources, destinations):
        if me in (source, destination):
            labels = ((theirs == part) & (ours == wanted)).nonzero()[:, 0]
            pieces.append(Piece(source, destination, rows[labels], places[labels]))
    return [piece for piece in pieces if len(piece.rows)]


def rounds_of(plan: Sequence[Sequence[Microbatch]], teachers: int) -> list[Round]:
    """Divide a step among data parallel teachers; the last round may not have one for each.

    `rounds[k][t]` is the kth micro-batch of teacher t.
    """
    students, positions = range(len(plan)), range(len(plan[0]))
    order = [(student, position) for position in positions for student in students]
    return [order[first : first + teachers] for first in range(0, len(order), teachers)]


def routes(
    sources: RanksOfParts, destinations: RanksOfParts
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Who gives states of one micro-batch to whom: pairs of (context parallel rank, rank).

    Every tensor parallel rank of the teacher's last stage has those of its part whole; each serves
    some of the destinations. A rank that is both takes its own.
    """
    wanted = [(part, rank) for part, ranks in enumerate(destinations) for rank in ranks]
    return [
        ((part, rank if rank in ranks else ranks[number % len(ranks)]), (own, rank))
        for number, (own, rank) in enumerate(wanted)
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
