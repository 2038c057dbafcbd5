"""A local Hugging Face model directory: what must be in it, checking it, and writing one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from nemo_trd.config import ConfigError
from nemo_trd.megatron.model import head_dim

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
READABLE_DTYPES = ("F32", "BF16", "F16")
LARGEST_HEADER = 100_000_000  # bytes; the limit that the safetensors library has
COPIED_SUFFIXES = (".json", ".jinja", ".model", ".py", ".tiktoken", ".txt")


def expected_shapes(hf: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model, in the order of the layers."""
    hidden, inner, head = hf.hidden_size, hf.intermediate_size, head_dim(hf)
    heads = {"q": hf.num_attention_heads, "k": hf.num_key_value_heads, "v": hf.num_key_value_heads}
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (hf.vocab_size, hidden)}
    for layer in range(hf.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        for letter, count in heads.items():
            shapes[f"{prefix}self_attn.{letter}_proj.weight"] = (count * head, hidden)
            if hf.model_type == "qwen2":
                shapes[f"{prefix}self_attn.{letter}_proj.bias"] = (count * head,)
            if hf.model_type == "qwen3" and letter != "v":
                shapes[f"{prefix}self_attn.{letter}_norm.weight"] = (head,)
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, heads["q"] * head)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes[prefix + "mlp.gate_proj.weight"] = (inner, hidden)
        shapes[prefix + "mlp.up_proj.weight"] = (inner, hidden)
        shapes[prefix + "mlp.down_proj.weight"] = (hidden, inner)
    shapes["model.norm.weight"] = (hidden,)
    if not hf.tie_word_embeddings:
        shapes[HEAD] = (hf.vocab_size, hidden)
    return shapes


def check_hf_directory(path: str, hf: PretrainedConfig) -> dict[str, Path]:
    """Check the weights of a directory from file headers alone; return tensor name -> file.

    Raises:
        ConfigError: a missing, truncated or unreadable file; tensors that are missing, unexpected,
            of another shape than config.json says, or of a dtype other than fp32, bf16, fp16.
    """
    tensors: dict[str, dict[str, Any]] = {}
    files: dict[str, Path] = {}
    for file in _weight_files(Path(path)):
        for name, entry in _read_header(file).items():
            tensors[name], files[name] = entry, file
    expected = expected_shapes(hf)
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise ConfigError(
            f"{path} lacks {_listing(missing)}, which a {hf.model_type} model of config.json's "
            "size has. Fix: complete the download or correct config.json."
        )
    optional = {HEAD: (hf.vocab_size, hf.hidden_size)} | expected  # tied models may carry it too
    unexpected = [
        name
        for name in tensors
        if name not in optional and not name.endswith("rotary_emb.inv_freq")  # old Llama files
    ]
    if unexpected:
        raise ConfigError(
            f"{path} has {_listing(unexpected)}, which a {hf.model_type} model of config.json's "
            "size does not have. Fix: give the config.json that belongs to these weights."
        )
    for name, shape in optional.items():
        if name in tensors:
            _check_tensor(files[name], name, tensors[name], shape)
    return files


def _check_tensor(file: Path, name: str, entry: dict[str, Any], shape: tuple[int, ...]) -> None:
    if tuple(entry["shape"]) != shape:
        raise ConfigError(
            f"{file}: {name} has shape {entry['shape']}, config.json says {list(shape)}. "
            "Fix: give the config.json that belongs to these weights."
        )
    if entry["dtype"] not in READABLE_DTYPES:
        raise ConfigError(
            f"{file}: {name} has dtype {entry['dtype']}; {', '.join(READABLE_DTYPES)} can be read. "
            "Fix: convert the model to one of these, without quantization."
        )


def _weight_files(path: Path) -> list[Path]:
    index = path / INDEX_FILE
    if not index.exists():
        if not (path / SINGLE_FILE).exists():
            raise ConfigError(
                f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}. "
                "Fix: give a directory with safetensors weights."
            )
        return [path / SINGLE_FILE]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{index} is not a safetensors index: {error!r}. Fix: download it again."
        ) from error
    for name in names:
        if not (path / name).exists():
            raise ConfigError(
                f"{path / name} is missing, {INDEX_FILE} names it as one of {len(names)} files. "
                "Fix: complete the download."
            )
    return [path / name for name in names]


def _read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Name -> {dtype, shape, data_offsets}, after checking that the file is as long as it says."""
    actual = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            if actual < 8 + length or length > LARGEST_HEADER:
                raise ValueError(f"{actual} bytes do not hold a header of {length}")
            header = json.loads(stream.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"{file} is truncated or no safetensors file: {error}. Fix: download it again."
            ) from error
    if actual != 8 + length + end:
        raise ConfigError(
            f"{file} has {actual} bytes, its header says {8 + length + end}: it is truncated or "
            "damaged. Fix: download it again."
        )
    return tensors


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown})"


def save_hf_directory(
    tensors: Iterable[tuple[str, Tensor]],
    source_path: str,
    out_dir: str | Path,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a Hugging Face model directory; it appears under its name only when it is complete.

    Every rank consumes `tensors`, rank 0 writes. Config, tokenizer and generation settings are
    copied from `source_path`; the dtype in config.json becomes that of the tensors. An existing
    `out_dir` is replaced. Returns, on every rank, when the directory is there.
    """
    writer = not dist.is_initialized() or dist.get_rank() == 0
    target = Path(out_dir)
    temporary = target.with_name(f".{target.name}.tmp")
    if writer:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        dtype = _write_shards(tensors, temporary, max_shard_bytes)
        _copy_settings(Path(source_path), temporary, dtype)
        _replace(target, temporary)
    else:
        for _ in tensors:
            pass
    if dist.is_initialized():
        dist.barrier()


def _write_shards(
    tensors: Iterable[tuple[str, Tensor]], directory: Path, max_shard_bytes: int
) -> torch.dtype:
    shards: list[list[str]] = []
    total, pending, pending_bytes = 0, dict[str, Tensor](), 0
    dtype = torch.float32

    def flush() -> None:
        save_file(pending, directory / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > max_shard_bytes:
            flush()
            pending_bytes = 0
        # The caller may reuse or change the tensor: keep a copy of it.
        pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        dtype, total = tensor.dtype, total + tensor.nbytes
        pending_bytes += tensor.nbytes
    flush()
    if len(shards) == 1:
        os.rename(directory / "0.part", directory / SINGLE_FILE)
        return dtype
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.rename(directory / f"{number}.part", directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2))
    return dtype


def _copy_settings(source: Path, directory: Path, dtype: torch.dtype) -> None:
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in COPIED_SUFFIXES and file.name != INDEX_FILE:
            shutil.copyfile(file, directory / file.name)
    config = json.loads((directory / "config.json").read_text())
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    config |= dict.fromkeys(keys, str(dtype).removeprefix("torch."))
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _replace(target: Path, temporary: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(temporary, target)
    shutil.rmtree(old, ignore_errors=True)
