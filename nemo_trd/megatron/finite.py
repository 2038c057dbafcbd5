"""Checks that values are finite before they reach the optimizer, and names the sample."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_trd.data.types import Microbatch


class NonFiniteError(RuntimeError):
    """A value of a sample is not finite; raised before the optimizer has changed a weight."""


def check_hidden_states(micro_batch: Microbatch, hidden: Tensor, first_position: int = 0) -> None:
    """Check the student at all positions: those without labels have a share in the gradient too.

    Args:
        hidden: [s, b, h], final hidden states of `micro_batch.student` from `first_position` on.

    Raises:
        NonFiniteError: with the name of the trajectory.
    """
    bad = ~torch.isfinite(hidden).all(-1)
    if not bad.any():
        return
    place, row = bad.nonzero()[0].tolist()
    value = hidden[place, row][~torch.isfinite(hidden[place, row])][0]
    position = first_position + place
    borders = micro_batch.student.cu_seqlens
    if borders is not None:
        row = int(torch.searchsorted(borders.cpu(), position, right=True)) - 1
        position -= int(borders[row])
    owners = micro_batch.trajectories
    name = owners[row].name if row < len(owners) else "padding"
    raise _error(f"{name}: the student's hidden state at token {position} has {value}", bad)


def check_divergence(
    micro_batch: Microbatch, token_divergence: Tensor, teacher_states: Tensor
) -> None:
    """Check the divergence of the labels of a micro-batch.

    Args:
        token_divergence: [n], one a label.
        teacher_states: [n, h] hidden states of the teacher, or [n, k] log-probabilities of its
            top k, from which it was computed.

    Raises:
        NonFiniteError: with the name of the trajectory.
    """
    bad = ~torch.isfinite(token_divergence).cpu()
    if not bad.any():
        return
    first = int(bad.nonzero()[0])
    owner = int(micro_batch.trajectory_index[first])
    label = first - int((micro_batch.trajectory_index < owner).sum())
    cause = "logits are out of range"
    if not torch.isfinite(teacher_states[first]).all():
        cause = "the teacher's hidden state is not finite"
    raise _error(
        f"{micro_batch.trajectories[owner].name}: the divergence of label {label} is "
        f"{float(token_divergence[first])}: {cause}",
        bad,
    )


def _error(problem: str, bad: Tensor) -> NonFiniteError:
    return NonFiniteError(
        f"{problem} ({int(bad.sum())} such positions in the micro-batch). No weight was changed. "
        "Fix: look for overflow or corrupt weights in student and teacher; try "
        "precision.dtype=fp32."
    )
