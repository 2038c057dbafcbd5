"""Which tokens end a completion."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

logger = logging.getLogger(__name__)


def eos_token_ids(path: str, trust_remote_code: bool) -> frozenset[int]:
    """Every id that ends a completion: the generation config's and the tokenizer's."""
    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    if (Path(path) / "generation_config.json").exists():
        generation = GenerationConfig.from_pretrained(path, local_files_only=True)
    else:
        generation = GenerationConfig.from_model_config(AutoConfig.from_pretrained(path, **options))
    configured = generation.eos_token_id
    ids = {configured} if isinstance(configured, int) else set(configured or ())
    if any((Path(path) / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        if tokenizer.eos_token_id is not None:
            ids.add(tokenizer.eos_token_id)
    if not ids:
        logger.warning("%s names no EOS token: completions end at max_tokens only", path)
    return frozenset(ids)
