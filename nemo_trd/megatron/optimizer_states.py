"""Adam's states from a checkpoint, whichever of megatron-core's optimizers wrote them.

    what the optimizers write       distributed             of bf16             of fp32
    means and variances             optimizer.state.exp_avg.NAME, exp_avg_sq.NAME: all three
    parameter NAME in fp32          optimizer.state.param.  optimizer.state.    (the model's own,
                                    NAME                    fp32_param.NAME     which is NAME)
    number of updates               in parameter groups     state.common_step (torch's Adam), or
                                                            in parameter groups

Learning rate, betas and the like are in there too and are not read: those of the run hold.
"""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase

_MAIN_PARAM = ("optimizer.state.param.", "optimizer.state.fp32_param.")
_MEAN = "optimizer.state.exp_avg."


def load_optimizer(optimizer: Any, wanted: dict[str, Any], checkpoint: Path) -> None:
    """Give an optimizer the states and the number of updates of a checkpoint. Collective.

    Args:
        optimizer: what `get_megatron_optimizer` made, for a model that has its weights from the
            checkpoint already. Its settings stay as they are.
        wanted: its `sharded_state_dict(is_loading=True)`.
    """
    inner = optimizer.chained_optimizers[0].optimizer
    held = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    if not any(name.startswith(_MEAN) for name in held):  # saved before the first update
        inner.state.clear()
        optimizer.reload_model_params()
        return
    for tensor in nested_values(wanted):
        if isinstance(tensor, ShardedBase):
            tensor.key = _held_name(tensor.key, held)
    # Under a name of its own, or what the checkpoint holds under "optimizer" would be mixed in.
    loaded = dist_checkpointing.load({"wanted": wanted}, str(checkpoint))
    updates, states = _updates(loaded["optimizer"]), loaded["wanted"]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    if "param_state" in wanted or not isinstance(inner, torch.optim.Adam):
        groups = [{**group, "step": updates} for group in groups]
    if "param_state" in wanted:
        states["optimizer"] = {"param_groups": groups}
        states["param_state_sharding_type"] = wanted["param_state_sharding_type"]
    else:
        adam = states.get("optimizer", states)
        pairs = zip(groups, adam["param_groups"], strict=True)
        adam["param_groups"] = [{**group, "params": own["params"]} for group, own in pairs]
        if isinstance(inner, torch.optim.Adam):
            adam["state"]["common_step"] = torch.tensor(float(updates))
    optimizer.load_state_dict(states)


def _held_name(name: str, held: Container[str]) -> str:
    """What the checkpoint calls a tensor: a parameter in fp32 has one of three names."""
    for prefix in _MAIN_PARAM:
        if name.startswith(prefix):
            parameter = name.removeprefix(prefix)
            names = [name, *(other + parameter for other in _MAIN_PARAM), parameter]
            return next((known for known in names if known in held), name)
    return name


def _updates(saved: dict[str, Any]) -> int:
    """How many updates the states in a checkpoint have seen."""
    adam = saved.get("optimizer", saved)
    if "common_step" in adam.get("state", {}):
        return int(adam["state"]["common_step"])
    return int(max(group.get("step") or 0 for group in adam["param_groups"]))
