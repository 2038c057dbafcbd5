"""Files of a local Hugging Face model directory and their defects, read without torch.

Only JSON files and safetensors headers are read, so a 70B directory is checked in
milliseconds. A safetensors file is: 8 bytes little-endian header length, a JSON header that
maps tensor names to dtype, shape and [begin, end) offsets, then the bytes of the tensors.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import struct
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from nemo_trd.config.errors import ConfigError, rule_broken
from nemo_trd.models.family import FAMILIES, expected_tensors, family_of, fused_tensors

log = logging.getLogger(__name__)

BYTES_PER_ELEMENT = {"F32": 4, "F16": 2, "BF16": 2}
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ADAPTER_NAME = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
COPY_AGAIN = "copy the directory again, whole"
UNBUILT = {  # by the key of config.json that tells of it
    "kv_lora_rank": "multi-head latent attention",
    "sliding_window": "attention within a sliding window",
    "n_shared_experts": "shared experts",
    "shared_expert_intermediate_size": "shared experts",
}


@dataclass(frozen=True)
class Place:
    """Where the rows of an expert's tensor lie in that of all experts, [E, rows, columns]."""

    tensor: str
    expert: int
    first_row: int


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and its kind, as its file's header says."""

    file: Path
    dtype: str  # a key of BYTES_PER_ELEMENT
    shape: tuple[int, ...]
    place: Place | None = None  # of one that the file holds as a part of another


def read_json(file: Path, field: str) -> dict[str, Any]:
    """Read a JSON object from `file`; `field` is the setting that led to it.

    Raises:
        ConfigError: the file is missing, unreadable or no JSON object (with line and column).
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise rule_broken(
            field, str(file), "there is no such file", "give a complete Hugging Face directory"
        ) from None
    except json.JSONDecodeError as error:
        raise rule_broken(
            field,
            f"{file}:{error.lineno}:{error.colno}",
            f"invalid JSON: {error.msg}",
            "repair the file or copy it again",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise rule_broken(
            field, str(file), f"it cannot be read: {error}", "repair the file or copy it again"
        ) from error
    if not isinstance(content, dict):
        raise rule_broken(
            field, str(file), "it holds no JSON object", "repair the file or copy it again"
        )
    return content


def _what_lacks(settings: dict[str, Any]) -> str:
    """The parts of an unknown architecture, as its config.json tells, that are not built."""
    parts = ", ".join(f"{part} ({key})" for key, part in UNBUILT.items() if settings.get(key))
    return f"; not built is {parts}" if parts else ""


def check_model_type(directory: Path, field: str) -> None:
    """Refuse directories that are missing or of an architecture that is not built.

    Raises:
        ConfigError
    """
    if not directory.is_dir():
        raise rule_broken(
            field,
            str(directory),
            "there is no such directory",
            "give a local Hugging Face directory; nothing is downloaded",
        )
    config_file = directory / "config.json"
    _check_adapter(directory, config_file, field)
    settings = read_json(config_file, field)
    model_type = settings.get("model_type")
    if model_type not in FAMILIES:
        raise rule_broken(
            f"{field} ({config_file}: model_type)",
            model_type,
            f"supported are {', '.join(FAMILIES)}{_what_lacks(settings)}",
            "choose a model of one of these architectures",
        )
    quantization = settings.get("quantization_config")
    if quantization:
        raise rule_broken(
            f"{field} ({config_file}: quantization_config)",
            quantization,
            "weights are trained and served in fp32, fp16 or bf16",
            "save a dequantized copy of the model",
        )


def _check_adapter(directory: Path, config_file: Path, field: str) -> None:
    """A LoRA adapter is not read: not where it is alone, nor where it lies beside a model."""
    adapter = directory / ADAPTER_NAME
    if not adapter.exists():
        return
    if not config_file.exists():
        raise rule_broken(
            field,
            str(adapter),
            f"this is an adapter without its model: there is no {config_file.name}",
            "merge it into its model and give the directory of the merged model",
        )
    if importlib.util.find_spec("peft") is not None:
        raise rule_broken(
            field,
            str(adapter),
            "transformers would put this adapter on the weights beside it, since the package "
            "peft is installed; Megatron and vLLM would not",
            "merge the adapter if it is not merged yet, and remove the file",
        )
    _warn_once(f"{adapter} is not read; the weights beside it are")


def stored_tensors(directory: Path, field: str) -> dict[str, StoredTensor]:
    """Every tensor of the directory by name, after checking that its bytes are all there.

    Where several shards hold a tensor, it is the one that the index names.

    Raises:
        ConfigError: no safetensors, a missing shard, a truncated or damaged file, an index that
            disagrees with the files or names one elsewhere, a single file beside it, a dtype that
            is not fp32, fp16 or bf16.
    """
    index_file = directory / INDEX_NAME
    if not index_file.exists():
        if not (directory / SINGLE_NAME).exists():
            raise rule_broken(
                field,
                str(directory),
                f"it holds neither {SINGLE_NAME} nor {INDEX_NAME}",
                "save the model as safetensors (save_pretrained of transformers does)",
            )
        _check_others(directory, {SINGLE_NAME}, field, indexed=False)
        return tensors_of_file(directory / SINGLE_NAME, field)
    weight_map = _weight_map(index_file, field)
    shards = sorted(set(weight_map.values()))
    _check_others(directory, set(shards), field, indexed=True)
    if (directory / SINGLE_NAME).exists() and shards != [SINGLE_NAME]:
        raise rule_broken(
            field,
            str(directory / SINGLE_NAME),
            f"it lies beside {index_file.name}, which keeps the weights in {_some(shards)}: "
            "Megatron would read those, transformers this file",
            "remove the one that is out of date",
        )
    held: dict[str, dict[str, StoredTensor]] = {}
    for shard in shards:
        file = directory / shard
        if not file.is_file():
            count = sum(owner == shard for owner in weight_map.values())
            raise rule_broken(
                field,
                str(file),
                f"this shard is missing; {index_file.name} keeps {count} tensors in it",
                COPY_AGAIN,
            )
        held[shard] = tensors_of_file(file, field)
    for name, shard in weight_map.items():
        if name not in held[shard]:
            raise rule_broken(
                field,
                str(directory / shard),
                f"{index_file.name} says that it holds {name}, which it does not",
                COPY_AGAIN,
            )
    for name, shard in _copies(held, weight_map):
        _warn_once(
            f"{directory / shard} also holds {name}, which is read from {weight_map[name]} as "
            f"{index_file.name} says"
        )
    anywhere = {name: tensor for tensors in held.values() for name, tensor in tensors.items()}
    return anywhere | {name: held[shard][name] for name, shard in weight_map.items()}


def _check_others(directory: Path, read: set[str], field: str, *, indexed: bool) -> None:
    """Without an index vLLM reads all safetensors files; one in Mistral's format it reads alone."""
    for file in sorted(directory.glob("*.safetensors")):
        mistral = file.name.startswith("consolidated")
        own = file.name in read or file.name == SINGLE_NAME or file.name == ADAPTER_WEIGHTS
        if not own and (mistral or not indexed):
            raise rule_broken(
                field,
                str(file),
                f"it lies beside {_some(sorted(read))}: Megatron and transformers would read "
                f"{'those' if len(read) > 1 else 'that'}, vLLM "
                f"{'this file' if mistral else 'both'}",
                "remove the one that is out of date, or move it elsewhere",
            )


