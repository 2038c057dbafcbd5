"""From a Hugging Face config.json to Megatron models that return final hidden states.

The families of `models.family`. Settings of a config.json that these models cannot follow are
refused by `check_supported`, never ignored.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    LayerNormImpl,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nemo_trd.config.schema import Layout, Precision
from nemo_trd.megatron.attention import SegmentAttention
from nemo_trd.megatron.load_balancing import BalancedRouter, give_packs_to_routers
from nemo_trd.models.directory import check_model_type
from nemo_trd.models.dtypes import torch_dtype
from nemo_trd.models.family import (
    experts_of,
    family_of,
    has_biases,
    head_dim,
    is_sparse,
    padded_vocab_size,
    rope_parameters,
)
from nemo_trd.models.rules import check_layout, check_supported
from nemo_trd.preflight.machine import (
    check_transformer_engine,
    missing_for_transformer_engine,
)


def load_hf_config(path: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read and check config.json of a local Hugging Face directory.

    Raises:
        ConfigError: no readable config.json, or a model that `check_supported` refuses.
    """
    check_model_type(Path(path), "path")
    hf = AutoConfig.from_pretrained(
        path, trust_remote_code=trust_remote_code, local_files_only=True
    )
    check_supported(hf)
    return hf


def rotation_of(hf: PretrainedConfig) -> tuple[torch.Tensor, float]:
    """Rope's inverse frequencies, fp32 [head_dim / 2], and the factor of rotated queries and keys.

    Exactly as transformers has them. The factor is 1 but for YaRN (Peng et al. 2023,
    arXiv 2309.00071, section 3.4).
    """
    rope = rope_parameters(hf)
    if rope["rope_type"] != "default":
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](hf, device=None)
        return frequencies.float(), factor
    exponents = torch.arange(0, head_dim(hf), 2, dtype=torch.float32) / head_dim(hf)
    return 1.0 / (rope["rope_theta"] ** exponents), 1.0


def has_transformer_engine() -> bool:
    """Whether models are built from TransformerEngine's layers."""
    return not missing_for_transformer_engine()


def transformer_config(
    hf: PretrainedConfig,
    layout: Layout,
    precision: Precision,
    recompute: Literal["none", "selective", "full"] = "none",
    fp8: str | None = None,
    frozen: bool = False,
) -> TransformerConfig:
    """Megatron's settings of one model.

    Args:
        recompute: which activations the backward pass computes again.
        fp8: format of this model, `precision.fp8` or `precision.teacher_fp8`.
        frozen: whether no weight ever changes: in FP8 they are then kept in FP8 alone.

    Raises:
        ConfigError: an unsupported model, or what needs TransformerEngine without it.
    """
    check_supported(hf)
    check_layout(hf, layout, "layout")
    fused = has_transformer_engine()
    if fp8 is not None:
        check_transformer_engine("fp8", fp8)
    dtype = torch_dtype(precision.dtype)
    family = family_of(hf)
    pipelined = layout.pipeline_model_parallel_size > 1
    _, factor = rotation_of(hf)
    full_recompute = {"recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=head_dim(hf),
        ffn_hidden_size=hf.intermediate_size,
        layernorm_epsilon=hf.rms_norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=has_biases(hf, "mlp_bias"),  # of attention too: see `_layer_spec`
        add_qkv_bias=family.qkv_bias or has_biases(hf, "attention_bias"),
        qk_layernorm=family.qk_norm,
        # Queries and keys have the factor each, so scores have its square.
        softmax_scale=None if factor == 1.0 else factor**2 / math.sqrt(head_dim(hf)),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        context_parallel_size=layout.context_parallel_size,
        sequence_parallel=layout.sequence_parallel,
        batch_p2p_comm=layout.batch_p2p_comm,
        # Off where stages interleave: at two stages the exchange of shapes mixes both directions.
        variable_seq_lengths=pipelined and not layout.virtual_pipeline_model_parallel_size,
        moe_token_dispatcher_type="alltoall",  # the default refuses variable lengths even here
        deallocate_pipeline_outputs=pipelined,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp8=fp8,
        fp8_param=frozen and fp8 is not None,
        fp8_recipe=precision.fp8_recipe,
        recompute_granularity=None if recompute == "none" else recompute,
        calculate_per_token_loss=True,  # gradients are sums; the caller divides by one count
        # Every weight is loaded, so nothing is drawn. Initialisation itself must not be off: it
        # is where the local layers mark which parameters are split over tensor parallel ranks.
        init_method=_keep,
        output_layer_init_method=_keep,
        embedding_init_method=_keep,
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        apply_rope_fusion=fused,  # unfused it reads borders of packed sequences back to the host
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        transformer_impl="transformer_engine" if fused else "local",
        **(full_recompute if recompute == "full" else {}),
        **_expert_settings(hf, layout, grouped=fused),
    )


