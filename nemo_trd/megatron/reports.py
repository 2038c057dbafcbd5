"""What a pass of the student finds at labels. It stays on the device until the pass is done."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_trd.data.types import LabelValues, Microbatch
from nemo_trd.megatron.context_parallel import at_all_labels
from nemo_trd.megatron.finite import Findings


@dataclass(frozen=True)
class Report:
    """What the loss says of one micro-batch, or this rank's part of it, on the device.

    metrics: sums over its n labels, scalars.
    findings: what is not finite.
    values: [3, n], the `LabelValues` at its labels.
    """

    micro_batch: Microbatch
    metrics: dict[str, Tensor]
    findings: Findings
    values: Tensor


def read_sums(reports: Sequence[Report]) -> dict[str, float]:
    """Read the metrics of micro-batches, summed, and their number of labels, `tokens`."""
    rows = [torch.stack(list(report.metrics.values())) for report in reports]
    sums = torch.stack(rows).double().sum(0).tolist()
    tokens = float(sum(len(report.micro_batch.labels) for report in reports))
    return {**dict(zip(reports[0].metrics, sums, strict=True)), "tokens": tokens}


def read_watched(
    reports: Sequence[Report], watch: Collection[str], cp: dist.ProcessGroup
) -> dict[str, LabelValues]:
    """Read the values at labels of the trajectories that `watch` names, by name.

    Collective over the context parallel group.
    """
    watched = [
        (report.micro_batch, report.values)
        for report in reports
        if any(t.name in watch for t in report.micro_batch.trajectories)
    ]
    lists = read_labels(watched, cp)
    return {name: LabelValues(*lists[name]) for name in lists if name in watch}


def read_labels(
    values: Sequence[tuple[Microbatch, Tensor]], cp: dist.ProcessGroup
) -> dict[str, Any]:
    """Read values [..., n] at the n labels of micro-batches: lists [..., labels] by trajectory.

    Collective over the context parallel group, whose ranks have parts of the micro-batches.
    """
    owners = [t for micro_batch, _ in values for t in micro_batch.trajectories]
    if not owners:
        return {}
    read = torch.cat([at_all_labels(value, part, cp) for part, value in values], -1).cpu()
    parts = read.split([len(t.labels) for t in owners], -1)
    return {t.name: part.tolist() for t, part in zip(owners, parts, strict=True)}
