"""The all-to-all exchange of tokens between the ranks that share out the experts of a layer."""

from __future__ import annotations

from typing import Any

from nemo_trd.config.lengths import longest_answer, longest_contexts
from nemo_trd.config.schema import Config, Layout
from nemo_trd.models.dtypes import ELEMENT_BYTES
from nemo_trd.models.family import dense_layers, experts_of


def exchanged_bytes(config: Config, student: Any, teacher: Any) -> dict[str, float]:
    """Bytes that a GPU sends to others in a step for the experts of each model, by role.

    At mean lengths, and with tokens routed evenly. In every sparse layer each token goes to its
    experts and back, in the backward pass its gradients do.
    """
    mean, answer = config.cluster.assumptions.mean_length, longest_answer(config)
    lengths = [mean * (context + answer) for _, context in longest_contexts(config)]
    parallel = config.parallel
    passes = 3 if config.train.recompute == "full" else 2
    sent = {"student": passes * _one_pass(config, parallel.student, student, lengths[0])}
    if config.teacher.scoring == "megatron":
        sent["teacher"] = _one_pass(config, parallel.teacher, teacher, lengths[1])
    return sent


def exchange_seconds(config: Config, student: Any, teacher: Any) -> dict[str, float]:
    """Seconds a step of this exchange by role, at peak bandwidth. Nothing is computed meanwhile."""
    return {
        role: sent / _bandwidth(config, getattr(config.parallel, role))
        for role, sent in exchanged_bytes(config, student, teacher).items()
    }


def _bandwidth(config: Config, layout: Layout) -> float:
    """Bytes a second between the ranks that hold the experts of a layer."""
    ranks = layout.expert_tensor_parallel_size * layout.expert_model_parallel_size
    assumptions = config.cluster.assumptions
    one_node = ranks <= config.cluster.gpus_per_node  # they are neighbours
    return (assumptions.nvlink_gb if one_node else assumptions.network_gb) * 1e9


def _one_pass(config: Config, layout: Layout, hf: Any, length: float) -> float:
    experts, ep = experts_of(hf), layout.expert_model_parallel_size
    if experts is None:
        return 0.0
    tokens = config.train.trajectories_per_step * length / config.cluster.world_size
    copies = tokens * experts.per_token * (hf.num_hidden_layers - dense_layers(hf)) * (ep - 1) / ep
    # Pipeline stages have a part of the layers each, and all of a replica's tokens.
    return 2 * copies * hf.hidden_size * ELEMENT_BYTES[config.precision.dtype]
