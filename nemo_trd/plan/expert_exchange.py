"""Exchange of tokens between the ranks that share out the experts of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_trd.config.lengths import longest_answer, longest_contexts
from nemo_trd.config.schema import Config, Layout
from nemo_trd.models.family import dense_layers, experts_of


@dataclass(frozen=True)
class ExpertExchange:
    """What a GPU sends to others' experts in a step, and back; nothing is computed meanwhile."""

    bytes: float
    seconds: float


def expert_exchanges(config: Config, student: Any, teacher: Any) -> dict[str, ExpertExchange]:
    """Exchange of expert parallel ranks by role, at mean lengths and peak bandwidth.

    Each token goes to its experts' ranks and its results come back, in bf16, in a forward pass and
    likewise in a backward pass. Experts are taken to be drawn alike: of EP ranks one is its own.
    """
    mean, answer = config.cluster.assumptions.mean_length, longest_answer(config)
    lengths = [mean * (context + answer) for _, context in longest_contexts(config)]
    passes = 3 if config.train.recompute == "full" else 2
    parallel = config.parallel
    result = {"student": _exchange(config, parallel.student, student, passes * lengths[0])}
    if config.teacher.scoring == "megatron":
        result["teacher"] = _exchange(config, parallel.teacher, teacher, lengths[1])
    return result


def _exchange(config: Config, layout: Layout, hf: Any, tokens: float) -> ExpertExchange:
    experts = experts_of(hf)
    if experts is None:
        return ExpertExchange(0.0, 0.0)
    ep, etp = layout.expert_model_parallel_size, layout.expert_tensor_parallel_size
    world, assumptions = config.cluster.world_size, config.cluster.assumptions
    one_node = ep * etp <= config.cluster.gpus_per_node
    bandwidth = (assumptions.nvlink_gb if one_node else assumptions.network_gb) * 1e9
    copies = experts.per_token * ((ep - 1) / ep + etp - 1)  # of a token that go to other ranks
    sparse = hf.num_hidden_layers - dense_layers(hf)
    of_a_token = sparse * copies * hf.hidden_size * 2 * 2  # there and back, bf16
    moved = config.train.trajectories_per_step * tokens * of_a_token / world
    return ExpertExchange(moved, moved / bandwidth)
