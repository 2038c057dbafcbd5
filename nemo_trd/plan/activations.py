"""Bytes of activations, from shapes and layouts.

Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", with terms
for grouped queries, gated MLPs and fused attention.
"""

from __future__ import annotations

from typing import Any

from nemo_trd.config.schema import Adapter, Layout
from nemo_trd.models.family import dense_layers, experts_of, family_of, head_dim
from nemo_trd.models.peft import adapted_experts, adapted_modules


def layer_activation_bytes(
    hf: Any,
    tokens: int,
    length: int,
    layout: Layout,
    element: int,
    *,
    sparse: bool = False,
    gated: bool = True,
    dropout: bool = False,
    fused_attention: bool = True,
    recompute: str = "none",
) -> int:
    """Bytes that one layer keeps for its backward pass, on one tensor parallel rank.

    With gated=False, dropout=True, fused_attention=False, equal numbers of heads and a MLP of
    4 h this is Korthikanti et al.'s s b h (34 + 5 a s / h), their equation 2, and with tensor and
    sequence parallelism equation 4, but for the norms' statistics. "selective" drops what grows
    with the square of the length, "full" all but the layer's input. Fused attention never stores
    scores: then "selective" saves next to nothing, and what it keeps of V is a view of Q, K and V.
    Context parallel ranks divide the tokens. A layer with experts keeps of each token what its
    experts get and compute; every rank is taken to get as many tokens as it sends.

    Args:
        tokens: number of tokens of the micro-batch, s b.
        length: number of tokens of one sequence, s.
        element: bytes of one activation.
        sparse: whether the layer has experts.
    """
    tp = layout.tensor_model_parallel_size
    outside = tp if layout.sequence_parallel else 1
    tokens = own_tokens(tokens, layout)
    hidden = hf.hidden_size
    if recompute == "full":
        return tokens * hidden * element // outside
    heads, head = hf.num_attention_heads, head_dim(hf)
    queries, keys = heads * head, hf.num_key_value_heads * head
    # Inputs of both norms, of QKV and of the MLP; norms' statistics; the masks of two dropouts.
    replicated = 4 * hidden * element + 2 * 4 + (2 * hidden if dropout else 0)
    split = (queries + 2 * keys) * element  # Q, K, V
    split += queries * element  # the output projection's input
    if family_of(hf).qk_norm:
        split += (queries + keys) * element  # inputs of the norms of Q and K
        split += 4 * (heads + hf.num_key_value_heads)  # their statistics
    if fused_attention:
        # Log-sum-exp of the scores, or Q and K before their rotation, behind the view.
        split += (queries + keys) * element if recompute == "selective" else 4 * heads
    elif recompute == "none":
        scores = heads * length
        split += scores * element + (scores * (element + 1) if dropout else 0)
    if sparse:
        replicated += _routed(hf, layout, element)
    else:
        split += hf.intermediate_size * element * (3 if gated else 2)
    return tokens * replicated // outside + tokens * split // tp


def adapter_activation_bytes(
    hf: Any, layer: int, tokens: int, layout: Layout, element: int, adapter: Adapter
) -> int:
    """Bytes that a layer's adapter keeps for its backward pass, on one tensor parallel rank.

    They are beside the layer's own. For each target A x, of all tokens where B is split, and a copy
    of A: those of targets with the same input are joined. With dropout, instead of the copy, what
    is left of x, and which part that is. On experts A x of what their ranks get.
    """
    tp = layout.tensor_model_parallel_size
    whole = own_tokens(tokens, layout)
    part = whole // tp if layout.sequence_parallel else whole
    kept = 0
    for weight in adapted_modules(hf, adapter).values():
        if weight.layer != layer:
            continue
        if weight.split_axis == 1:  # over its inputs
            inputs, seen, reduced = weight.shape[1] // tp, whole, part
        else:
            inputs, seen, reduced = weight.shape[1], part, whole
        kept += adapter.rank * reduced + inputs * (2 * seen if adapter.dropout else adapter.rank)
    if experts := experts_of(hf):
        routed = part * experts.per_token * layout.expert_tensor_parallel_size
        on_experts = (f for f in adapted_experts(hf, adapter).values() if f.layer == layer)
        kept += sum(adapter.rank * routed for _ in on_experts)
    return kept * element


def _routed(hf: Any, layout: Layout, element: int) -> int:
    """Bytes of a token in its experts: what they get, gate, up, their product; the router's.

    Ranks that split an expert all get its tokens, and compute a part of its width.
    """
    experts = experts_of(hf)
    assert experts is not None
    chosen, gathered = experts.per_token, layout.expert_tensor_parallel_size
    in_experts = (gathered * hf.hidden_size + 3 * experts.width) * element + 4 * gathered
    softmax = 4 * (chosen if experts.normalized else experts.count)
    # Which are chosen is told three times, once by a number for every expert (megatron-core 0.19;
    # 0.16 keeps 5 bytes there).
    router = softmax + 8 * experts.count + 16 * chosen
    return chosen * in_experts + router


def working_set_bytes(hf: Any, tokens: int, layout: Layout, element: int) -> int:
    """Bytes of a layer at work that are not kept: gathered input, output, MLP.

    With context parallelism also keys and values of the whole micro-batch, and the attention's
    output against each other rank's part of them: TransformerEngine holds all until its ring is
    closed (AttnFuncWithCPAndKVP2P).
    """
    tp, cp = layout.tensor_model_parallel_size, layout.context_parallel_size
    own = own_tokens(tokens, layout)
    mlp = [0]
    if dense_layers(hf):
        mlp.append(own * (3 * hf.intermediate_size // tp))
    if experts := experts_of(hf):
        # Tokens in the order of experts, before and after the exchange; gate, up and product.
        routed = own // (tp if layout.sequence_parallel else 1) * experts.per_token
        mlp.append(routed * (2 * hf.hidden_size + 3 * experts.width))
    working = (own * 2 * hf.hidden_size + max(mlp)) * element
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