def _expert_settings(hf: PretrainedConfig, layout: Layout, *, grouped: bool) -> dict[str, Any]:
    """Megatron's settings of the sparse layers.

    The router of transformers takes the softmax over all experts, chooses the largest, and divides
    them by their sum if it normalizes: then it is the softmax over the chosen ones, which Megatron
    computes where it does not take the softmax first. Both choose with torch.topk.

    Args:
        grouped: whether the products of a layer's experts are one call.
    """
    experts = experts_of(hf)
    if experts is None:
        return {}
    pattern = [int(is_sparse(hf, n)) for n in range(hf.num_hidden_layers)]
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.width,
        "moe_layer_freq": 1 if all(pattern) else pattern,
        "moe_router_topk": experts.per_token,
        "moe_router_pre_softmax": not experts.normalized,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": grouped,
        "expert_model_parallel_size": layout.expert_model_parallel_size,
        "expert_tensor_parallel_size": layout.expert_tensor_parallel_size,
    }


def _keep(weight: torch.Tensor) -> torch.Tensor:
    return weight


class HiddenStatesModel(GPTModel):
    """A GPT whose last stage stops before the output layer.

    It returns the hidden states after the final norm, [t, 1, h], or this rank's [t / tp, 1, h]
    with sequence parallelism. The other stages return what the next one takes, as ever.
    """

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states

    def output_weight(self) -> torch.Tensor:
        """This rank's rows of the output weight, [padded_vocab / tp, h]. Last stage only.

        Tied models on one stage: the embedding itself. On several, the last stage's copy of it.
        """
        assert self.post_process
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def tie_embeddings_and_output_weights_state_dict(
        self,
        sharded_state_dict: dict[str, Any],
        output_layer_weight_key: str,
        first_stage_word_emb_key: str,
        metadata: dict[str, Any],
    ) -> None:
        """In checkpoints the last stage's copy of a tied embedding is a replica of the first's.

        megatron-core says so too, but asks its global state for the data parallel rank.
        """
        if self.post_process and not self.pre_process:
            sharded_state_dict[output_layer_weight_key] = make_tp_sharded_tensor_for_checkpoint(
                self.output_weight(),
                first_stage_word_emb_key,
                replica_id=(1, 0, metadata["dp_cp_group"].rank()),
                allow_shape_mismatch=True,  # other layouts pad the vocabulary differently
                tp_group=self.pg_collection.tp,
                dp_cp_group=metadata["dp_cp_group"],
            )


