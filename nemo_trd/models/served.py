"""Reading the directory of a teacher that only its servers hold. No torch.

Its architecture is the servers' matter: config.json need only tell how long sequences may be and
how many token ids there are, and its weights need not be on this machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_trd.config.errors import rule_broken
from nemo_trd.config.schema import Config, ModelSource, VllmServer
from nemo_trd.models.directory import INDEX_NAME, SINGLE_NAME, read_json

SERVER_FIELD = "generation.vllm.teacher.server"
# Where models of images, sound and text keep the settings of the part that makes tokens.
TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
# The names that architectures give to the two sizes, the usual one first.
NAMES = {
    "vocab_size": ("vocab_size", "padded_vocab_size"),
    "max_position_embeddings": (
        *("max_position_embeddings", "n_positions", "max_sequence_length"),
        *("max_seq_len", "seq_length", "model_max_length"),
    ),
}


def is_only_served(config: Config) -> bool:
    """Whether the teacher is a model of its own that nobody here holds."""
    return config.scores_on_servers and config.model.teacher is not None


def has_weights(directory: Path) -> bool:
    """Whether the directory holds weights in a format that a server loads."""
    if any((directory / name).exists() for name in (INDEX_NAME, SINGLE_NAME)):
        return True
    return any(next(directory.glob(f"*.{kind}"), None) for kind in ("safetensors", "bin", "gguf"))


def read_served(source: ModelSource, field: str, server: VllmServer | None) -> SimpleNamespace:
    """Read `vocab_size`, `max_position_embeddings`, `eos_token_id` and `model_type`.

    The result also has `name_or_path`, the directory.

    Where `server.max_model_len` is set it takes the place of what the model says: servers extend a
    model's positions (YaRN), and refuse a length at which it cannot work. Without a `server`
    lengths do not matter, and positions are left out.

    Raises:
        ConfigError: there is no such directory, config.json is damaged or tells no sizes.
    """
    directory = Path(source.path).absolute()
    if not directory.is_dir():
        raise rule_broken(
            field,
            source.path,
            "there is no such directory; of a teacher on servers its config.json and tokenizer "
            "are read here",
            "copy these files of the model to a directory and give that; nothing is downloaded",
        )
    file = directory / "config.json"
    settings = read_json(file, field)
    known = _from_transformers(source, directory)
    if server is not None and server.max_model_len is not None:
        known["max_position_embeddings"] = server.max_model_len
    sizes: dict[str, Any] = {}
    for name in NAMES if server is not None else ("vocab_size",):
        value = known.get(name) or _from_json(settings, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            other = f", or set {SERVER_FIELD}.max_model_len" if name != "vocab_size" else ""
            raise rule_broken(
                f"{field} ({file}: {name})",
                value,
                "config.json must tell it, here or in text_config, as a positive integer",
                f"add it as the model's authors state it{other}",
            )
        sizes[name] = value
    return SimpleNamespace(
        **sizes,
        eos_token_id=_from_json(settings, "eos_token_id"),
        model_type=settings.get("model_type"),
        name_or_path=str(directory),
    )


def _from_transformers(source: ModelSource, directory: Path) -> dict[str, Any]:
    """Read the sizes as the architecture's own class has them, which knows what the file omits.

    Empty where this transformers does not know the architecture.
    """
    from transformers import AutoConfig

    try:
        hf = AutoConfig.from_pretrained(
            str(directory), trust_remote_code=source.trust_remote_code, local_files_only=True
        )
        text = hf.get_text_config(decoder=True)
    except Exception:  # of an unknown architecture anything is raised; the file itself is left
        return {}
    return {name: getattr(text, name, None) for name in NAMES}


def _from_json(settings: Mapping[str, Any], key: str) -> Any:
    """The value under any of its names, of the text's part first."""
    for part in TEXT_PARTS:
        inner = settings.get(part)
        if isinstance(inner, Mapping) and (value := _from_json(inner, key)) is not None:
            return value
    names = NAMES.get(key, (key,))
    return next((settings[name] for name in names if settings.get(name) is not None), None)


def check_served_weights(config: Config, directory: Path) -> None:
    """Refuse a directory without weights where the run starts servers that load them from it.

    Raises:
        ConfigError: there are none.
    """
    assert config.generation.vllm is not None  # config.teacher_rules: servers score
    replicas = config.generation.vllm.teacher.replicas
    if replicas and not has_weights(directory):
        raise rule_broken(
            "generation.vllm.teacher.replicas",
            replicas,
            f"servers of the run load the model of model.teacher.path, and {directory} has no "
            "weights",
            "set it to 0 and give generation.vllm.teacher.urls of servers that have them",
        )
