"""Load-balancing loss of a student with experts, each trajectory by itself.

In a sparse layer with N experts of which a token goes to k, a trajectory of T tokens of which n_i
go to expert i, with the router's probabilities p_ti (softmax over all experts), has

    B = N / (k T^2) sum_i n_i sum_t p_ti

(Switch Transformer, arXiv 2101.03961, eq. 4 to 6; over a sequence as in DeepSeek-V3, arXiv
2412.19437, eq. 17 to 20). It is 1 where tokens or probabilities are even. A step adds to what is
minimised `student.moe_aux_loss_coeff` times the mean of B over its trajectories, of each sparse
layer. Padding and fillers are in no trajectory, so packs, micro-batches and ranks change nothing.

megatron-core's own `seq_aux_loss` takes a pack for one sequence, 0.16 and 0.19 scale it differently
where ranks split a sequence, and both weight it as if each token had a label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_trd.algorithm.trajectories import sequence_lengths
from nemo_trd.data.types import ContextBatch, Microbatch, Trajectory
from nemo_trd.distributed.process import device, to_device


@dataclass(frozen=True)
class PackBalance:
    """What routers need to know of a pack, or this rank's part of it, with s trajectories.

    owners: int64 [t], number in the pack of the trajectory of each token that this rank routes, or
        s where the token fills up.
    factors: fp32 [s + 1], N / (k T^2) over the number of trajectories in the step; 0 at s.
    weight: of the mean of B over trajectories in the sum over labels whose gradient is taken.
    sums: float64 [layers, 1 + N] of the whole pass, on the device: of each layer this rank's share
        of that mean, and the number of tokens that each expert got.
    """

    owners: Tensor
    factors: Tensor
    weight: float
    sums: Tensor

    def loss(self, layer: int, logits: Tensor, chosen: Tensor, ranks: dist.ProcessGroup) -> Tensor:
        """This rank's share of a layer's loss, a scalar to be added to the sum over labels.

        Collective over `ranks`, which have the tokens of whole sequences: their shares add up.

        Args:
            layer: its number in the model, from 0.
            logits: [t, N], of the router.
            chosen: bool [t, N], the experts to which tokens go.
        """
        zeros = logits.new_zeros(len(self.factors), logits.shape[-1])
        counts = zeros.index_add(0, self.owners, chosen.to(logits.dtype))
        self.sums[layer, 1:] += counts[:-1].sum(0)
        if ranks.size() > 1:
            dist.all_reduce(counts, group=ranks)
        probabilities = zeros.index_add(0, self.owners, logits.softmax(-1))
        total = (self.factors[:, None] * counts * probabilities).sum()
        self.sums[layer, 0] += total.detach()
        return self.weight * total


class BalancedRouter(TopKRouter):
    """A router that adds the gradient of a load-balancing loss, where its layer gives it a pack."""

    pack: PackBalance | None = None

    def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Weights and choice of experts, each [t, N]; see megatron-core."""
        weights, chosen = super().routing(logits, *args, **kwargs)
        # A layer that is recomputed passes twice in training, first without gradients.
        if self.pack is None or (self.training and not torch.is_grad_enabled()):
            return weights, chosen
        rows = logits.view(-1, logits.shape[-1])
        loss = self.pack.loss(self.layer_number - 1, rows, chosen, self.tp_cp_group)
        return MoEAuxLossAutoScaler.apply(weights, loss), chosen


def give_packs_to_routers(model: Any) -> None:
    """Have each sparse layer of a GPT tell its router the pack that it is called with.

    Not the model once a micro-batch: a recomputed layer passes again when others have come between.
    """
    for layer in model.decoder.layers:
        if isinstance(layer.mlp, MoELayer):
            layer.register_forward_pre_hook(_give_pack, with_kwargs=True)


def _give_pack(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    layer.mlp.router.pack = kwargs["packed_seq_params"].balance


class LoadBalancing:
    """The load-balancing loss of one pass over a step's micro-batches.

    Args:
        coefficient: `student.moe_aux_loss_coeff`.
        plan: micro-batches of all data parallel ranks.
    """

    def __init__(
        self,
        coefficient: float,
        plan: Sequence[Sequence[Microbatch]],
        config: TransformerConfig,
        groups: ProcessGroupCollection,
    ) -> None:
        batches = [batch for rank in plan for batch in rank]
        trajectories = sum(len(batch.trajectories) for batch in batches)
        labels = sum(len(batch.labels) for batch in batches)
        experts = config.num_moe_experts
        self._scale = experts / (config.moe_router_topk * trajectories)
        self._weight = coefficient * labels  # gradients are divided by the number of labels
        self._split = groups.tp if config.sequence_parallel else None
        size = (config.num_layers, 1 + experts)
        self._sums = torch.zeros(size, dtype=torch.float64, device=device())

    def of(self, micro_batch: Microbatch) -> PackBalance:
        """What routers need of this rank's part of a micro-batch."""
        lengths = [sequence_lengths(t)[0] for t in micro_batch.trajectories]
        factors = torch.tensor([*(self._scale / length**2 for length in lengths), 0.0])
        owners = token_owners(micro_batch.student, micro_batch.trajectories)
        if self._split is not None:
            owners = owners.chunk(self._split.size())[self._split.rank()]
        return PackBalance(to_device(owners), to_device(factors), self._weight, self._sums)

    def read(self) -> dict[str, float]:
        """Figures of the whole step. Collective over all ranks.

        load_balancing_loss: mean of B over trajectories and sparse layers.
        max_expert_load: tokens of the expert that gets most over the mean of its layer's experts,
            in the layer where that is largest.
        """
        dist.all_reduce(self._sums)
        rows = [row for row in self._sums.tolist() if any(row)]
        loss = sum(row[0] for row in rows) / len(rows)
        load = max(max(row[1:]) * len(row[1:]) / sum(row[1:]) for row in rows)
        return {"load_balancing_loss": loss, "max_expert_load": load}


def token_owners(batch: ContextBatch, trajectories: Sequence[Trajectory]) -> Tensor:
    """Number of the trajectory of each token in a part of a pack, int64 [t], on the host.

    Tokens that fill up a sequence or the pack have the number of trajectories.
    """
    owners = torch.full((sum(batch.lengths),), len(trajectories))
    starts = batch.cu_seqlens.tolist()
    for number, (start, trajectory) in enumerate(zip(starts, trajectories, strict=False)):
        owners[start : start + sequence_lengths(trajectory)[0]] = number
    return owners if batch.places is None else owners[batch.places]
