"""A short training run on tiny models: its settings, and its entry point with a fault."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

STEPS = 4


def run_training(overrides: list[str], fault: str) -> None:
    """On every rank: the entry point, with one thing that goes wrong in it."""
    import torch.distributed as dist

    from nemo_trd.config.load import compose
    from nemo_trd.megatron.checkpoint import Checkpointer
    from nemo_trd.megatron.student import Student
    from nemo_trd.records import checkpoint_dir
    from nemo_trd.records.run_logger import RunLogger
    from nemo_trd.train import launch

    record, train_step, save = RunLogger.step, Student.train_step, Checkpointer.save

    def signalled(self: Any, step: int, *rest: Any) -> None:
        record(self, step, *rest)
        if step == STEPS // 2 and dist.get_rank() == 0:
            os.kill(os.getpid(), getattr(signal, fault))

    def broken(self: Any, *arguments: Any) -> Any:
        if dist.get_rank() == dist.get_world_size() - 1:
            raise RuntimeError("broken on purpose")
        return train_step(self, *arguments)

    rank_process = os.getpid()

    def killed(*arguments: Any) -> None:
        os.kill(rank_process, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)  # megatron-core writes shards in a forked process

    def killed_in_save(self: Any, state: Any, *rest: Any) -> None:
        if state.step == STEPS:
            if fault == "killed before a shard is on the disk":
                os.fsync = killed
            else:
                checkpoint_dir.os.rename = killed
        save(self, state, *rest)

    if fault.startswith("SIG"):
        RunLogger.step = signalled  # type: ignore[method-assign]
    if fault == "exception":
        Student.train_step = broken  # type: ignore[method-assign]
    if fault.startswith("killed"):
        Checkpointer.save = killed_in_save  # type: ignore[method-assign]
    exit_code = launch(compose(overrides))
    if fault == "started once more":
        exit_code = launch(compose([*overrides, f"train.num_steps={STEPS - 1}"]))
    sys.exit(exit_code)


def settings(inputs: Path, run_dir: Path, *overrides: str) -> list[str]:
    sampling = [
        f"generation.{which}.{setting}"
        for which in ("rollout", "refinement")
        for setting in ("max_tokens=12", "temperature=1.0", "top_k=0", "top_p=1.0")
    ]
    return [
        *("model=local", "data=gsm8k", "data.max_prompt_tokens=64", "data.verifier=exact"),
        *(f"model.{role}.path={inputs / role}" for role in ("student", "teacher")),
        *(f"data.train.path={inputs / 'data.jsonl'}", f"run.dir={run_dir}"),
        *("refinement.templates.opd='{problem} {rollout}'", "refinement.max_context_tokens=200"),
        *("refinement.on_failure=rollout", *sampling),
        *(f"train.num_steps={STEPS}", "train.prompts_per_step=4", "precision.dtype=fp32"),
        *("optimizer.lr=1e-3", "logging.progress=false", "logging.samples_interval=2"),
        *overrides,
    ]
