"""The loss head: from hidden states at the labels of a micro-batch to its divergence.

It stands where a language model has its output layer, on the last pipeline stage. The student of
this package and models of other packages that stop before their output layer use it alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from nemo_trd.config.schema import Loss, ModelSource
from nemo_trd.data.types import Microbatch
from nemo_trd.distributed.process import device, to_device
from nemo_trd.loss.divergences import chunk_size
from nemo_trd.loss.fused import (
    TOP_K_IDS,
    DivergenceOutput,
    check_ids,
    divergence_from_top_k,
    fused_divergence,
    token_nll,
    top_k_of,
)
from nemo_trd.loss.top_k import TopK
from nemo_trd.megatron.finite import Findings, look
from nemo_trd.megatron.hf_weights import read_output_weight
from nemo_trd.megatron.model import load_hf_config
from nemo_trd.megatron.schedule import label_rows


@dataclass
class LossHead:
    """Divergences and likelihoods at labels. All methods are collective over `groups.tp`.

    loss: what is computed.
    vocab_size: number of ids over which the divergence runs: those with a token.
    groups: of the student.
    sequence_parallel: whether hidden states are split along the sequence over `groups.tp`.
    teacher_weight: [V/tp, Ht], the teacher's output weight in the student's sharding; None where
        the teacher is known by its top k, and before the last stage.
    into_main_grad: whether the student's output weight has a `main_grad` of megatron-core in fp32,
        and each sum of divergences the gradient one (`calculate_per_token_loss`). Its gradient is
        then added there in the forward pass.
    """

    loss: Loss
    vocab_size: int
    groups: ProcessGroupCollection
    sequence_parallel: bool
    teacher_weight: Tensor | None = None
    into_main_grad: bool = False

    def read_teacher_weight(self, teacher: ModelSource, weight: Tensor) -> None:
        """Read the teacher's frozen output weight, sharded as the student's [V/tp, Hs] is."""
        self.teacher_weight = read_output_weight(
            load_hf_config(teacher.path, teacher.trust_remote_code),
            teacher.path,
            self.groups.tp.rank(),
            self.groups.tp.size(),
            dtype=weight.dtype,
            device=device(),
            rows=weight.shape[0],
        )

    def divergence(
        self, hidden: Tensor, weight: Tensor, micro_batch: Microbatch, teacher: Tensor | TopK
    ) -> tuple[DivergenceOutput, Findings]:
        """Compute D(pi_T, pi_theta) at the labels of a micro-batch, with its gradients.

        Nothing is read back from the device; what is not finite is among the findings.

        Args:
            hidden: the student's final hidden states as its last stage returns them.
            weight: [V/tp, Hs], the student's output weight on this rank.
            teacher: hidden states [n, Ht] at the n labels, or the teacher's top k there.

        Raises:
            ConfigError: a label outside the vocabulary.
        """
        rows, labels = self._rows(hidden, micro_batch), _labels(micro_batch, self.vocab_size)
        main_grad = weight.main_grad if self.into_main_grad else None  # type: ignore[attr-defined]
        common = labels, self.loss, self.vocab_size, self.groups.tp, main_grad
        if isinstance(teacher, TopK):
            check_ids(TOP_K_IDS, teacher.ids, self.vocab_size)
            teacher = teacher.moved(to_device)
            states = teacher.log_probs
            result = divergence_from_top_k(rows, weight, teacher, *common)
        else:
            assert self.teacher_weight is not None
            states = to_device(teacher)
            result = fused_divergence(rows, weight, states, self.teacher_weight, *common)
        if main_grad is not None:
            result = replace(result, loss_sum=_Added.apply(result.loss_sum, weight))
        split = self.sequence_parallel * self.groups.tp.rank() * len(hidden)
        return result, look(micro_batch, hidden, split, result.token_divergence, states)

    def token_nll(
        self, hidden: Tensor, weight: Tensor, micro_batch: Microbatch, vocab_size: int
    ) -> Tensor:
        """Negative log-likelihood [n] of the labels in nats, over `vocab_size` ids, untempered."""
        return token_nll(
            self._rows(hidden, micro_batch),
            weight,
            _labels(micro_batch, vocab_size),
            temperature=1.0,
            vocab_size=vocab_size,
            chunk_size=chunk_size(self.loss, len(weight), weight.is_cuda),
            group=self.groups.tp,
        )

    @torch.no_grad()
    def teacher_top_k(
        self, teacher: Tensor | TopK, labels: Tensor, k: int, vocab_size: int
    ) -> TopK:
        """The teacher's k most likely of `vocab_size` ids at the labels [n] of a micro-batch.

        Args:
            teacher: as for `divergence`.
        """
        if isinstance(teacher, TopK):
            best = TopK(teacher.ids[:, :k], teacher.log_probs[:, :k], teacher.label_log_probs)
            return best.moved(to_device)  # servers' lie on the host
        weight = self.teacher_weight
        assert weight is not None
        return top_k_of(
            to_device(teacher),
            weight,
            to_device(labels),
            k,
            vocab_size=vocab_size,
            chunk_size=chunk_size(self.loss, len(weight), weight.is_cuda),
            group=self.groups.tp,
        )

    def _rows(self, hidden: Tensor, micro_batch: Microbatch) -> Tensor:
        return label_rows(hidden, micro_batch.student, self.groups, self.sequence_parallel)


class _Added(torch.autograd.Function):
    """A loss whose gradient in a weight has been added to the weight's `main_grad`.

    megatron-core waits for the gradient of each parameter, and adds it to `main_grad` in a hook. So
    it gets an empty one, and a mark that it has been added. A tied weight also gets the gradient of
    the embedding, and the hook adds both: there it is of zeros.
    """

    @staticmethod
    def forward(ctx: Any, loss_sum: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return loss_sum.clone()  # pipelines free it, which a view refuses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        weight = ctx.weight
        weight.grad_added_to_main_grad = True
        tied_here = getattr(weight, "zero_out_wgrad", False)
        return upstream, (torch.zeros_like if tied_here else torch.empty_like)(weight)


def _labels(micro_batch: Microbatch, vocab_size: int) -> Tensor:
    """Labels [n] on the device, checked on the host."""
    ids = [token for trajectory in micro_batch.trajectories for token in trajectory.labels]
    check_ids("labels", ids, vocab_size)
    return to_device(micro_batch.labels)
