"""A recipe of Megatron-Bridge trains with TRD: for a container that has Bridge and a CUDA device.

It has not run yet: no machine here has both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from devices import on_devices
from tiny_models import make_model

pytestmark = pytest.mark.gpu
STEPS = 3


def train_with_bridge(inputs: str) -> None:
    """On one rank: three steps of a recipe, whose model is a tiny one."""
    import torch
    from megatron.bridge import AutoBridge
    from megatron.bridge.recipes.qwen.h100.qwen3 import (
        qwen3_600m_pretrain_1gpu_h100_bf16_config as recipe,
    )
    from megatron.bridge.training.pretrain import pretrain

    from nemo_trd.adapters.megatron_bridge import TRD, trd_callback, trd_recipe
    from nemo_trd.config.load import compose

    trd = TRD(
        compose(
            [
                *("model=local", "data=gsm8k", "data.verifier=none", "data.max_prompt_tokens=64"),
                *(f"model.{role}.path={inputs}/{role}" for role in ("student", "teacher")),
                *(f"data.train.path={inputs}/data.jsonl", f"run.dir={inputs}/run"),
                "refinement.templates.opd='{problem} {rollout}'",
                *("refinement.max_context_tokens=200", "refinement.on_failure=rollout"),
                *("generation.rollout.max_tokens=12", "generation.refinement.max_tokens=12"),
                *("train.micro_batch_size=2", "train.max_tokens_per_micro_batch=null"),
                *(f"train.num_steps={STEPS}", "train.prompts_per_step=4"),
            ]
        )
    )
    config = recipe()
    bridge = AutoBridge.from_hf_pretrained(f"{inputs}/student")
    config.model = bridge.to_megatron_provider(load_weights=True)
    config.model.seq_length = 512
    config.tokenizer.tokenizer_model = f"{inputs}/student"
    config.checkpoint.save = f"{inputs}/checkpoints"
    config.logger.log_interval = 1
    callback = trd_callback(trd)
    losses: list[float] = []
    refresh = type(callback).on_train_step_end

    def noted(self: Any, context: Any) -> None:
        losses.append(float(context.loss_dict["loss"]))
        refresh(self, context)

    type(callback).on_train_step_end = noted
    pretrain(trd_recipe(config, trd), trd.forward_step, callbacks=[callback])
    assert len(losses) == STEPS and all(0 < loss < 100 for loss in losses)
    assert torch.isfinite(torch.tensor(losses)).all()
    Path(inputs, "losses.json").write_text(json.dumps(losses))


def test_recipe_of_bridge_trains_with_trd(tmp_path: Path) -> None:
    pytest.importorskip("megatron.bridge")
    sizes: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 2, "head_dim": 32}
    for seed, role in enumerate(("student", "teacher")):
        make_model(tmp_path / role, "qwen3", seed=seed, tokenizer=True, **sizes)
    rows = [f'{{"question": "{n}+1?", "answer": "so #### {n + 1}"}}\n' for n in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(rows))
    on_devices(1, train_with_bridge, str(tmp_path), timeout=600)
    assert len(json.loads((tmp_path / "losses.json").read_text())) == STEPS