class RMSNorm(torch.nn.RMSNorm):
    """Norm of the local layers. Megatron's own choice there refuses sequence parallelism."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, **unused: Any
    ) -> None:
        device = torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device)
        # Each rank sees its own part of the sequence: gradients are summed over the ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def build_model(
    hf: PretrainedConfig,
    layout: Layout,
    groups: ProcessGroupCollection,
    precision: Precision,
    recompute: Literal["none", "selective", "full"] = "none",
    fp8: str | None = None,
    frozen: bool = False,
) -> list[HiddenStatesModel]:
    """This rank's stages of a model, one for each virtual stage, with weights not yet set.

    Args and raises: as `transformer_config`.
    """
    _set_megatron_globals()
    config = transformer_config(hf, layout, precision, recompute, fp8, frozen)
    tied = bool(hf.tie_word_embeddings)
    virtual = layout.virtual_pipeline_model_parallel_size
    stage, last_stage = groups.pp.rank(), groups.pp.size() - 1
    models = []
    is_local = config.transformer_impl == "local"
    frequencies = rotation_of(hf)[0].to(torch.cuda.current_device())
    for vp_stage in range(virtual or 1):
        model = HiddenStatesModel(
            config,
            _layer_spec(
                config,
                frequencies,
                vp_stage if virtual else None,
                stage,
                attention_bias=has_biases(hf, "attention_bias"),
            ),
            vocab_size=padded_vocab_size(hf.vocab_size, layout.tensor_model_parallel_size),
            max_sequence_length=hf.max_position_embeddings,
            pre_process=stage == 0 and vp_stage == 0,
            post_process=stage == last_stage and vp_stage == (virtual or 1) - 1,
            parallel_output=True,
            share_embeddings_and_output_weights=tied,
            position_embedding_type="none" if is_local else "rope",  # see SegmentAttention
            pg_collection=groups,
            vp_stage=vp_stage if virtual else None,
        )
        if not is_local:
            model.rotary_pos_emb.inv_freq = frequencies
        mark_experts(model)
        give_packs_to_routers(model)
        models.append(model)
    return models


def mark_experts(model: HiddenStatesModel) -> None:
    """Have the gradients of experts summed over the ranks that hold the same ones, and their norm
    over all that hold others. Of what is put on experts later, too: it is called again then.

    megatron-core 0.16 sums so only where ranks share out the experts of a layer, and takes those of
    TransformerEngine's layers for copies on every tensor parallel rank.
    """
    config = model.config
    like_the_rest = config.expert_tensor_parallel_size == config.tensor_model_parallel_size
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = config.expert_model_parallel_size == 1 and like_the_rest
            parameter.tensor_model_parallel = True


def _layer_spec(
    config: TransformerConfig,
    frequencies: torch.Tensor,
    vp_stage: int | None,
    stage: int,
    *,
    attention_bias: bool,
) -> TransformerBlockSubmodules:
    """The layers of one stage, dense or sparse, and the norm behind the last.

    megatron-core gives attention's output projection a bias where the MLP has one, and then those
    of queries, keys and values too.
    """
    fused = config.transformer_impl == "transformer_engine"
    first = get_transformer_layer_offset(config, vp_stage, stage)
    some = config.moe_layer_freq  # which layers are sparse, or 1: each of them
    sparse = some if isinstance(some, list) else [config.num_moe_experts] * config.num_layers
    kinds = sparse[first : first + get_num_layers_to_build(config, vp_stage, stage)]
    specs = [
        _fused_layer(config, bool(kind)) if fused else _local_layer(config, frequencies, bool(kind))
        for kind in kinds
    ]
    for spec in specs:
        attention = spec.submodules.self_attention.submodules
        if attention_bias != config.add_bias_linear:
            attention.linear_proj = _with_bias(attention.linear_proj, attention_bias)
        if config.add_bias_linear and not config.add_qkv_bias:
            attention.linear_qkv = _with_bias(attention.linear_qkv, False)
    return TransformerBlockSubmodules(
        layer_specs=specs, layer_norm=LayerNormImpl if fused else RMSNorm
    )


def _with_bias(linear: type[torch.nn.Module], bias: bool) -> type[torch.nn.Module]:
    """A linear layer that has a bias or none, whatever it is asked for."""

    class Linear(linear):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"bias": bias})

    return Linear


def _fused_layer(config: TransformerConfig, sparse: bool) -> ModuleSpec:
    experts = config.num_moe_experts if sparse else None
    layer = get_gpt_layer_with_transformer_engine_spec(
        num_experts=experts, moe_grouped_gemm=sparse, qk_layernorm=config.qk_layernorm
    )
    return _with_balanced_router(layer) if sparse else layer


def _local_layer(config: TransformerConfig, frequencies: torch.Tensor, sparse: bool) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if sparse else None,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
    )
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = ModuleSpec(
        SegmentAttention, params={"inverse_frequencies": frequencies}
    )
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return _with_balanced_router(layer) if sparse else layer


def _with_balanced_router(layer: ModuleSpec) -> ModuleSpec:
    """The same sparse layer. megatron-core 0.16 has a spec of its experts, 0.19 a partial call."""
    mlp = layer.submodules.mlp
    parts = mlp.submodules if isinstance(mlp, ModuleSpec) else mlp.keywords["submodules"]
    parts.router = BalancedRouter
    return layer


def _set_megatron_globals() -> None:
    """Set the two things that megatron-core keeps globally even with explicit process groups.

    Nothing in these models is random (no dropout, no initialisation), so the tracker of random
    states is the one that tracks nothing. The router of 0.16 asks for a function that its module
    has with TransformerEngine only.
    """
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
    initialize_rng_tracker(inference_rng_tracker=True)
