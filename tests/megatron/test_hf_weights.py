"""Loading, exporting and saving Hugging Face weights on one rank."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_checks import BF16, FP32, stored_tensors
from safetensors.torch import load_file, save_file
from tiny_models import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_trd.config.errors import ConfigError
from nemo_trd.config.schema import Layout, Precision
from nemo_trd.generation.local import load_model
from nemo_trd.megatron.hf_weights import export_hf_weights, load_hf_weights, read_output_weight
from nemo_trd.megatron.model import build_model, load_hf_config
from nemo_trd.models import directory as hf_directory
from nemo_trd.models.family import FAMILIES
from nemo_trd.models.write import save_hf_directory

SINGLE = Layout(tensor_model_parallel_size=1, pipeline_model_parallel_size=1)


def round_trip(directory: Path, groups: Any, precision: Precision) -> dict[str, torch.Tensor]:
    hf = load_hf_config(str(directory))
    models = build_model(hf, SINGLE, groups, precision)
    load_hf_weights(models, hf, str(directory), groups)
    return {name: tensor.clone() for name, tensor in export_hf_weights(models, hf, groups)}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
def test_a_round_trip_is_exact(
    tmp_path: Path, one_rank: Any, architecture: str, tied: bool, precision: Precision
) -> None:
    dtype = torch.bfloat16 if precision is BF16 else torch.float32
    make_model(tmp_path, architecture, dtype=dtype, tie_word_embeddings=tied, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_same(round_trip(tmp_path, one_rank, precision), stored_tensors(tmp_path))


def test_experts_of_a_layer_may_be_stored_in_one_tensor(tmp_path: Path, one_rank: Any) -> None:
    single = make_model(tmp_path / "single", "qwen3_moe", mlp_only_layers=[2])
    fused = tmp_path / "fused"
    model = AutoModelForCausalLM.from_pretrained(single)
    model.save_pretrained(fused, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in stored_tensors(fused)
    expected = stored_tensors(single)
    assert_same(round_trip(fused, one_rank, FP32), expected)
    weights = load_file(fused / "model.safetensors")
    del weights["model.layers.1.mlp.experts.down_proj"]
    save_file(weights, fused / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack model\.layers\.1\.mlp\.experts\.0\.down_proj"):
        round_trip(fused, one_rank, FP32)


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
def test_16_bit_files_load_into_an_fp32_model_exactly(
    tmp_path: Path, one_rank: Any, source: torch.dtype
) -> None:
    make_model(tmp_path, "llama", dtype=source)
    expected = {name: t.float() for name, t in stored_tensors(tmp_path).items()}
    assert_same(round_trip(tmp_path, one_rank, FP32), expected)


def test_padding_of_the_vocabulary_is_zero(tmp_path: Path, one_rank: Any) -> None:
    make_model(tmp_path, "llama", vocab_size=131)
    hf = load_hf_config(str(tmp_path))
    (model,) = build_model(hf, SINGLE, one_rank, FP32)
    model.output_weight().data.fill_(7.0)
    load_hf_weights([model], hf, str(tmp_path), one_rank)
    assert model.output_weight().shape == (256, 64)
    assert not model.output_weight()[131:].any()


@pytest.mark.parametrize("tied", [False, True])
def test_shards_of_the_output_weight_make_the_whole(tmp_path: Path, tied: bool) -> None:
    make_model(tmp_path, "qwen2", vocab_size=131, tie_word_embeddings=tied)
    hf = load_hf_config(str(tmp_path))
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    shards = [  # the last two hold nothing but padding
        read_output_weight(hf, str(tmp_path), rank, 4, torch.float32, torch.device("cpu"))
        for rank in range(4)
    ]
    whole = torch.cat(shards)
    assert whole.shape == (512, 64)
    assert torch.equal(whole[:131], stored_tensors(tmp_path)[name])
    assert not whole[131:].any()


@pytest.mark.parametrize("max_shard_bytes", [10**9, 100_000])
def test_a_saved_directory_is_what_transformers_reads(
    tmp_path: Path, one_rank: Any, max_shard_bytes: int
) -> None:
    source = make_model(tmp_path / "source", "qwen3", dtype=torch.bfloat16, tokenizer=True)
    hf = load_hf_config(str(source))
    models = build_model(hf, SINGLE, one_rank, FP32)
    load_hf_weights(models, hf, str(source), one_rank)
    with torch.no_grad():
        models[0].decoder.final_layernorm.weight.add_(1.0)
    out = tmp_path / "out"
    for _ in range(2):  # the second time it replaces the first
        save_hf_directory(
            export_hf_weights(models, hf, one_rank), str(source), out, max_shard_bytes
        )
    assert (out / "model.safetensors.index.json").exists() == (max_shard_bytes == 100_000)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    expected = {name: t.float() for name, t in stored_tensors(source).items()}
    expected["model.norm.weight"] += 1.0
    assert_same(stored_tensors(out), expected)
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == torch.float32
    assert torch.equal(model.model.norm.weight, expected["model.norm.weight"])
    written, original = (json.loads((d / "config.json").read_text()) for d in (out, source))
    assert written | {"dtype": None} == original | {"dtype": None}
    assert AutoTokenizer.from_pretrained(out)("a b")["input_ids"]


def test_a_saved_directory_has_nothing_that_changes_how_it_loads(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", "llama", num_hidden_layers=1, tokenizer=True)
    tensors = stored_tensors(source)
    left = [
        *("adapter_config.json", "adapter_model.json", "pytorch_model.bin.index.json"),
        *("model.fp16.safetensors.index.json", "quantize_config.json", "hf_quant_config.json"),
        *("trainer_state.json", "optimizer.pt", "consolidated.safetensors", "params.json"),
    ]
    for name in left:
        (source / name).write_text("{}")
    templates = source / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ messages }}")
    out = tmp_path / "out"
    save_hf_directory(tensors.items(), str(source), out)
    kept = {file.name for file in source.iterdir()} - set(left)
    assert {file.name for file in out.iterdir()} == kept
    assert (out / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"


def test_of_a_tensor_that_two_shards_hold_all_readers_take_the_one_of_the_index(
    tmp_path: Path, one_rank: Any, caplog: pytest.LogCaptureFixture
) -> None:
    make_model(tmp_path, "llama", max_shard_size="100KB", num_hidden_layers=1)
    expected = stored_tensors(tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for shard in (shards[0], shards[-1]):  # transformers takes whichever it reads last
        copied = next(name for name, owner in index.items() if owner == shards[1].name)
        tensors = load_file(shard) | {copied: torch.full_like(expected[copied], 9.0)}
        save_file(tensors, shard, metadata={"format": "pt"})
    assert_same(round_trip(tmp_path, one_rank, FP32), expected)
    assert f"{shards[0]} also holds {copied}, which is read from {shards[1].name}" in caplog.text
    loaded = load_model(str(tmp_path), torch.float32, trust_remote_code=False)
    assert_same(dict(loaded.state_dict()), expected)


def test_an_index_may_name_the_single_file(tmp_path: Path) -> None:
    make_model(tmp_path, "llama", num_hidden_layers=1)
    expected = hf_directory.stored_tensors(tmp_path, "model")
    index = {"weight_map": dict.fromkeys(expected, "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert hf_directory.stored_tensors(tmp_path, "model") == expected


def test_an_adapter_is_refused_where_transformers_would_add_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_model(tmp_path, "llama", num_hidden_layers=1)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    hf_directory.check_model_type(tmp_path, "model")
    assert "adapter_config.json is not read" in caplog.text
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ConfigError, match=r"adapter_config.json'.*peft is installed.*remove"):
        hf_directory.check_model_type(tmp_path, "model")


def test_a_save_that_fails_leaves_the_old_directory_alone(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", "llama", num_hidden_layers=1)
    out = tmp_path / "out"
    save_hf_directory(stored_tensors(source).items(), str(source), out)

    def broken() -> Any:
        yield "model.norm.weight", torch.zeros(64)
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        save_hf_directory(broken(), str(source), out)
    assert_same(stored_tensors(out), stored_tensors(source))


def test_a_tied_model_may_carry_a_copy_of_its_embedding_but_nothing_else(
    tmp_path: Path, one_rank: Any
) -> None:
    make_model(tmp_path, "llama", tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file)
    exported = round_trip(tmp_path, one_rank, FP32)
    assert "lm_head.weight" not in exported
    tensors["lm_head.weight"][200, 3] += 1.0
    save_file(tensors, file)
    with pytest.raises(ConfigError, match="lm_head.weight differs from model.embed_tokens"):
        round_trip(tmp_path, one_rank, FP32)


def damage(directory: Path, how: str) -> None:
    shard = sorted(directory.glob("*.safetensors"))[1]
    tensors = load_file(shard)
    first = next(iter(tensors))
    if how == "missing shard":
        shard.unlink()
    elif how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif how == "wrong shape":
        tensors[first] = torch.zeros(3, 5)
        save_file(tensors, shard)
    elif how == "unexpected tensor":
        tensors["model.layers.0.self_attn.q_proj.lora_A"] = torch.zeros(2)
        save_file(tensors, shard)
    elif how == "missing tensor":
        index = directory / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        del content["weight_map"][first], tensors[first]
        index.write_text(json.dumps(content))
        save_file(tensors, shard)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing shard", r"safetensors'.*shard is missing"),
        ("truncated", r"safetensors'.*truncated: \d+ bytes"),
        ("wrong shape", r"safetensors: model\..*\[3, 5\].*config\.json describes the shape \["),
        ("unexpected tensor", r"no place for model\.layers\.0\.self_attn\.q_proj\.lora_A"),
        ("missing tensor", r"lack model\."),
    ],
)
def test_a_damaged_directory_is_refused_before_any_parameter_changes(
    tmp_path: Path, one_rank: Any, how: str, message: str
) -> None:
    make_model(tmp_path, "llama", max_shard_size="100KB", num_hidden_layers=1)
    hf = load_hf_config(str(tmp_path))
    models = build_model(hf, SINGLE, one_rank, FP32)
    models[0].decoder.final_layernorm.weight.data.fill_(5.0)
    damage(tmp_path, how)
    with pytest.raises(ConfigError, match=message):
        load_hf_weights(models, hf, str(tmp_path), one_rank)
    assert (models[0].decoder.final_layernorm.weight == 5.0).all()
