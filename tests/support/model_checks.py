"""What the tests of Megatron models share: a whole forward pass, and transformers' answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from nemo_trd.config.schema import Precision
from nemo_trd.data.types import ContextBatch
from nemo_trd.megatron.model import HiddenStatesModel
from nemo_trd.megatron.schedule import run_model

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

FP32 = Precision(dtype="fp32", fp8=None, teacher_fp8=None, fp8_recipe="tensorwise")
BF16 = Precision(dtype="bf16", fp8=None, teacher_fp8=None, fp8_recipe="tensorwise")


def reference_logits(directory: Path | str, tokens: Tensor) -> Tensor:
    """transformers' logits [b, s, vocabulary] in fp32."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model(tokens).logits


@torch.no_grad()
def logits(
    models: Sequence[HiddenStatesModel],
    tokens: Tensor,
    vocab_size: int,
    groups: ProcessGroupCollection,
) -> Tensor:
    """Logits [b, s, vocabulary] on every rank, stage after stage without a schedule."""
    batch, config = packed(tokens), models[0].config
    length = tokens.numel() // (groups.tp.size() if config.sequence_parallel else 1)
    hidden = torch.empty(length, 1, config.hidden_size, dtype=config.params_dtype)
    for chunk in models:
        for stage in range(groups.pp.size()):
            if stage == groups.pp.rank():
                chunk.set_input_tensor(hidden)
                hidden = run_model(chunk, batch).contiguous()
            dist.broadcast(hidden, group=groups.pp, group_src=stage)
    if config.sequence_parallel:
        hidden = torch.cat(_gathered(hidden, groups.tp))
    rows = torch.empty(tokens.numel(), 1, vocab_size)
    if models[-1].post_process:
        shard = hidden @ models[-1].output_weight().T
        rows = torch.cat(_gathered(shard, groups.tp), -1)[..., :vocab_size].float().contiguous()
    dist.broadcast(rows, group=groups.pp, group_src=groups.pp.size() - 1)
    return rows.view(*tokens.shape, vocab_size)


def packed(tokens: Tensor) -> ContextBatch:
    """The rows of [b, s] as segments; nothing is a label."""
    count, length = tokens.shape
    return ContextBatch(
        tokens=tokens.reshape(1, -1),
        position_ids=torch.arange(length).repeat(count)[None],
        label_positions=torch.empty(0, dtype=torch.long),
        lengths=(length,) * count,
        cu_seqlens=torch.arange(0, tokens.numel() + 1, length, dtype=torch.int32),
    )


def _gathered(own: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(parts, own.contiguous(), group=group)
    return parts


def stored_tensors(directory: Path | str) -> dict[str, Tensor]:
    """All tensors of a Hugging Face directory."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def of_each_expert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of all experts of a layer, as transformers computes with them, one by one."""
    apart = {}
    for name, tensor in tensors.items():
        below, _, last = name.rpartition(".")
        modules = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(last)
        if modules is None:
            apart[name] = tensor
            continue
        for number, expert in enumerate(tensor):
            for module, part in zip(modules, expert.chunk(len(modules)), strict=True):
                apart[f"{below}.{number}.{module}.weight"] = part
    return apart
