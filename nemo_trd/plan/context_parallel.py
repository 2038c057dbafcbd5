"""Exchange of keys and values between context parallel ranks, and what attention hides of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_trd.config.lengths import longest_answer, longest_contexts
from nemo_trd.config.schema import Config, Layout
from nemo_trd.models.family import head_dim
from nemo_trd.plan.shapes import key_value_bytes


@dataclass(frozen=True)
class Ring:
    """Seconds a step in which a GPU passes keys and values on, and attends to them meanwhile."""

    exchange: float
    attention: float

    @property
    def waiting(self) -> float:
        """Seconds of the exchange that attention does not hide."""
        return max(0.0, self.exchange - self.attention)


def rings(config: Config, student: Any, teacher: Any, rate: float) -> dict[str, Ring]:
    """Exchange of context parallel ranks by role, at mean lengths and peak bandwidth.

    Each rank's keys and values go around: to all CP - 1 others in a forward pass, and in a backward
    pass once more, with their gradients behind them (TransformerEngine's AttnFuncWithCPAndKVP2P).
    Attention is in bf16, its backward pass twice its forward pass.

    Args:
        rate: FLOP/s of one GPU in bf16.
    """
    mean, answer = config.cluster.assumptions.mean_length, longest_answer(config)
    lengths = [mean * (context + answer) for _, context in longest_contexts(config)]
    parallel = config.parallel
    passes = 4 if config.train.recompute == "full" else 3  # each the work of a forward pass
    result = {"student": _ring(config, parallel.student, student, lengths[0], passes, rate)}
    if config.teacher.scoring == "megatron":
        result["teacher"] = _ring(config, parallel.teacher, teacher, lengths[1], 1, rate)
    return result


def _ring(config: Config, layout: Layout, hf: Any, length: float, passes: int, rate: float) -> Ring:
    cp, tp = layout.context_parallel_size, layout.tensor_model_parallel_size
    if cp == 1:
        return Ring(0.0, 0.0)
    world, assumptions = config.cluster.world_size, config.cluster.assumptions
    one_node = tp * cp <= config.cluster.gpus_per_node  # ranks of both are neighbours
    bandwidth = (assumptions.nvlink_gb if one_node else assumptions.network_gb) * 1e9
    # Of all GPUs together: tensor parallel ranks divide a token's keys and values.
    tokens = config.train.trajectories_per_step * length * passes
    moved = tokens * key_value_bytes(hf) * (cp - 1)
    queries = hf.num_attention_heads * head_dim(hf)
    attended = tokens * hf.num_hidden_layers * 4 * queries * (length + 1) / 2
    return Ring(moved / (world * bandwidth), attended / (world * rate))
