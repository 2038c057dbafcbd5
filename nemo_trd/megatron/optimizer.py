"""The student's optimizer."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import (
    USING_PYTORCH_OPTIMIZER,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from nemo_trd.config.schema import Config


def optimizer_tensors(optimizer: Any) -> list[Tensor]:
    """What an optimizer of `make_optimizer` holds of its own: main weights, moments."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    inner = [part.optimizer for part in parts]
    main = [weight for one in inner for group in one.param_groups for weight in group["params"]]
    states = [value for one in inner for state in one.state.values() for value in state.values()]
    return [*main, *(value for value in states if isinstance(value, Tensor))]


def make_optimizer(config: Config, chunks: list[Any], groups: Any) -> Any:
    """Adam as `config.optimizer` says, for model chunks that are wrapped for data parallelism."""
    settings = config.optimizer
    bf16 = config.precision.dtype == "bf16"
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_eps=settings.eps,
            clip_grad=settings.clip_grad,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=settings.distributed,
        ),
        chunks,
        use_gloo_process_groups=False,
        pg_collection=groups,
    )
    # Where no rank trains parameters besides experts' (or besides others), megatron-core puts an
    # optimizer of nothing in the place of theirs, and cannot save that.
    optimizer.chained_optimizers = [
        part
        for part in optimizer.chained_optimizers
        if not getattr(part, "is_stub_optimizer", False)
    ]
    return optimizer


def fill_states(optimizer: Any) -> None:
    """Give Adam the states that it makes at its first update, where it has none yet.

    A distributed optimizer cannot be saved or loaded into without. `torch_adam` does that for
    torch's Adam.
    """
    if USING_PYTORCH_OPTIMIZER:
        return
    for part in optimizer.chained_optimizers:
        if isinstance(part, DistributedOptimizer):
            part.init_state_fn(part.optimizer, part.config)
