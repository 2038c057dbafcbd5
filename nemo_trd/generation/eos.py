"""Which tokens end a completion."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from nemo_trd.config_error import rule_broken

logger = logging.getLogger(__name__)


def read_generation_config(path: str | Path) -> GenerationConfig | None:
    """None where the model comes without one.

    Raises:
        ConfigError: generation_config.json is damaged, or its eos_token_id names no tokens.
    """
    file = Path(path) / "generation_config.json"
    if not file.exists():
        return None
    try:
        found = GenerationConfig.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # whatever the file made transformers stumble over
        reason = (str(error) or repr(error)).splitlines()[0]
        raise rule_broken(
            "generation_config.json",
            str(file),
            f"transformers cannot read it: {reason}",
            "copy it again, or remove it: config.json then says how answers end",
        ) from error
    ends = found.eos_token_id
    if not all(type(token) is int for token in (ends if isinstance(ends, list) else [ends or 0])):
        raise rule_broken(
            "generation_config.json",
            str(file),
            f"its eos_token_id is {ends!r}, and it is a token id or a list of them",
            "correct it",
        )
    return found


def eos_token_ids(path: str, trust_remote_code: bool) -> frozenset[int]:
    """Every id that ends a completion: the generation config's and the tokenizer's."""
    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    generation = read_generation_config(path)
    if generation is None:
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
