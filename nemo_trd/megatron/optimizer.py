"""The student's optimizer."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from nemo_trd.config.schema import Config


def make_optimizer(config: Config, chunks: list[Any], groups: Any) -> Any:
    """Adam as `config.optimizer` says, for model chunks that are wrapped for data parallelism."""
    settings = config.optimizer
    bf16 = config.precision.dtype == "bf16"
    return get_megatron_optimizer(
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
