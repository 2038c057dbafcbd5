"""Lets megatron-core's distributed optimizer save and load the states of torch's Adam.

Without Apex and TransformerEngine megatron-core takes torch's Adam, with CUDA as without. It keeps
`step` as a tensor in the state of each parameter; theirs keep it as a number in the parameter
group, and the distributed optimizer expects that.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_installed = False


def install() -> None:
    """Patch the distributed optimizer, once, where megatron-core takes torch's Adam."""
    global _installed
    if _installed or not USING_PYTORCH_OPTIMIZER:
        return
    _installed = True
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states
    load = DistributedOptimizer.load_state_dict
    sharded = DistributedOptimizer.sharded_state_dict
    state_dict = DistributedOptimizer.state_dict

    def set_states_except_step(self: Any, model_param: Any, tensors: Any) -> None:
        # The checkpoint holds one shard of each state; `step` is not among them.
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        step = state.pop("step", None)
        set_states(self, model_param, tensors)
        if step is not None:
            state["step"] = step

    def load_own_steps(self: Any, *args: Any, **kwargs: Any) -> None:
        # Loading gives all parameters the same `step` tensor, and Adam would then add one to it
        # for every parameter.
        load(self, *args, **kwargs)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    def sharded_with_states(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Before its first step Adam has no state, and there is nothing to load into.
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                if not self.optimizer.state[param]:
                    self.optimizer.state[param] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(param),
                        "exp_avg_sq": torch.zeros_like(param),
                    }
        return sharded(self, *args, **kwargs)

    def state_dict_of_none(self: Any) -> Any:
        # Theirs looks for the one `step` of all parameters, where a rank may have no parameter.
        if any(group["params"] for group in self.optimizer.param_groups):
            return state_dict(self)
        groups = self.optimizer.state_dict()["param_groups"]
        kept = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        return {"optimizer": {"param_groups": [{**group, "step": 0.0} for group in kept]}}

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_except_step
    DistributedOptimizer.load_state_dict = load_own_steps
    DistributedOptimizer.sharded_state_dict = sharded_with_states
    DistributedOptimizer.state_dict = state_dict_of_none
