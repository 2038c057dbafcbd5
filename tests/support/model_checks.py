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
from nemo_trd.megatron.model import HiddenStatesModel

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
    batch, length = tokens.shape
    config = models[0].config
    if config.sequence_parallel:
        length //= groups.tp.size()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    hidden = torch.empty(length, batch, config.hidden_size, dtype=config.params_dtype)
    for chunk in models:
        for stage in range(groups.pp.size()):
            if stage == groups.pp.rank():
                chunk.set_input_tensor(hidden)
                hidden = chunk(tokens, positions, None).contiguous()
            dist.broadcast(hidden, group=groups.pp, group_src=stage)
    if config.sequence_parallel:
        hidden = torch.cat(_gathered(hidden, groups.tp))
    rows = torch.empty(tokens.shape[1], batch, vocab_size)
    if models[-1].post_process:
        shard = hidden @ models[-1].output_weight().T
        rows = torch.cat(_gathered(shard, groups.tp), -1)[..., :vocab_size].float().contiguous()
    dist.broadcast(rows, group=groups.pp, group_src=groups.pp.size() - 1)
    return rows.transpose(0, 1)


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
