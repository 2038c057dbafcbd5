"""Learning rate of every update, by the settings."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from pydantic import ValidationError

from nemo_trd.config.schema import Config, Optimizer


def scheduler(settings: Optimizer, num_steps: int, optimizer: Any) -> OptimizerParamScheduler:
    """Scheduler to be advanced before each update.

    It plans num_steps + 1 updates, so that none has a learning rate of 0.
    """
    steps = num_steps + 1
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=min(round(settings.warmup_fraction * steps), steps - 1),
        lr_decay_steps=steps,
        lr_decay_style=settings.schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def scheduled_lr(settings: Optimizer, num_steps: int, update: int) -> float:
    """Learning rate of an update; the first one is number 1."""
    advanced = scheduler(settings, num_steps, SimpleNamespace(param_groups=[]))
    advanced.step(increment=update)
    return advanced.get_lr({})


def rate_change(record: Mapping[str, Any], config: Config, updates: int) -> str | None:
    """Line on how changed settings alter the next update's learning rate, None if they do not.

    Args:
        record: settings that the checkpoint was made with, as from `public_settings`.
        updates: number of updates before.
    """
    try:
        before = Optimizer.model_validate(record["optimizer"])
        planned = int(record["train"]["num_steps"])
    except (
        KeyError,
        TypeError,
        ValueError,
        ValidationError,
    ):  # written by a version with other settings
        return None
    if updates >= config.train.num_steps:
        return None
    is_lr = scheduled_lr(config.optimizer, config.train.num_steps, updates + 1)
    was = scheduled_lr(before, planned, updates + 1)
    if is_lr == was:
        return None
    last = f"update {updates} had {scheduled_lr(before, planned, updates):.4g}" if updates else ""
    if updates >= planned:
        return f"learning rate: {last}, the last one planned; update {updates + 1} has {is_lr:.4g}"
    ending = f"; {last}" if last else ""
    return f"learning rate of update {updates + 1}: {was:.4g} -> {is_lr:.4g}{ending}"
