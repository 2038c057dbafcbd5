"""The supported model families, and what follows from a model's config.json alone.

A dense family that computes as Llama does, up to the switches of `Family`, takes one record in
`FAMILIES` and its name in tests/support/tiny_models.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from nemo_trd.config.schema import Layout

VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True)
class LayerNames:
    """Hugging Face names of the modules of a layer, below the name of the layer."""

    attention_norm: str = "input_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    attention_output: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"  # of a sparse layer, which has these three in each expert
    experts: str = "mlp.experts"
    expert_gate: str = "gate_proj"  # below f"{experts}.{E}"
    expert_up: str = "up_proj"
    expert_down: str = "down_proj"
    fused_gate_up: str = "gate_up_proj"  # below `experts`: of all experts, [E, 2 f, h]
    fused_down: str = "down_proj"  # likewise, [E, h, f]

    def expert(self, module: str, number: int) -> str:
        """Name of a module of an expert, below the name of the layer."""
        return f"{self.experts}.{number}.{module}"


@dataclass(frozen=True)
class Family:
    """The models of one `model_type` of Hugging Face: what differs from Llama, and names."""

    architecture: str  # class of transformers with the output layer
    qkv_bias: bool = False  # of the query, key and value projections
    # Keys of config.json that give the linear layers of attention or of the MLP a bias.
    optional_biases: tuple[str, ...] = ()
    qk_norm: bool = False  # RMSNorm over each head of queries and keys
    sparse: bool = False  # layers with a router and experts, of which config.json tells
    # transformers takes as many key-value heads as query heads where config.json tells of none.
    key_value_heads_optional: bool = False
    # Those whose frequencies do not depend on the length of a sequence.
    rope_types: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"  # output weight of a model that is not tied
    layers: str = "model.layers"  # layer N is below f"{layers}.{N}."
    layer: LayerNames = field(default_factory=LayerNames)

    def outer_parameters(self, tied: bool) -> dict[str, str]:
        """Megatron's parameters outside the layers -> the Hugging Face tensor in each.

        The last of several pipeline stages holds a tied embedding a second time, as output weight.
        """
        return {
            "embedding.word_embeddings.weight": self.embedding,
            "decoder.final_layernorm.weight": self.final_norm,
            "output_layer.weight": self.embedding if tied else self.head,
        }

    def layer_parameters(self) -> dict[str, tuple[str, ...]]:
        """Megatron's parameters below decoder.layers.N -> the Hugging Face tensors in each.

        Norms have two names: TransformerEngine's layers fuse them with the linear layer that
        follows, the local layers do not.
        """
        names = self.layer
        qkv = (names.query, names.key, names.value)
        weights = {
            "input_layernorm.weight": (names.attention_norm,),
            "self_attention.linear_qkv.layer_norm_weight": (names.attention_norm,),
            "self_attention.linear_qkv.weight": qkv,
            "self_attention.q_layernorm.weight": (names.query_norm,),
            "self_attention.k_layernorm.weight": (names.key_norm,),
            "self_attention.linear_proj.weight": (names.attention_output,),
            "pre_mlp_layernorm.weight": (names.mlp_norm,),
            "mlp.router.weight": (names.router,),
            "mlp.linear_fc1.layer_norm_weight": (names.mlp_norm,),
            "mlp.linear_fc1.weight": (names.gate, names.up),
            "mlp.linear_fc2.weight": (names.down,),
        }
        tensors = {
            parameter: tuple(f"{module}.weight" for module in modules)
            for parameter, modules in weights.items()
        }
        mlp = ("mlp.linear_fc1", "mlp.linear_fc2")
        for layer in ("self_attention.linear_qkv", "self_attention.linear_proj", *mlp):
            modules = weights[f"{layer}.weight"]
            tensors[f"{layer}.bias"] = tuple(f"{module}.bias" for module in modules)
        return tensors

    def expert_parameters(self, number: int) -> dict[str, tuple[str, ...]]:
        """Megatron's linear layers of an expert -> the Hugging Face tensors in each.

        Args:
            number: of the expert in its layer, over all ranks.
        """
        names = self.layer
        modules = {
            "linear_fc1": (names.expert_gate, names.expert_up),
            "linear_fc2": (names.expert_down,),
        }
        return {
            layer: tuple(f"{names.expert(module, number)}.weight" for module in below)
            for layer, below in modules.items()
        }


FAMILIES = {  # by model_type of config.json
    "llama": Family(
        "LlamaForCausalLM",
        key_value_heads_optional=True,
        optional_biases=("attention_bias", "mlp_bias"),
    ),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", qk_norm=True, sparse=True),
}


def family_of(hf: Any) -> Family:
    """Family of a model that `models.rules.check_supported` accepts."""
    return FAMILIES[hf.model_type]


def has_biases(hf: Any, key: str) -> bool:
    """Whether linear layers have biases because config.json says so under `key`.

    Args:
        key: "attention_bias" or "mlp_bias".
    """
    return key in family_of(hf).optional_biases and bool(getattr(hf, key, False))


@dataclass(frozen=True)
class Experts:
    """The experts of each sparse layer of a model.

    count: experts of a layer.
    per_token: how many of them compute a token.
    width: intermediate size of one.
    normalized: whether the weights of a token's experts are divided by their sum.
    """

    count: int
    per_token: int
    width: int
    normalized: bool


def experts_of(hf: Any) -> Experts | None:
    """Experts of a model's sparse layers; None of a dense model.

    transformers 5 writes `num_local_experts`; 4 and the published files have `num_experts`.
    """
    if not family_of(hf).sparse:
        return None
    count = getattr(hf, "num_experts", None) or hf.num_local_experts
    return Experts(count, hf.num_experts_per_tok, hf.moe_intermediate_size, bool(hf.norm_topk_prob))


def is_sparse(hf: Any, layer: int) -> bool:
    """Whether layer number `layer`, from 0, has experts; else it is dense."""
    if not family_of(hf).sparse or layer in (getattr(hf, "mlp_only_layers", None) or []):
        return False
    return (layer + 1) % (getattr(hf, "decoder_sparse_step", None) or 1) == 0


def dense_layers(hf: Any) -> int:
    """Number of layers without experts."""
    return sum(not is_sparse(hf, layer) for layer in range(hf.num_hidden_layers))


@dataclass(frozen=True)
class WeightTensor:
    """A tensor of a Hugging Face model, and how Megatron shares it out."""

    shape: tuple[int, ...]
    # Of tensor parallelism, and of an expert's tensors that of experts. None: ranks hold the whole.
    split_axis: int | None = None
    layer: int | None = None  # None: outside the layers
    expert: int | None = None  # whose it is, in its layer; None: every rank of the stage has it
    # Of an adapter: it has the matrices of all experts of its layer, and a rank its experts' ones.
    of_experts: bool = False

    @property
    def is_linear(self) -> bool:
        """Whether it is the weight of a linear layer; a router is none."""
        return len(self.shape) == 2 and self.split_axis is not None


def expected_tensors(hf: Any) -> dict[str, WeightTensor]:
    """Every tensor that a model of this configuration needs, by Hugging Face name.

    `hf` is the `PretrainedConfig` of a supported model, or has its attributes. The output weight
    of a tied model is not among them.
    """
    family, tensors = family_of(hf), outer_tensors(hf)
    of_kinds = {sparse: layer_tensors(hf, sparse=sparse) for sparse in {False, family.sparse}}
    for index in range(hf.num_hidden_layers):
        for name, tensor in of_kinds[is_sparse(hf, index)].items():
            tensors[f"{family.layers}.{index}.{name}"] = replace(tensor, layer=index)
    return tensors


def outer_tensors(hf: Any) -> dict[str, WeightTensor]:
    """Those of them outside the layers."""
    family, hidden = family_of(hf), hf.hidden_size
    tensors = {
        family.embedding: WeightTensor((hf.vocab_size, hidden), split_axis=0),
        family.final_norm: WeightTensor((hidden,)),
    }
    if not hf.tie_word_embeddings:
        tensors[family.head] = WeightTensor((hf.vocab_size, hidden), split_axis=0)
    return tensors


def layer_tensors(hf: Any, *, sparse: bool) -> dict[str, WeightTensor]:
    """Those of a layer, by name below it.

    Args:
        sparse: whether the layer has experts.
    """
    family = family_of(hf)
    return _attention_tensors(hf, family) | (
        _sparse_tensors(hf, family) if sparse else _dense_tensors(hf, family)
    )


def fused_tensors(hf: Any) -> dict[str, tuple[tuple[int, ...], tuple[tuple[str, int], ...]]]:
    """Tensors of all experts of a layer in one, as transformers may write them, by name.

    Of each its shape [E, rows, columns], and the modules whose rows lie in it, one behind the
    other, with their number of rows.
    """
    experts, family, hidden = experts_of(hf), family_of(hf), hf.hidden_size
    if experts is None:
        return {}
    names, width = family.layer, experts.width
    parts = {
        names.fused_gate_up: (((names.expert_gate, width), (names.expert_up, width)), hidden),
        names.fused_down: (((names.expert_down, hidden),), width),
    }
    return {
        f"{family.layers}.{layer}.{names.experts}.{name}": (
            (experts.count, sum(rows for _, rows in modules), columns),
            modules,
        )
        for layer in range(hf.num_hidden_layers)
        if is_sparse(hf, layer)
        for name, (modules, columns) in parts.items()
    }


def _attention_tensors(hf: Any, family: Family) -> dict[str, WeightTensor]:
    """Of attention and norms, by name below the layer."""
    names, hidden, head = family.layer, hf.hidden_size, head_dim(hf)
    queries, keys = hf.num_attention_heads * head, hf.num_key_value_heads * head
    norms = {names.attention_norm: hidden, names.mlp_norm: hidden}
    if family.qk_norm:
        norms |= {names.query_norm: head, names.key_norm: head}
    tensors = {f"{name}.weight": WeightTensor((size,)) for name, size in norms.items()}
    biased = has_biases(hf, "attention_bias")
    for name, rows in ((names.query, queries), (names.key, keys), (names.value, keys)):
        tensors[f"{name}.weight"] = WeightTensor((rows, hidden), 0)
        if family.qkv_bias or biased:
            tensors[f"{name}.bias"] = WeightTensor((rows,), 0)
    tensors[f"{names.attention_output}.weight"] = WeightTensor((hidden, queries), 1)
    if biased:
        tensors[f"{names.attention_output}.bias"] = WeightTensor((hidden,))
    return tensors


def _dense_tensors(hf: Any, family: Family) -> dict[str, WeightTensor]:
    """Of the feed-forward part of a dense layer, by name below the layer."""
    names, hidden, ffn = family.layer, hf.hidden_size, hf.intermediate_size
    tensors = {
        f"{names.gate}.weight": WeightTensor((ffn, hidden), 0),
        f"{names.up}.weight": WeightTensor((ffn, hidden), 0),
        f"{names.down}.weight": WeightTensor((hidden, ffn), 1),
    }
    if has_biases(hf, "mlp_bias"):
        tensors |= {f"{name}.bias": WeightTensor((ffn,), 0) for name in (names.gate, names.up)}
        tensors[f"{names.down}.bias"] = WeightTensor((hidden,))
    return tensors


def _sparse_tensors(hf: Any, family: Family) -> dict[str, WeightTensor]:
    """Of the router and the experts of a sparse layer, by name below the layer."""
    names, hidden, experts = family.layer, hf.hidden_size, experts_of(hf)
    if experts is None:
        return {}
    tensors = {f"{names.router}.weight": WeightTensor((experts.count, hidden))}
    for number in range(experts.count):
        for module, shape, axis in (
            (names.expert_gate, (experts.width, hidden), 0),
            (names.expert_up, (experts.width, hidden), 0),
            (names.expert_down, (hidden, experts.width), 1),
        ):
            name = f"{names.expert(module, number)}.weight"
            tensors[name] = WeightTensor(shape, axis, expert=number)
    return tensors


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
    """Width of one attention head."""
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the embedding and the output weight over all tensor parallel ranks together."""
    multiple = VOCABULARY_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple


