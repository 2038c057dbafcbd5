"""HF config -> Megatron model: the same function as transformers', or a clear refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_checks import BF16, FP32, logits, packed, reference_logits
from tiny_models import CONFIGS, LLAMA3_ROPE, YARN, make_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from nemo_trd.config.errors import ConfigError
from nemo_trd.config.schema import Layout, Precision
from nemo_trd.megatron.hf_weights import load_hf_weights
from nemo_trd.megatron.model import (
    build_model,
    has_transformer_engine,
    load_hf_config,
    rotation_of,
    transformer_config,
)
from nemo_trd.megatron.schedule import run_model
from nemo_trd.models.family import FAMILIES, padded_vocab_size, rope_parameters
from nemo_trd.models.rules import check_layout, check_supported

SINGLE = Layout(tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
without_transformer_engine = pytest.mark.skipif(
    has_transformer_engine(), reason="TransformerEngine is here"
)


def load(directory: Path, groups: Any, precision: Precision = FP32, **options: Any) -> list[Any]:
    hf = load_hf_config(str(directory))
    models = build_model(hf, SINGLE, groups, precision, **options)
    load_hf_weights(models, hf, str(directory), groups)
    return models


def test_every_family_is_tested() -> None:
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        *((name, {}) for name in CONFIGS),
        ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0}},
        ),
        # The factor of queries and keys: implied, given, and as quotient of two others.
        ("qwen3", {"rope_parameters": YARN}),
        ("llama", {"rope_parameters": YARN | {"attention_factor": 0.7, "beta_fast": 4.0}}),
        ("qwen2", {"rope_parameters": YARN | {"mscale": 2.0, "mscale_all_dim": 0.5}}),
        ("llama", {"num_key_value_heads": 8, "rms_norm_eps": 1e-2}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("qwen2", {"num_key_value_heads": 1}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("qwen3", {"tie_word_embeddings": True, "head_dim": 24}),
        ("qwen3_moe", {"norm_topk_prob": False, "tie_word_embeddings": True}),
        ("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": False, "num_experts": 3}),
        # Dense layers among the sparse ones, as wide as an expert and not.
        ("qwen3_moe", {"mlp_only_layers": [0, 2], "intermediate_size": 48}),
        ("qwen3_moe", {"decoder_sparse_step": 2}),
    ],
)
def test_logits_are_those_of_transformers(
    tmp_path: Path, one_rank: Any, architecture: str, settings: dict[str, Any]
) -> None:
    directory = make_model(tmp_path, architecture, **settings)
    tokens = torch.randint(0, 300, (2, 150), generator=torch.Generator().manual_seed(0))
    actual = logits(load(directory, one_rank), tokens, 300, one_rank)
    torch.testing.assert_close(actual, reference_logits(directory, tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_gradients_are_those_of_transformers(tmp_path: Path, one_rank: Any, recompute: Any) -> None:
    directory = make_model(tmp_path, "llama", num_hidden_layers=2)
    (model,) = load(directory, one_rank, recompute=recompute)
    tokens = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    hidden = run_model(model, packed(tokens))
    (hidden @ model.output_weight().T)[..., :300].square().sum().backward()
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    reference(tokens).logits.square().sum().backward()
    for name, expected in (
        ("embedding.word_embeddings", reference.model.embed_tokens),
        ("decoder.layers.0.mlp.linear_fc2", reference.model.layers[0].mlp.down_proj),
        ("decoder.layers.1.input_layernorm", reference.model.layers[1].input_layernorm),
    ):
        actual = model.get_submodule(name).weight.grad[: expected.weight.shape[0]]
        torch.testing.assert_close(actual, expected.weight.grad, rtol=1e-4, atol=1e-3)


def test_bf16_models_compute_in_bf16_close_to_fp32(tmp_path: Path, one_rank: Any) -> None:
    directory = make_model(tmp_path, "qwen3")
    models = load(directory, one_rank, BF16)
    assert {p.dtype for p in models[0].parameters()} == {torch.bfloat16}
    tokens = torch.randint(0, 300, (1, 30), generator=torch.Generator().manual_seed(0))
    actual = logits(models, tokens, 300, one_rank)
    assert (actual - reference_logits(directory, tokens)).abs().mean() < 0.05


def test_parameters_split_over_ranks_are_marked_as_such(tmp_path: Path, one_rank: Any) -> None:
    # Gradient norms count the others once, not once for each tensor parallel rank.
    (model,) = load(make_model(tmp_path, "qwen3_moe", decoder_sparse_step=2), one_rank)
    for name, parameter in model.named_parameters():
        split = getattr(parameter, "tensor_model_parallel", False)
        assert split == ("norm" not in name and "router" not in name), name


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (Qwen3Config(attention_bias=True), "attention_bias"),
        (LlamaConfig(hidden_act="gelu"), "hidden_act"),
        (LlamaConfig(architectures=["LlamaForSequenceClassification"]), "architectures"),
        (LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "rope_type"),
        (Qwen3Config(rope_parameters={"rope_type": "yarn", "factor": 0.5}), "factor"),
        (Qwen2Config(use_sliding_window=True, max_window_layers=0), "sliding_window"),
        (LlamaConfig(quantization_config={"bits": 4}), "quantization_config"),
        (Qwen3MoeConfig(shared_expert_intermediate_size=8), "shared_expert_intermediate_size"),
        (Qwen3MoeConfig(num_experts=4), "num_experts_per_tok"),  # 8
        (Qwen3MoeConfig(num_experts_per_tok=1, norm_topk_prob=True), "norm_topk_prob"),
        (Qwen3MoeConfig(decoder_sparse_step=0), "decoder_sparse_step"),
        (Qwen3MoeConfig(decoder_sparse_step=25), "mlp_only_layers, decoder_sparse_step"),
    ],
)
def test_what_would_be_computed_differently_is_refused(config: Any, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: {key} = .* Fix: "):
        check_supported(config)


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ConfigError, match=r"config\.json.*'mamba'.*llama, qwen2, qwen3, qwen3_moe"):
        load_hf_config(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "multi-head latent attention"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding window"),
        ({"model_type": "qwen2_moe", "shared_expert_intermediate_size": 8}, "shared experts"),
    ],
)
def test_so_is_what_of_it_is_not_built(tmp_path: Path, settings: Any, part: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=rf"supported are llama, .*; not built is .*{part} \("):
        load_hf_config(str(tmp_path))


def test_rope_settings_of_old_config_files_mean_the_same(tmp_path: Path) -> None:
    directory = make_model(tmp_path, "llama", rope_parameters=LLAMA3_ROPE)
    expected = rotation_of(load_hf_config(str(directory)))[0]
    settings = json.loads((directory / "config.json").read_text())
    rope = settings.pop("rope_parameters")
    settings["rope_theta"] = rope.pop("rope_theta")
    settings["rope_scaling"] = rope
    (directory / "config.json").write_text(json.dumps(settings))
    assert torch.equal(rotation_of(load_hf_config(str(directory)))[0], expected)


def test_rope_settings_of_a_transformers_4_config_object_are_read() -> None:
    class Old:
        rope_theta = 5e5
        rope_scaling = {"type": "linear", "factor": 2.0}

    assert rope_parameters(Old()) == {  # type: ignore[arg-type]
        "type": "linear",
        "rope_type": "linear",
        "factor": 2.0,
        "rope_theta": 5e5,
    }


def test_the_vocabulary_is_padded_to_what_tensor_parallel_ranks_share() -> None:
    assert [padded_vocab_size(v, 2) for v in (1, 256, 257, 151_936)] == [256, 256, 512, 152_064]


@pytest.mark.parametrize(
    ("sizes", "field"),
    [
        ((3, 1, None), "tensor_model_parallel_size = 3"),
        ((8, 1, None), "tensor_model_parallel_size = 8.*num_key_value_heads"),
        ((1, 3, None), "pipeline_model_parallel_size = 3.*num_hidden_layers"),
        ((1, 2, 4), "virtual_pipeline_model_parallel_size = 4"),
    ],
)
def test_a_layout_that_does_not_divide_the_model_is_refused(sizes: Any, field: str) -> None:
    hf = LlamaConfig(
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        hidden_size=64,
        intermediate_size=96,
    )
    layout = Layout(
        tensor_model_parallel_size=sizes[0],
        pipeline_model_parallel_size=sizes[1],
        virtual_pipeline_model_parallel_size=sizes[2],
    )
    with pytest.raises(ConfigError, match=rf"parallel\.student\.{field}.* Fix: "):
        check_layout(hf, layout, "parallel.student")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"expert_model_parallel_size": 3}, "expert_model_parallel_size = 3.*num_experts.* 8"),
        (
            {"expert_tensor_parallel_size": 5},
            "expert_tensor_parallel_size = 5.*moe_intermediate_size.* 48",
        ),
        ({"tensor_model_parallel_size": 2}, "sequence_parallel = False.*set it to true"),
    ],
)
def test_a_layout_that_does_not_divide_the_experts_is_refused(sizes: Any, message: str) -> None:
    hf = Qwen3MoeConfig(num_experts=8, moe_intermediate_size=48)
    layout = SINGLE.model_copy(update=sizes)
    with pytest.raises(ConfigError, match=rf"parallel\.teacher\.{message}"):
        check_layout(hf, layout, "parallel.teacher")


@pytest.mark.parametrize("key", ["expert_model_parallel_size", "expert_tensor_parallel_size"])
def test_a_dense_model_has_no_experts_to_share_out(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} = 2.*qwen3 has none.*set it to 1"):
        check_layout(Qwen3Config(), SINGLE.model_copy(update={key: 2}), "parallel.student")


@without_transformer_engine
def test_the_factory_refuses_fp8_too() -> None:
    with pytest.raises(ConfigError, match="fp8 = 'hybrid'"):
        transformer_config(LlamaConfig(), SINGLE, BF16, fp8="hybrid")


def test_pipeline_stages_exchange_shapes_unless_they_interleave() -> None:
    hf = LlamaConfig(num_hidden_layers=8)
    plain = Layout(tensor_model_parallel_size=1, pipeline_model_parallel_size=2)
    interleaved = plain.model_copy(update={"virtual_pipeline_model_parallel_size": 2})
    assert transformer_config(hf, plain, BF16).variable_seq_lengths
    assert not transformer_config(hf, interleaved, BF16).variable_seq_lengths
    assert not transformer_config(hf, SINGLE, BF16).variable_seq_lengths
