"""Writing directories of Hugging Face: of a model, and of a LoRA adapter."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from nemo_trd.config.schema import Adapter
from nemo_trd.models.directory import ADAPTER_NAME, ADAPTER_WEIGHTS, INDEX_NAME, SINGLE_NAME
from nemo_trd.models.peft import BASE_DIGEST, config_json

COPIED_SUFFIXES = (".json", ".jinja", ".model", ".py", ".tiktoken", ".txt")  # not weights
# Files that let a reader look for other weights, an adapter, quantized or renamed ones, or that
# tell of another training.
NOT_COPIED = (
    *("*.index.json", "adapter_*", "quant*", "hf_quant*", "modules.json", "params.json"),
    *("trainer_state.json", "training_args.json", "*_results.json"),
)
CHAT_TEMPLATES = "additional_chat_templates"


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
        replace_directory(target, temporary)
    else:
        for _ in tensors:
            pass
    if dist.is_initialized():
        dist.barrier()


def save_adapter_directory(
    tensors: Iterable[tuple[str, Tensor]],
    hf: Any,
    adapter: Adapter,
    source_path: str,
    digest: str,
    out_dir: Path,
) -> None:
    """Write an adapter that PEFT loads; it appears under its name only when it is complete.

    Every rank consumes `tensors`, rank 0 writes. An existing `out_dir` is replaced. Returns, on
    every rank, when the directory is there.

    Args:
        tensors: those of `peft.adapter_tensors`, whole.
        hf: config of the model that it belongs to.
        source_path: directory of that model.
        digest: `peft.weights_digest` of it.
    """
    held = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors}
    if not dist.is_initialized() or dist.get_rank() == 0:
        temporary = out_dir.with_name(f".{out_dir.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        metadata = {"format": "pt", BASE_DIGEST: digest}
        save_file(held, temporary / ADAPTER_WEIGHTS, metadata=metadata)
        settings = json.dumps(config_json(hf, adapter, source_path), indent=2)
        (temporary / ADAPTER_NAME).write_text(settings + "\n")
        replace_directory(out_dir, temporary)
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
        os.rename(directory / "0.part", directory / SINGLE_NAME)
        return dtype
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.rename(directory / f"{number}.part", directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2))
    return dtype


def _copy_settings(source: Path, directory: Path, dtype: torch.dtype) -> None:
    for file in sorted(source.iterdir()):
        excluded = any(fnmatch(file.name, pattern) for pattern in NOT_COPIED)
        if file.is_file() and file.suffix in COPIED_SUFFIXES and not excluded:
            shutil.copyfile(file, directory / file.name)
    if (source / CHAT_TEMPLATES).is_dir():
        shutil.copytree(source / CHAT_TEMPLATES, directory / CHAT_TEMPLATES)
    config = json.loads((directory / "config.json").read_text())
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    config |= dict.fromkeys(keys, str(dtype).removeprefix("torch."))
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def replace_directory(target: Path, temporary: Path) -> None:
    """Give a complete directory its name; one that has it already is removed."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(temporary, target)
    shutil.rmtree(old, ignore_errors=True)
