"""Writes tiny random Hugging Face models for tests."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

# Every family that `nemo_trd.models.family` supports. By name, not by class: the transformers of
# NeMo-Aligner's environment has no Qwen3.
CONFIGS = {
    name: partial(AutoConfig.for_model, name) for name in ("llama", "qwen2", "qwen3", "qwen3_moe")
}
# Of a token the fourth part of the experts, and a width of its own.
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_model(
    directory: Path | str,
    architecture: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = False,
    max_shard_size: str = "5GB",
    **config: Any,
) -> Path:
    """Write config.json and safetensors, with a byte tokenizer if asked; return the directory.

    Weights are random but not small, and norms are not one, so that a wrong mapping shows.
    """
    settings: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 3,
        "pad_token_id": 0,
    }
    if architecture == "qwen3_moe":
        settings |= EXPERTS
    settings |= config
    if architecture == "qwen2":
        settings.pop("head_dim")
    hf = CONFIGS[architecture](**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(hf)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape) * 0.1
                parameter.copy_(1 + noise if "norm" in name else noise)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    if tokenizer:
        byte_tokenizer().save_pretrained(directory)
    return Path(directory)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, after the special tokens; with a chat template."""
    special = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", "<|system|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(special + alphabet)}
    core = Tokenizer(models.BPE(vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
        chat_template=CHAT_TEMPLATE,
    )
