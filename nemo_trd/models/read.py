"""Reading config.json and tokenizer of a model directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_trd.config.errors import ConfigError, rule_broken
from nemo_trd.config.schema import ModelSource
from nemo_trd.models.directory import check_model_type, check_weights
from nemo_trd.models.rules import check_supported


@dataclass(frozen=True)
class Model:
    """What a model directory says about itself."""

    field: str
    directory: Path
    hf: Any  # transformers.PretrainedConfig; of a teacher on servers only, see served_model.py
    tokenizer: Any  # transformers.PreTrainedTokenizerBase


def _load(source: ModelSource, field: str, problems: list[ConfigError]) -> Model | None:
    """Read and check a model directory. What is wrong with it is added to `problems`."""
    from transformers import AutoConfig, AutoTokenizer

    from nemo_trd.models.vocabulary import read_generation_config

    directory = Path(source.path).absolute()
    try:
        check_model_type(directory, field)
        options = {"trust_remote_code": source.trust_remote_code, "local_files_only": True}
        hf = _read(AutoConfig, directory, f"{field} (config.json)", options)
        check_supported(hf)
        check_weights(directory, hf, field)
        read_generation_config(directory)
        tokenizer = _read(AutoTokenizer, directory, f"{field} (tokenizer)", options)
    except ConfigError as error:
        problems.append(error)
        return None
    return Model(field, directory, hf, tokenizer)


def _read(reader: Any, directory: Path, field: str, options: dict[str, bool]) -> Any:
    try:
        return reader.from_pretrained(str(directory), **options)
    except Exception as error:  # tokenizers raises plain Exception for a damaged file
        raise rule_broken(
            field,
            str(directory),
            f"transformers cannot read it: {str(error).splitlines()[0] if str(error) else error!r}",
            "give a complete Hugging Face directory",
        ) from error
