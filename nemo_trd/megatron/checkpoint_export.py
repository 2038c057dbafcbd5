"""Converts a run's checkpoint to a Hugging Face directory, in one process."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

from nemo_trd.config.errors import rule_broken
from nemo_trd.config.schema import Adapter, Layout, ModelSource, Precision
from nemo_trd.distributed.process import init_distributed
from nemo_trd.megatron import lora
from nemo_trd.megatron.checkpoint import SHARDING
from nemo_trd.megatron.hf_weights import export_hf_weights, load_hf_weights
from nemo_trd.megatron.model import build_model, load_hf_config
from nemo_trd.megatron.model_states import load_models
from nemo_trd.megatron.process_groups import process_groups
from nemo_trd.megatron.verification import damage
from nemo_trd.models.write import save_hf_directory

log = logging.getLogger(__name__)

ALONE = Layout(tensor_model_parallel_size=1, pipeline_model_parallel_size=1)


def export_checkpoint(
    checkpoint: Path,
    source: ModelSource,
    dtype: Literal["fp32", "bf16"],
    out_dir: Path,
    adapter: Adapter | None = None,
) -> None:
    """Write the student of a checkpoint, of whatever layout, to `out_dir`.

    Its files are verified first. Optimizer states are not read. The whole model is in the memory
    of this process's device.

    Args:
        source: directory that the run began with: config.json and tokenizer come from there.
        adapter: what the run trained, if it was not the weights: it is merged into those of
            `source`.

    Raises:
        ConfigError: with the damaged file of the checkpoint.
    """
    log.info("converting %s to %s", checkpoint, out_dir)
    watch = init_distributed(timeout_minutes=60)
    reason = damage(checkpoint)
    if reason is not None:
        raise rule_broken("model.path", str(checkpoint), reason, "name another checkpoint")
    groups = process_groups(ALONE)
    hf = load_hf_config(source.path, source.trust_remote_code)
    precision = Precision(dtype=dtype, fp8=None, teacher_fp8=None, fp8_recipe="tensorwise")
    models = build_model(hf, ALONE, groups, precision, recompute="none", fp8=None)
    added = {}
    if adapter is None:
        metadata = {**SHARDING, "dp_cp_group": groups.dp_cp}
        load_models(models, _states(models[0].sharded_state_dict(metadata=metadata)), checkpoint)
    else:
        load_hf_weights(models, hf, source.path, groups)
        zero = adapter.model_copy(update={"init": "kaiming"})  # its own may be gone by now
        lora.add_adapters(models, hf, zero, groups, seed=0)
        states = _states(lora.sharded_state_dict(models[0], groups))
        load_models(models, states, checkpoint, strict=False)
        added = lora.added_to_weights(models, adapter)
    save_hf_directory(export_hf_weights(models, hf, groups, added), source.path, out_dir)
    watch.close()


def _states(tensors: dict[str, Any]) -> dict[str, Any]:
    return {"model": {"chunk0": tensors}}
