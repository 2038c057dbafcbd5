"""FLOPs of a forward pass; multiplications and additions count one each."""

from __future__ import annotations

from typing import Any

from nemo_trd.models.family import dense_layers, experts_of, head_dim


def layer_flops(hf: Any, attended: float, *, sparse: bool = False, gated: bool = True) -> float:
    """FLOPs of one token's forward pass through one layer, with `attended` keys for its query.

    Args:
        sparse: whether the layer has experts, of which a token passes through some.
    """
    queries = hf.num_attention_heads * head_dim(hf)
    keys = hf.num_key_value_heads * head_dim(hf)
    matrices = hf.hidden_size * (2 * queries + 2 * keys)
    if sparse:
        experts = experts_of(hf)
        assert experts is not None
        matrices += hf.hidden_size * (experts.count + 3 * experts.per_token * experts.width)
    else:
        matrices += hf.hidden_size * hf.intermediate_size * (3 if gated else 2)
    return 2 * matrices + 4 * queries * attended


def forward_flops(
    hf: Any, tokens: float, attended: float, logits: float, *, gated: bool = True
) -> float:
    """FLOPs of `tokens` through all layers, and of the output layer at `logits` positions.

    Three times this is a training step. For a GPT with a MLP of 4 h it is the published
    24 B s l h^2 (1 + s / 6h + V / 12h l) when every token attends to all s (Narayanan et al.
    2021, "Efficient Large-Scale Language Model Training on GPU Clusters", appendix); under a
    causal mask a token attends to (s + 1) / 2 on average.
    """
    dense = dense_layers(hf)
    layers = dense * layer_flops(hf, attended, gated=gated) if dense else 0.0
    if sparse := hf.num_hidden_layers - dense:
        layers += sparse * layer_flops(hf, attended, sparse=True)
    return tokens * layers + logits * 2 * hf.hidden_size * hf.vocab_size