def fp8_multiple(recipe: str) -> int:
    """Number of which every dimension of a matrix in FP8 must be a multiple.

    cuBLASLt wants 16 bytes along the dimension that is summed over, and in training that is each
    dimension in turn. Blocks of mxfp8 are 32 long.
    """
    return 32 if recipe == "mxfp8" else 16


@dataclass(frozen=True)
class PackAlignment:
    """Numbers of tokens of which lengths must be multiples."""

    segment: int = 1  # of each sequence in a pack
    pack: int = 1  # of all together; a multiple of `segment`


UNALIGNED = PackAlignment()


def pack_alignment(layout: Layout, fp8: str | None, recipe: str) -> PackAlignment:
    """Alignment of what a model in this layout computes.

    Context parallelism cuts each sequence into two parts a rank. Sequence parallelism splits a
    rank's part of the pack over tensor parallel ranks, and FP8 multiplies what a rank then has.

    Args:
        fp8: format of this model, or None.
        recipe: `precision.fp8_recipe`.
    """
    cp = layout.context_parallel_size
    segment = 2 * cp if cp > 1 else 1
    of_a_rank = 1 if fp8 is None else fp8_multiple(recipe)
    if layout.sequence_parallel:
        of_a_rank *= layout.tensor_model_parallel_size
    return PackAlignment(segment, math.lcm(segment, cp * of_a_rank))


def shared_vocab_size(student_hf: Any, teacher_hf: Any) -> int:
    """Number of token ids for which both models have a column.

    Families pad their output layer differently (Qwen: 151,936 or 152,064 columns for the same
    ids).
    """
    return min(student_hf.vocab_size, teacher_hf.vocab_size)
