"""Runs one pass over micro-batches with Megatron's own pipeline schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_with_interleaving,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from nemo_trd.data.types import ContextBatch
from nemo_trd.distributed.process import to_device
from nemo_trd.megatron.attention import segments
from nemo_trd.megatron.load_balancing import PackBalance

ForwardStep = Callable[..., tuple[Tensor, Callable[..., Any]]]


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    forward_step: ForwardStep,
    micro_batches: Sequence[Any],
    contexts: Sequence[ContextBatch],
    groups: ProcessGroupCollection,
    *,
    forward_only: bool,
    collect: bool = False,
) -> list[Any]:
    """Run a pass; return the loss function's report on each micro-batch, on the last stage only.

    Args:
        chunks: virtual stages of this rank; with several, all contexts have one length.
        micro_batches: what `forward_step` gets.
        contexts: what this rank's model computes of each of them.
        collect: whether the loss function is called with `non_loss_data=True`, and its results
            are returned.
    """
    config = chunks[0].config
    arguments: dict[str, Any] = {
        "forward_step_func": forward_step,
        "model": list(chunks),
        "data_iterator": [iter(micro_batches) for _ in chunks],
        "num_microbatches": len(micro_batches),
        "micro_batch_size": 1,
        "seq_length": sum(contexts[0].lengths),  # ignored with variable_seq_lengths
        "forward_only": forward_only,
        "collect_non_loss_data": collect,
        "pg_collection": groups,
    }
    if groups.pp.size() == 1:
        return forward_backward_no_pipelining(**arguments)
    arguments["p2p_communicator"] = _KnownShapes(groups, config, contexts)
    if len(chunks) > 1:
        return forward_backward_pipelining_with_interleaving(**arguments)
    return forward_backward_pipelining_without_interleaving(**arguments)


class _KnownShapes(P2PCommunicator):
    """Sends and receives between stages, which know the shapes from the plan of micro-batches.

    megatron-core would send the shape ahead of each tensor, and wait for it on the host.
    """

    def __init__(
        self, groups: ProcessGroupCollection, config: Any, contexts: Sequence[ContextBatch]
    ) -> None:
        super().__init__(groups.pp, config)
        split = groups.tp.size() if config.sequence_parallel else 1
        shapes = [[len(c.tokens[0]) // split, 1, config.hidden_size] for c in contexts]
        # Of hidden states from the stage before, of their gradients from the one behind.
        self._hidden, self._gradients = iter(shapes), iter(shapes)

    def _communicate_shapes(
        self, send_next: Any, send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        nothing = [0, 0, 0]
        return (
            next(self._hidden) if recv_prev else nothing,
            next(self._gradients) if recv_next else nothing,
        )


def is_last_stage(groups: ProcessGroupCollection) -> bool:
    """Whether this rank is on the last pipeline stage."""
    return groups.pp.rank() == groups.pp.size() - 1


def run_model(
    model: torch.nn.Module, batch: ContextBatch, balance: PackBalance | None = None
) -> Tensor:
    """Hidden states [t, 1, h] of one micro-batch, or the input of the next stage.

    Args:
        batch: the part of a pack that this rank computes.
        balance: for a load-balancing loss; None: there is none.
    """
    groups = get_attr_wrapped_model(model, "pg_collection")
    pack = segments(batch, model.config, groups.cp)
    pack.balance = balance
    return model(
        input_ids=to_device(batch.tokens),
        position_ids=to_device(batch.position_ids),
        attention_mask=None,
        packed_seq_params=pack,
    )


def label_rows(
    hidden: Tensor, batch: ContextBatch, groups: ProcessGroupCollection, sequence_parallel: bool
) -> Tensor:
    """Hidden states [n, h] that predict the labels, whole on every tensor parallel rank.

    Each rank computes the logits of its own vocabulary shard from them, so its gradient is a
    partial sum: the backward pass adds those up over the tensor parallel group.
    """
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=True, group=groups.tp
        )
    rows = hidden[:, 0][to_device(batch.label_positions)]
    # On the rows, not on `hidden`: megatron's sum over ranks is lost on strided gradients.
    return rows if sequence_parallel else copy_to_tensor_model_parallel_region(rows, groups.tp)
