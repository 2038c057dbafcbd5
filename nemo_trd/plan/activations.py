"""Bytes of activations, from shapes and layouts.

Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", with terms
for grouped queries, gated MLPs and fused attention.
"""

from __future__ import annotations

from typing import Any

from nemo_trd.config.schema import Layout
from nemo_trd.models.family import dense_layers, experts_of, family_of, head_dim


def layer_activation_bytes(
    hf: Any,
    tokens: int,
    length: int,
    layout: Layout,
    element: int,
    *,
    gated: bool = True,
    dropout: bool = False,
    fused_attention: bool = True,
    recompute: str = "none",
) -> int:
    """Bytes that one layer keeps for its backward pass, on one tensor parallel rank.

    With gated=False, dropout=True, fused_attention=False, equal numbers of heads and a MLP of
    4 h this is Korthikanti et al.'s s b h (34 + 5 a s / h), their equation 2, and with tensor and
    sequence parallelism equation 4. "selective" drops what grows with the square of the length,
    "full" all but the layer's input; fused attention never stores scores. Context parallel ranks
    divide the tokens. In a model with experts it is the mean of all layers, and every expert has
    equally many tokens: a rank has more where routing is uneven.

    Args:
        tokens: number of tokens of the micro-batch, s b.
        length: number of tokens of one sequence, s.
        element: bytes of one activation.
    """
    tp = layout.tensor_model_parallel_size
    outside = tp if layout.sequence_parallel else 1
    tokens = own_tokens(tokens, layout)
    hidden = hf.hidden_size
    if recompute == "full":
        return tokens * hidden * element // outside
    heads, head = hf.num_attention_heads, head_dim(hf)
    queries, keys = heads * head, hf.num_key_value_heads * head
    # Inputs of both norms, of QKV and of the MLP; where there is dropout, its two masks.
    replicated = 4 * hidden * element + (2 * hidden if dropout else 0)
    split = (queries + 2 * keys) * element  # Q, K, V
    split += queries * element  # the output projection's input
    if family_of(hf).qk_norm:
        split += (queries + keys) * element  # inputs of the norms of Q and K
    if fused_attention:
        split += 4 * heads  # log-sum-exp of the scores
    elif recompute == "none":
        scores = heads * length
        split += scores * element + (scores * (element + 1) if dropout else 0)
    dense = dense_layers(hf) / hf.num_hidden_layers
    split += round(dense * hf.intermediate_size * element * (3 if gated else 2))
    routed = round((1 - dense) * tokens / outside * routed_bytes(hf, layout, element))
    return tokens * replicated // outside + tokens * split // tp + routed


def routed_bytes(hf: Any, layout: Layout, element: int) -> int:
    """Bytes that a sparse layer keeps of one token: what its experts compute, and its scores.

    Of each expert the input, which every rank that splits it has whole, and this rank's part of
    what lies inside. The scores are in fp32, before and behind the softmax.
    """
    experts = experts_of(hf)
    if experts is None:
        return 0
    copies = hf.hidden_size * layout.expert_tensor_parallel_size
    return experts.per_token * (copies + 3 * experts.width) * element + 8 * experts.count


def working_set_bytes(hf: Any, tokens: int, layout: Layout, element: int) -> int:
    """Bytes of a layer at work that are not kept: gathered input, output, MLP.

    With context parallelism also keys and values of the whole micro-batch, and the attention's
    output against each other rank's part of them: TransformerEngine holds all until its ring is
    closed (AttnFuncWithCPAndKVP2P).
    """
    tp, cp = layout.tensor_model_parallel_size, layout.context_parallel_size
    own = own_tokens(tokens, layout)
    working = own * 2 * hf.hidden_size * element
    outside = tp if layout.sequence_parallel else 1
    # Of experts also the outputs, on their way back.
    sparse = own // outside * routed_bytes(hf, layout, element) * 2
    dense = own * 3 * hf.intermediate_size // tp * element if dense_layers(hf) else 0
    working += max(dense, sparse)
    if cp > 1:
        heads = 2 * hf.num_key_value_heads + hf.num_attention_heads
        working += cp * own * heads * head_dim(hf) // tp * element
    return working


def own_tokens(tokens: int, layout: Layout) -> int:
    """Tokens that one context parallel rank holds of a micro-batch of `tokens`."""
    return -(-tokens // layout.context_parallel_size)


def micro_batches_in_flight(layout: Layout, stage: int) -> float:
    """Number of micro-batches whose activations a stage holds at one time.

    In units of all its layers, so that virtual stages make it a fraction. Narayanan et al. 2021,
    "Efficient Large-Scale Language Model Training on GPU Clusters", section 2.2.
    """
    pp = layout.pipeline_model_parallel_size
    virtual = layout.virtual_pipeline_model_parallel_size
    if virtual is None:
        return pp - stage
    warm_up = 2 * (pp - stage - 1) + (virtual - 1) * pp
    return (warm_up + 1) / virtual
