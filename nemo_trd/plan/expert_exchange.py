"""Exchange of tokens between the ranks that share out the experts of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_trd.config.lengths import longest_answer, longest_contexts
from nemo_trd.config.schema import Config, Layout
from nemo_trd.models.dtypes import ELEMENT_BYTES
from nemo_trd.models.family import dense_layers, experts_of


@dataclass(frozen=True)
class ExpertExchange:
    """What a GPU sends to others' experts in a step, and back; nothing is computed meanwhile."""

    bytes: float
    seconds: float


def expert_exchanges(config: Config, student: Any, teacher: Any) -> dict[str, ExpertExchange]:
    """Exchange of expert parallel ranks by role, at mean lengths and peak bandwidth.

    Experts are taken to be drawn alike. See `sent_bytes`.
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
    element = ELEMENT_BYTES[config.precision.dtype]
    moved = config.train.trajectories_per_step * tokens * sent_bytes(hf, layout, element) / world
    return ExpertExchange(moved, moved / bandwidth)


def sent_bytes(hf: Any, layout: Layout, element: int) -> float:
    """Bytes of a token that go to other ranks in a forward pass, or of its gradient in a backward.

    In each sparse layer its states, and its weight in fp32, go to each of its experts, and results
    come back. Of EP ranks one is its own. Ranks that split an expert gather its tokens, and add up
    their results in fp32, as the weights are.

    Args:
        element: bytes of one activation.
    """
    experts = experts_of(hf)
    if experts is None:
        return 0.0
    ep, etp = layout.expert_model_parallel_size, layout.expert_tensor_parallel_size
    there = element * hf.hidden_size + 4
    shared_out = (ep - 1) / ep * (there + element * hf.hidden_size)
    split = (etp - 1) * (there + 4 * hf.hidden_size)
    sparse = hf.num_hidden_layers - dense_layers(hf)
    return sparse * experts.per_token * (shared_out + split)
