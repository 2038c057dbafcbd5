"""Refinements as data for NeMo-Aligner's knowledge distillation, which trains on files.

Its `train_gpt_knowledge_distillation.py` reads what is written here, unchanged: `data_impl: jsonl`,
and `kd_loss: fwd_kl` for the forward KL over the teacher's renormalised top k. Student contexts
are those of TRD, and the teacher saw its own: only the trajectory is off-policy, since the student
that sampled the rollouts stays as it is. This module needs nothing of Aligner.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_trd.algorithm.trajectories import pair
from nemo_trd.data.types import Microbatch, Trajectory
from nemo_trd.loss.top_k import TopK
from nemo_trd.megatron.schedule import is_last_stage
from nemo_trd.run.run import Run
from nemo_trd.train import sample, teach

log = logging.getLogger(__name__)


def write_kd_jsonl(run: Run, path: Path, steps: Iterable[int], top_k: int) -> int:
    """Write the trajectories of the prompts of `steps`, one a line; how many. Collective.

    Refinements that were rejected are no lines, but what `refinement.on_failure` makes of them;
    how many and why is logged.
    """
    lines = 0
    with _opened(path) as file:
        for step in steps:
            prompts = run.inputs.prompts(step)
            refinements = run.within_support(sample(run, prompts, step, run.timers))
            trajectories = pair(refinements, run.config, run.inputs.teacher_prompt)
            for row in _rows(run, trajectories, top_k):
                file.write(json.dumps(row) + "\n")
                lines += 1
            log.info(
                "%s: %d of the %d refinements of step %d, rejected: %s",
                path,
                len(trajectories),
                len(refinements),
                step,
                sorted(r.rejection for r in refinements if r.rejection) or "none",
            )
    return lines


def _opened(path: Path) -> Any:
    """On the first rank; on the others, nowhere."""
    return (path if dist.get_rank() == 0 else Path("/dev/null")).open("w", encoding="utf-8")


def _rows(run: Run, trajectories: list[Trajectory], top_k: int) -> list[dict[str, Any]]:
    """Rows of all ranks, in the order of `trajectories`."""
    if not trajectories:
        return []
    student = run.student
    own: dict[str, dict[str, Any]] = {}
    micro_batches, states = teach(run, trajectories)
    for batch, state in zip(micro_batches[student.groups.dp.rank()], states, strict=True):
        if state is not None and batch.trajectories:
            own |= _rows_of(batch, student.teacher_top_k(state, batch, top_k))
    everyone: list[dict[str, dict[str, Any]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, own if is_last_stage(student.groups) else {})
    rows = {name: row for share in everyone for name, row in share.items()}
    return [rows[trajectory.name] for trajectory in trajectories]


def _rows_of(batch: Microbatch, top: TopK) -> dict[str, dict[str, Any]]:
    rows = {}
    for index, trajectory in enumerate(batch.trajectories):
        own = (batch.trajectory_index == index).to(top.ids.device)
        rows[trajectory.name] = kd_row(
            trajectory, TopK(top.ids[own], top.log_probs[own], top.label_log_probs[own])
        )
    return rows


def kd_row(trajectory: Trajectory, top: TopK) -> dict[str, Any]:
    """One line: position i of every list is about the token after `tokens[i]`.

    Logits are given as Aligner computes them, with the largest at 0: a row of `topk_logits` less
    its `log_sum_exp_logits` are log-probabilities. Positions of the context hold zeros, and
    `loss_mask` leaves them out.

    Args:
        top: of the labels of `trajectory`.
    """
    context, k = len(trajectory.student_context) - 1, top.ids.shape[1]
    sequence = trajectory.student_context + trajectory.labels
    logits = top.log_probs - top.log_probs[:, :1]
    unknown = torch.zeros(context, k)
    return {
        "tokens": sequence[:-1],
        "labels": sequence[1:],
        "loss_mask": [0] * context + [1] * len(trajectory.labels),
        "topk_token_ids": unknown.long().tolist() + top.ids.tolist(),
        "topk_logits": unknown.tolist() + logits.tolist(),
        "log_sum_exp_logits": [0.0] * context + (-top.log_probs[:, 0]).tolist(),
    }
