"""Finds values that are not finite before they reach the optimizer, and names the sample.

While the passes of a step run nothing is read back from the device: the host would wait until it
has done all that was asked of it. What is found stays there, a few numbers for each micro-batch,
and is read when the passes are done.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_trd.data.types import Microbatch
from nemo_trd.distributed.exchange import merge_shares

ADVICE = (
    "No weight was changed. Fix: look for overflow or corrupt weights in student and teacher; try "
    "precision.dtype=fp32."
)


class NonFiniteError(RuntimeError):
    """A value of a sample is not finite; raised before the optimizer has changed a weight."""


@dataclass(frozen=True)
class Findings:
    """What a micro-batch has that is not finite, on the device.

    first_position: where this rank's part of the sequence begins.
    numbers: float64 [7]. Of the student's hidden states: number of positions that are not finite,
        the first of them in [t], a value there. Of the labels' divergences: their number, the
        first, its value, and 1 where the teacher's state at it is not finite either.
    """

    micro_batch: Microbatch
    first_position: int
    numbers: Tensor


@torch.no_grad()
def look(
    micro_batch: Microbatch,
    hidden: Tensor,
    first_position: int,
    token_divergence: Tensor,
    teacher_states: Tensor,
) -> Findings:
    """Look for values that are not finite in a micro-batch, without waiting for the device.

    Args:
        hidden: [t, 1, h], the student's final hidden states from `first_position` on. All positions
            count: those without labels have a share in the gradient too.
        token_divergence: [n], one a label.
        teacher_states: [n, h] hidden states of the teacher, or [n, k] log-probabilities of its
            top k, from which it was computed.
    """
    numbers = [_first_bad(hidden.flatten(0, 1)), hidden.new_zeros(4, dtype=torch.float64)]
    if len(token_divergence):
        label = _first_bad(token_divergence[:, None])
        cause = ~teacher_states.index_select(0, label[1:2].long()).isfinite().all()
        numbers[1] = torch.cat([label, cause[None]])
    return Findings(micro_batch, first_position, torch.cat(numbers))


def _first_bad(rows: Tensor) -> Tensor:
    """[n, k] -> float64 [3]: number of rows that are not finite, the first, its first bad value."""
    bad = ~rows.isfinite()
    bad_rows = bad.any(-1)
    row = bad_rows.byte().argmax(0, keepdim=True)  # the first of the largest
    column = bad.index_select(0, row)[0].byte().argmax(0, keepdim=True)
    value = rows.index_select(0, row)[0].index_select(0, column)
    return torch.stack([bad_rows.sum().double(), row[0].double(), value[0].double()])


def check(findings: Sequence[Findings], chunks: Sequence[Any]) -> None:
    """Check what the passes of a step have found, and the gradients of these model chunks.

    Collective over all ranks, which all raise the same.

    Raises:
        NonFiniteError: with the name of the trajectory, or of the parameter.
    """
    found = merge_shares([(first_bad_value(findings), _first_bad_gradient(chunks))])
    for errors in zip(*found, strict=True):  # a bad value spoils gradients, also on other ranks
        for error in filter(None, errors):
            raise NonFiniteError(error)


def first_bad_value(findings: Sequence[Findings]) -> str | None:
    """Error message about the first value that is not finite, if there is one."""
    if not findings:
        return None
    read = torch.stack([found.numbers for found in findings]).tolist()
    for found, (states, place, value, labels, label, divergence, by_teacher) in zip(
        findings, read, strict=True
    ):
        if states:
            where = _position(found, int(place))
            return _message(f"{where} has {value}", int(states))
        if labels:
            cause = "the teacher's hidden state is not finite"
            cause = cause if by_teacher else "logits are out of range"
            what = f"{_label(found.micro_batch, int(label))} is {divergence}: {cause}"
            return _message(what, int(labels))
    return None


def _position(found: Findings, place: int) -> str:
    """Name the trajectory and token of a place in this rank's part of the pack."""
    student = found.micro_batch.student
    borders, position = student.cu_seqlens.tolist(), place + found.first_position
    if student.places is not None:
        position = int(student.places[position])
    segment = bisect.bisect_right(borders, position) - 1
    position -= borders[segment]
    owners = found.micro_batch.trajectories
    name = owners[segment].name if segment < len(owners) else "a filler"
    return f"{name}: the student's hidden state at token {position}"


def _label(micro_batch: Microbatch, label: int) -> str:
    owner, number = int(micro_batch.trajectory_index[label]), int(micro_batch.label_index[label])
    return f"{micro_batch.trajectories[owner].name}: the divergence of label {number}"


def _first_bad_gradient(chunks: Sequence[Any]) -> str | None:
    """As `first_bad_value`, of the gradients of model chunks wrapped for data parallelism.

    megatron-core's own check waits for the device once a bucket, in the last backward pass.
    """
    buffers = [b for chunk in chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    if not buffers:
        return None
    norm = float(torch.stack([buffer.grad_data.norm() for buffer in buffers]).sum())
    if math.isfinite(norm):
        return None
    names = [
        name
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
        if parameter.requires_grad and not parameter.main_grad.isfinite().all()
    ]
    where = ", ".join(names[:3]) or "in the sum of squares"
    where += f" and {len(names) - 3} more" if len(names) > 3 else ""
    kind = "NaN" if math.isnan(norm) else "Inf"
    return f"found {kind} in local grad norm of rank {dist.get_rank()}: {where}. {ADVICE}"


def _message(problem: str, count: int) -> str:
    return f"{problem} ({count} such positions in the micro-batch). {ADVICE}"
