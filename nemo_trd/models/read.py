"""Reading config.json, generation_config.json and the tokenizer of a local model directory.

Nothing is downloaded. transformers is imported only when something is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_trd.config.errors import ConfigError, rule_broken
from nemo_trd.config.schema import ModelSource
from nemo_trd.models.directory import check_model_type, check_weights
from nemo_trd.models.rules import check_supported

if TYPE_CHECKING:
    from transformers import GenerationConfig


@dataclass(frozen=True)
class Model:
    """A model directory: its settings and its tokenizer, without weights."""

    field: str  # the setting that names the directory
    directory: Path
    hf: Any  # transformers.PretrainedConfig; of a teacher on servers only, see served.py
    tokenizer: Any  # transformers.PreTrainedTokenizerBase; None where only shapes are read


def read_directory(source: ModelSource, field: str, problems: list[ConfigError]) -> Model | None:
    """Read a model directory that Megatron is to load, and check all files in it.

    None where something is wrong with it, which is added to `problems`.
    """
    from transformers import AutoConfig

    directory = Path(source.path).absolute()
    trusted = source.trust_remote_code
    try:
        check_model_type(directory, field)
        hf = _read(AutoConfig, directory, trusted, f"{field} (config.json)")
        check_supported(hf)
        check_weights(directory, hf, field)
        read_generation_config(directory)
        tokenizer = read_tokenizer(directory, trusted, f"{field} (tokenizer)")
    except ConfigError as error:
        problems.append(error)
        return None
    return Model(field, directory, hf, tokenizer)


def read_tokenizer(
    path: str | Path, trust_remote_code: bool = False, field: str = "tokenizer"
) -> Any:
    """The `transformers.PreTrainedTokenizerBase` of a directory; `field` led to it.

    Raises:
        ConfigError: transformers cannot read it.
    """
    from transformers import AutoTokenizer

    return _read(AutoTokenizer, path, trust_remote_code, field)


def _read(reader: Any, path: str | Path, trust_remote_code: bool, field: str) -> Any:
    try:
        return reader.from_pretrained(
            str(path), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # tokenizers raises plain Exception for a damaged file
        raise rule_broken(
            field, str(path), _unreadable(error), "give a complete Hugging Face directory"
        ) from error


def read_generation_config(path: str | Path) -> GenerationConfig | None:
    """The settings of generation_config.json; None where the model comes without one.

    Raises:
        ConfigError: the file is damaged, or its eos_token_id names no tokens.
    """
    file = Path(path) / "generation_config.json"
    if not file.exists():
        return None
    from transformers import GenerationConfig

    try:
        generation = GenerationConfig.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # whatever the file made transformers stumble over
        raise rule_broken(
            "generation_config.json",
            str(file),
            _unreadable(error),
            "copy it again, or remove it: config.json then says how answers end",
        ) from error
    ends = generation.eos_token_id
    ids = ends if isinstance(ends, list) else [ends or 0]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise rule_broken(
            "generation_config.json",
            str(file),
            f"its eos_token_id is {ends!r}, and it is a token id or a list of them",
            "correct it",
        )
    return generation


def _unreadable(error: Exception) -> str:
    return f"transformers cannot read it: {(str(error) or repr(error)).splitlines()[0]}"
