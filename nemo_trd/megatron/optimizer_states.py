"""Loads Adam's states from a checkpoint, whichever of megatron-core's optimizers wrote them.

    states of an optimizer          distributed             of bf16             of fp32
    means and variances             optimizer.state.exp_avg.NAME, exp_avg_sq.NAME: all three
    parameter NAME in fp32          optimizer.state.param.  optimizer.state.    (the model's own,
                                    NAME                    fp32_param.NAME     which is NAME)
    number of updates               in parameter groups     state.common_step (torch's Adam), or
                                                            in parameter groups

Learning rate, betas and the like are there too and are not read: those of the run hold.
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


def load_optimizer(optimizer: Any, state_dict: dict[str, Any], checkpoint: Path) -> None:
    """Give an optimizer the states and the number of updates of a checkpoint. Collective.

    Args:
        optimizer: result of `get_megatron_optimizer`, for a model that has its weights from the
            checkpoint already. Its settings stay as they are.
        state_dict: its `sharded_state_dict(is_loading=True)`.
    """
    # A pipeline stage may train nothing besides experts, or no expert.
    parts = [part for part in optimizer.chained_optimizers if part.get_parameters()]
    saved_tensors = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    if not any(name.startswith(_MEAN) for name in saved_tensors):  # saved before the first update
        for part in parts:
            part.optimizer.state.clear()
        optimizer.reload_model_params()
        return
    for tensor in nested_values(state_dict):
        if isinstance(tensor, ShardedBase):
            tensor.key = _saved_name(tensor.key, saved_tensors)
    # Under a key of its own, or the checkpoint's "optimizer" would be mixed in.
    loaded = dist_checkpointing.load({"own": state_dict}, str(checkpoint))
    updates, states = _updates(loaded["optimizer"]), loaded["own"]
    several = len(optimizer.chained_optimizers) > 1
    for number, part in enumerate(optimizer.chained_optimizers):
        if part in parts:
            trees: list[Any] = [state_dict, states]
            asked, own = (tree[number] if several else tree for tree in trees)
            _load_part(part, asked, own, updates)


def _load_part(
    optimizer: Any, state_dict: dict[str, Any], states: dict[str, Any], updates: int
) -> None:
    """Give one of the optimizers that update the parameters together its loaded states.

    Args:
        state_dict: what was asked for, of this optimizer.
        updates: number of them behind the states.
    """
    torch_optimizer = optimizer.optimizer
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    if "param_state" in state_dict or not isinstance(torch_optimizer, torch.optim.Adam):
        groups = [{**group, "step": updates} for group in groups]
    if "param_state" in state_dict:
        states["optimizer"] = {"param_groups": groups}
        states["param_state_sharding_type"] = state_dict["param_state_sharding_type"]
    else:
        adam = states.get("optimizer", states)
        pairs = zip(groups, adam["param_groups"], strict=True)
        adam["param_groups"] = [
            {**group, "params": group_state["params"]} for group, group_state in pairs
        ]
        if isinstance(torch_optimizer, torch.optim.Adam):
            adam["state"]["common_step"] = torch.tensor(float(updates))
    optimizer.load_state_dict(states)


def _saved_name(name: str, saved_tensors: Container[str]) -> str:
    """Name of a tensor in the checkpoint: a parameter in fp32 has one of three."""
    for prefix in _MAIN_PARAM:
        if name.startswith(prefix):
            parameter = name.removeprefix(prefix)
            names = [name, *(main + parameter for main in _MAIN_PARAM), parameter]
            return next((other for other in names if other in saved_tensors), name)
    return name


def _updates(saved: dict[str, Any]) -> int:
    """Number of updates behind the states in a checkpoint, of one optimizer or of several."""
    if not {"optimizer", "param_groups"} & saved.keys():
        return max(_updates(part) for part in saved.values() if part)
    adam = saved.get("optimizer", saved)
    if "common_step" in adam.get("state", {}):
        return int(adam["state"]["common_step"])
    return int(max(group.get("step") or 0 for group in adam["param_groups"]))