def tensors_with_copies(directory: Path, field: str) -> dict[str, Path]:
    """Names of the tensors that more than one shard holds, and the file that the index names.

    transformers takes whichever it reads last.

    Raises:
        ConfigError: an index or a shard cannot be read.
    """
    index_file = directory / INDEX_NAME
    if not index_file.exists() or (directory / SINGLE_NAME).exists():
        return {}
    weight_map = _weight_map(index_file, field)
    held = {shard: tensors_of_file(directory / shard, field) for shard in set(weight_map.values())}
    return {name: directory / weight_map[name] for name, _ in _copies(held, weight_map)}


def _copies(
    held: dict[str, dict[str, StoredTensor]], weight_map: dict[str, str]
) -> list[tuple[str, str]]:
    """(tensor, shard) of those that the index says are in another shard."""
    return [
        (name, shard)
        for shard, tensors in held.items()
        for name in tensors
        if weight_map.get(name, shard) != shard
    ]


def _weight_map(index_file: Path, field: str) -> dict[str, str]:
    weight_map = read_json(index_file, field).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise rule_broken(
            field, str(index_file), "it has no weight_map", "repair the file or copy it again"
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise rule_broken(
                field,
                f"{index_file}: {name}: {shard!r}",
                "shards are files of this directory itself: vLLM looks nowhere else",
                COPY_AGAIN,
            )
    return weight_map


def tensors_of_file(file: Path, field: str) -> dict[str, StoredTensor]:
    """Tensors of one safetensors file by name, after checking that its bytes are all there.

    Raises:
        ConfigError: a truncated or damaged file, or a dtype that is not fp32, fp16 or bf16.
    """

    def damaged(rule: str) -> ConfigError:
        return rule_broken(field, str(file), rule, COPY_AGAIN)

    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        header_size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= header_size <= size - 8:
            raise damaged(f"its {size} bytes are no complete safetensors header")
        try:
            header = json.loads(stream.read(header_size))
        except ValueError as error:
            raise damaged(f"its safetensors header is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise damaged("its safetensors header is no JSON object")
    header.pop("__metadata__", None)
    end_of_data = 8 + header_size
    tensors = {}
    for name, entry in header.items():
        try:
            (begin, end), dtype, shape = entry["data_offsets"], entry["dtype"], entry["shape"]
        except (KeyError, TypeError, ValueError):
            raise damaged(f"its header tells of {name} only {entry}") from None
        element = BYTES_PER_ELEMENT.get(dtype)
        if element is None:
            raise rule_broken(
                field,
                f"{file}: {name}: {dtype}",
                f"the dtype must be one of {', '.join(BYTES_PER_ELEMENT)}",
                "save a dequantized copy of the model",
            )
        if end - begin != element * math.prod(shape):
            raise damaged(f"offsets and shape of {name} disagree")
        end_of_data = max(end_of_data, 8 + header_size + end)
        tensors[name] = StoredTensor(file, dtype, tuple(shape))
    if size != end_of_data:
        state = "truncated" if size < end_of_data else "longer than it should be"
        raise damaged(f"{state}: {size} bytes, its header tells of {end_of_data}")
    return tensors


def check_weights(directory: Path, hf: Any, field: str) -> dict[str, StoredTensor]:
    """Refuse a directory that does not hold exactly the tensors of the configuration, in shape.

    Returns all that it holds, by name; besides those, a tied model may hold an output weight. The
    experts of a layer may be stored in one tensor: they are returned one by one.

    Raises:
        ConfigError: see `stored_tensors`; a tensor that is missing, of another shape, or that the
            architecture has no place for (it would be dropped in silence).
    """
    stored, head = _expert_by_expert(stored_tensors(directory, field), hf), family_of(hf).head
    expected = {name: tensor.shape for name, tensor in expected_tensors(hf).items()}
    missing = sorted(expected.keys() - stored.keys())
    if missing == [head]:
        raise rule_broken(
            field,
            str(directory),
            f"its safetensors lack {head}, and config.json does not say that the model "
            "has none (tie_word_embeddings)",
            "set tie_word_embeddings to true there if the embedding is the output layer too, "
            f"else {COPY_AGAIN}",
        )
    if missing:
        raise rule_broken(
            field, str(directory), f"its safetensors lack {_some(missing)}", COPY_AGAIN
        )
    derived = {head} if hf.tie_word_embeddings else set()
    for name in sorted(expected.keys() | (derived & stored.keys())):
        shape = expected.get(name, (hf.vocab_size, hf.hidden_size))
        if stored[name].shape != shape:
            raise rule_broken(
                field,
                f"{stored[name].file}: {name}: {list(stored[name].shape)}",
                f"config.json describes the shape {list(shape)}",
                "give weights and config.json of the same model",
            )
    unknown = sorted(
        name
        for name in stored.keys() - expected.keys() - derived
        if not name.endswith("rotary_emb.inv_freq")
    )
    if unknown:
        raise rule_broken(
            field,
            str(directory),
            f"the {hf.model_type} architecture has no place for {_some(unknown)}",
            "give a plain model of this architecture, adapters merged",
        )
    return stored


def _expert_by_expert(stored: dict[str, StoredTensor], hf: Any) -> dict[str, StoredTensor]:
    """Replace tensors of all experts of a layer, where their shape is right, by each one's own."""
    apart = dict(stored)
    for name, (shape, modules) in fused_tensors(hf).items():
        if name not in stored or stored[name].shape != shape:
            continue
        whole, below = apart.pop(name), name.rpartition(".")[0]
        for expert in range(shape[0]):
            first_row = 0
            for module, rows in modules:
                apart[f"{below}.{expert}.{module}.weight"] = replace(
                    whole, shape=(rows, shape[2]), place=Place(name, expert, first_row)
                )
                first_row += rows
    return apart


@cache
def _warn_once(text: str) -> None:
    """A directory is read several times in a run."""
    log.warning(text)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
