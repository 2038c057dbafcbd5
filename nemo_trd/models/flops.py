"""FLOPs of a forward pass; multiplications and additions count one each."""

from __future__ import annotations

from typing import Any

from nemo_trd.models.family import dense_layers, experts_of, head_dim


def layer_flops(hf: Any, attended: float, *, gated: bool = True) -> float:
    """FLOPs of one token's forward pass through one layer, with `attended` keys for its query.

    In a model with experts, of its layers on average.
    """
    queries = hf.num_attention_heads * head_dim(hf)
    keys = hf.num_key_value_heads * head_dim(hf)
    matrices = hf.hidden_size * (2 * queries + 2 * keys)
    matrices += hf.hidden_size * active_width(hf) * (3 if gated else 2)
    if (experts := experts_of(hf)) is not None:
        sparse = hf.num_hidden_layers - dense_layers(hf)
        matrices += hf.hidden_size * experts.count * sparse / hf.num_hidden_layers  # the router
    return 2 * matrices + 4 * queries * attended


def active_width(hf: Any) -> float:
    """Intermediate size that a token meets in a layer, over its experts; on average of layers."""
    experts = experts_of(hf)
    if experts is None:
        return hf.intermediate_size
    layers, dense = hf.num_hidden_layers, dense_layers(hf)
    sparse = (layers - dense) * experts.per_token * experts.width
    return (dense * hf.intermediate_size + sparse) / layers


def forward_flops(
    hf: Any, tokens: float, attended: float, logits: float, *, gated: bool = True
) -> float:
    """FLOPs of `tokens` through all layers, and of the output layer at `logits` positions.

    Three times this is a training step. For a GPT with a MLP of 4 h it is the published
    24 B s l h^2 (1 + s / 6h + V / 12h l) when every token attends to all s (Narayanan et al.
    2021, "Efficient Large-Scale Language Model Training on GPU Clusters", appendix); under a
    causal mask a token attends to (s + 1) / 2 on average.
    """
    layers = tokens * hf.num_hidden_layers * layer_flops(hf, attended, gated=gated)
    return layers + logits * 2 * hf.hidden_size * hf.vocab_size
