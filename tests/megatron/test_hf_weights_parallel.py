"""Hugging Face weights in tensor, pipeline and virtual pipeline parallel layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from launch import launch
from tiny_models import LLAMA3_ROPE, YARN, make_model
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.distributed

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3_ROPE, "max_shard_size": "100KB"},
    "llama-tied": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "llama-biased": {"attention_bias": True},
    "llama-mlp": {"mlp_bias": True},
    "qwen2": {},
    "qwen2-tied": {"tie_word_embeddings": True},
    "qwen3": {"max_shard_size": "60KB"},
    "qwen3-tied": {"tie_word_embeddings": True, "rope_parameters": YARN},
}
SPARSE_MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"max_shard_size": "60KB", "mlp_only_layers": [1]},
    # Stored with all experts of a layer in one tensor.
    "qwen3_moe-fused": {
        "tie_word_embeddings": True,
        "decoder_sparse_step": 2,
        "norm_topk_prob": False,
        "rope_parameters": YARN,
    },
}


def layout(
    tp: int = 1,
    pp: int = 1,
    virtual: int | None = None,
    sp: bool = False,
    ep: int = 1,
    etp: int = 1,
) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": virtual,
        "sequence_parallel": sp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp,
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, settings in (MODELS | SPARSE_MODELS).items():
        make_model(root / name, name.split("-")[0], **settings)
    fused = root / "qwen3_moe-fused"
    model = AutoModelForCausalLM.from_pretrained(fused)
    (fused / "model.safetensors").unlink()
    model.save_pretrained(fused, save_original_format=False, max_shard_size="200KB")
    assert len(list(fused.glob("*.safetensors"))) > 3
    return root


@pytest.mark.parametrize("transformer_engine", [False, True])
def test_two_ranks_agree_with_transformers_and_round_trip_exactly(
    transformer_engine: bool, directory: Path
) -> None:
    layouts = [layout(), layout(tp=2), layout(tp=2, sp=True), layout(pp=2), layout(pp=2, virtual=2)]
    arguments = (str(directory), layouts, list(MODELS))
    launch(2, check_layouts, *arguments, timeout=300, transformer_engine=transformer_engine)


def test_four_ranks_agree_with_transformers_and_round_trip_exactly(directory: Path) -> None:
    layouts = [layout(tp=4), layout(tp=4, sp=True), layout(tp=2, pp=2), layout(pp=4)]
    layouts.append(layout(tp=2, pp=2, virtual=2, sp=True))
    launch(4, check_layouts, str(directory), layouts, list(MODELS), timeout=300)


@pytest.mark.parametrize("transformer_engine", [False, True])
def test_so_do_two_ranks_with_experts(transformer_engine: bool, directory: Path) -> None:
    layouts = [layout(), layout(ep=2), layout(pp=2, virtual=2), layout(etp=2)]
    layouts.append(layout(tp=2, sp=True, ep=2))
    arguments = (str(directory), layouts, list(SPARSE_MODELS))
    launch(2, check_layouts, *arguments, timeout=300, transformer_engine=transformer_engine)


@pytest.mark.slow
def test_so_do_four_ranks_with_experts(directory: Path) -> None:
    layouts = [layout(ep=4), layout(ep=2, pp=2), layout(tp=2, sp=True, ep=2, etp=2)]
    launch(4, check_layouts, str(directory), layouts, list(SPARSE_MODELS), timeout=300)


def check_layouts(directory: str, layouts: list[dict[str, Any]], names: list[str]) -> None:
    import torch
    import torch.distributed as dist
    from model_checks import FP32, logits, of_each_expert, reference_logits, stored_tensors

    from nemo_trd.config.schema import Layout
    from nemo_trd.megatron.hf_weights import export_hf_weights, load_hf_weights, read_output_weight
    from nemo_trd.megatron.model import build_model, load_hf_config
    from nemo_trd.megatron.process_groups import process_groups
    from nemo_trd.models.write import save_hf_directory

    dist.init_process_group("gloo")
    tokens = torch.randint(0, 300, (2, 96), generator=torch.Generator().manual_seed(1))
    expected = {name: reference_logits(f"{directory}/{name}", tokens) for name in names}
    for settings in layouts:
        chosen = Layout(**settings)
        groups = process_groups(chosen)
        for name in names:
            path = f"{directory}/{name}"
            hf = load_hf_config(path)
            models = build_model(hf, chosen, groups, FP32)
            load_hf_weights(models, hf, path, groups)
            case = f"{name} {settings}"
            actual = logits(models, tokens, hf.vocab_size, groups)
            error = (actual - expected[name]).abs().max().item()
            if dist.get_rank() == 0:
                print(f"{error:.1e} {case}")
            assert error < 1e-4, (case, error)
            stored = of_each_expert(stored_tensors(path))
            exported = {n: t.clone() for n, t in export_hf_weights(models, hf, groups)}
            if name in SPARSE_MODELS:
                check_memory_of_export(models, hf, groups)
            assert exported.keys() == stored.keys(), case
            for tensor in stored:
                assert torch.equal(exported[tensor], stored[tensor]), (case, tensor)
            if models[-1].post_process:
                weight = models[-1].output_weight()
                read = read_output_weight(
                    hf, path, groups.tp.rank(), groups.tp.size(), weight.dtype, weight.device
                )
                assert torch.equal(read, weight), case
    out = f"{directory}/saved"
    save_hf_directory(export_hf_weights(models, hf, groups), path, out, max_shard_bytes=100_000)
    saved = stored_tensors(out)
    assert all(torch.equal(saved[tensor], stored[tensor]) for tensor in stored)
    dist.destroy_process_group()


def check_memory_of_export(models: Any, hf: Any, groups: Any) -> None:
    """Beside its own parameters a rank never holds more than the experts of one layer."""
    from live_bytes import LiveBytes

    from nemo_trd.megatron.hf_weights import export_hf_weights

    parameters = [parameter for model in models for parameter in model.parameters()]
    layer = 3 * hf.num_experts * hf.moe_intermediate_size * hf.hidden_size * 4
    with LiveBytes(beside=parameters, limit=layer) as live:
        for _ in export_hf_weights(models, hf, groups):
            pass
    assert 0 < live.peak <= layer, (live.peak, layer)
