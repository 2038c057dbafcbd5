"""What the CPU support promises: Megatron works, and nothing else notices it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from model_checks import BF16, FP32, packed
from tiny_models import make_model

from nemo_trd.config.schema import Layout, Precision
from nemo_trd.megatron import torch_adam
from nemo_trd.megatron.hf_weights import load_hf_weights
from nemo_trd.megatron.model import build_model, load_hf_config
from nemo_trd.megatron.schedule import run_model

SINGLE = Layout(tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
TOKENS = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))


class Training:
    """A model and its optimizer, as the student has them."""

    def __init__(
        self, directory: Path, groups: Any, precision: Precision, distributed: bool
    ) -> None:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        hf = load_hf_config(str(directory))
        (self.model,) = build_model(hf, SINGLE, groups, precision)
        load_hf_weights([self.model], hf, str(directory), groups)
        settings = DistributedDataParallelConfig(
            use_distributed_optimizer=distributed, grad_reduce_in_fp32=True
        )
        self.wrapped = DistributedDataParallel(
            self.model.config, settings, self.model, pg_collection=groups
        )
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=1e-2,
                clip_grad=1.0,
                bf16=precision.dtype == "bf16",
                params_dtype=self.model.config.params_dtype,
                use_distributed_optimizer=distributed,
            ),
            [self.wrapped],
            use_gloo_process_groups=False,
            pg_collection=groups,
        )
        self.metadata = {"distrib_optim_sharding_type": "fully_reshardable"} if distributed else {}
        self.metadata |= {"dp_cp_group": groups.dp_cp}

    def step(self) -> float:
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        rows, length = TOKENS.shape
        hidden = run_model(self.wrapped, packed(TOKENS))
        scores = (hidden @ self.model.output_weight().T).view(rows, length, -1)[:, :-1, :300]
        loss = torch.nn.functional.cross_entropy(
            scores.flatten(0, 1).float(), TOKENS[:, 1:].flatten()
        )
        loss.backward()
        self.wrapped.finish_grad_sync()
        updated, norm, _ = self.optimizer.step()
        assert updated and norm > 0
        return loss.item()

    def state(self, is_loading: bool) -> dict[str, Any]:
        model = self.model.sharded_state_dict(metadata=self.metadata)
        optimizer = self.optimizer.sharded_state_dict(
            model, is_loading=is_loading, metadata=self.metadata
        )
        return {"model": model, "optimizer": optimizer}


@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("distributed", [False, True])
def test_megatron_optimizers_learn_and_resume_exactly(
    tmp_path: Path, one_rank: Any, precision: Precision, distributed: bool
) -> None:
    from megatron.core import dist_checkpointing

    directory = make_model(tmp_path / "model", "llama", num_hidden_layers=1)
    training = Training(directory, one_rank, precision, distributed)
    losses = [training.step() for _ in range(3)]
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    dist_checkpointing.save(training.state(is_loading=False), str(checkpoint))
    losses += [training.step() for _ in range(3)]
    assert losses[-1] < losses[0] - 0.5

    resumed = Training(directory, one_rank, precision, distributed)
    state = dist_checkpointing.load(resumed.state(is_loading=True), str(checkpoint))
    resumed.model.load_state_dict(state["model"])
    resumed.optimizer.load_state_dict(state["optimizer"])
    assert [resumed.step() for _ in range(3)] == losses[3:]


def test_where_there_is_cuda_the_states_of_torchs_adam_are_saved_likewise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    patched = DistributedOptimizer.load_state_dict
    for name in ("_set_main_param_and_optimizer_states", "load_state_dict", "sharded_state_dict"):
        monkeypatch.setattr(DistributedOptimizer, name, getattr(DistributedOptimizer, name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch_adam, "_installed", False)
    torch_adam.install()
    assert patched.__module__ == torch_adam.__name__  # at import, and now again
    assert DistributedOptimizer.load_state_dict is not patched


def test_transformers_and_torch_are_as_they_were(tmp_path: Path) -> None:
    directory = make_model(tmp_path, "llama")
    script = (
        "import sys, torch\n"
        "if sys.argv[1] == 'with': import nemo_trd.megatron\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[2])\n"
        "with torch.device('meta'): print(torch.zeros(1).device)\n"
        "print(model.model.rotary_emb.inv_freq.tolist(), torch.zeros(1).type())\n"
        "print(torch.cuda.is_available(), torch.cuda.device_count())\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script, when, str(directory)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for when in ("with", "without")
    ]
    assert outputs[0] == outputs[1]
    assert "meta" in outputs[0]
