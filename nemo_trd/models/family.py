"""Facts of the supported model families."""

from __future__ import annotations

from typing import Any

from nemo_trd.config.schema import Layout

SUPPORTED_MODEL_TYPES = ("llama", "qwen2", "qwen3")


def expected_shapes(hf: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a model of this configuration needs.

    `hf` is the `PretrainedConfig` of a Llama, Qwen2 or Qwen3 model. The output weight of a tied
    model is not in it.
    """
    hidden, ffn, vocab = hf.hidden_size, hf.intermediate_size, hf.vocab_size
    head_dim = getattr(hf, "head_dim", None) or hidden // hf.num_attention_heads
    queries = hf.num_attention_heads * head_dim
    keys = hf.num_key_value_heads * head_dim
    all_biased = bool(getattr(hf, "attention_bias", False))
    qkv_biased = all_biased or hf.model_type == "qwen2"
    linear = {
        "self_attn.q_proj": ((queries, hidden), qkv_biased),
        "self_attn.k_proj": ((keys, hidden), qkv_biased),
        "self_attn.v_proj": ((keys, hidden), qkv_biased),
        "self_attn.o_proj": ((hidden, queries), all_biased),
        "mlp.gate_proj": ((ffn, hidden), bool(getattr(hf, "mlp_bias", False))),
        "mlp.up_proj": ((ffn, hidden), bool(getattr(hf, "mlp_bias", False))),
        "mlp.down_proj": ((hidden, ffn), bool(getattr(hf, "mlp_bias", False))),
    }
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if hf.model_type == "qwen3":
        layer |= {"self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,)}
    for name, (shape, biased) in linear.items():
        layer[f"{name}.weight"] = shape
        if biased:
            layer[f"{name}.bias"] = shape[:1]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not hf.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocab, hidden)
    for index in range(hf.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


VOCABULARY_MULTIPLE = 128


def rope_parameters(hf: Any) -> dict[str, Any]:
    """Rope settings as one dict with rope_type and rope_theta.

    transformers 5 keeps them in `rope_parameters`; 4 has `rope_theta` and `rope_scaling`.
    """
    parameters = dict(
        getattr(hf, "rope_parameters", None) or getattr(hf, "rope_scaling", None) or {}
    )
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    parameters.setdefault("rope_theta", getattr(hf, "rope_theta", 10000.0))
    return parameters


def head_dim(hf: Any) -> int:
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the embedding and the output weight over all tensor parallel ranks together."""
    multiple = VOCABULARY_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple


def sequence_alignment(layout: Layout, fp8: bool) -> int:
    """What the length of a sequence must be a multiple of."""
    alignment = 16 if fp8 else 1
    if layout.sequence_parallel:
        alignment *= layout.tensor_model_parallel_size
    if layout.context_parallel_size > 1:
        alignment *= 2 * layout.context_parallel_size
    return alignment


def shared_vocab_size(student_hf: Any, teacher_hf: Any) -> int:
    """For how many token ids both models have a column.

    Families pad their output layer differently (Qwen: 151,936 or 152,064 columns for the same
    ids).
    """
    return min(student_hf.vocab_size, teacher_hf.vocab_size)
