"""Saving and resuming a run: Megatron's distributed checkpoint plus the trainer state."""

from __future__ import annotations

import ctypes
import inspect
import logging
import multiprocessing
import queue
import random
import shutil
import signal
from collections.abc import Mapping
from functools import partial
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from safetensors.torch import load_file, save_file

from nemo_trd import checkpoint_dir
from nemo_trd.checkpoint_dir import PARTIAL, TrainerState, checkpoint_name
from nemo_trd.config import Checkpoint
from nemo_trd.megatron.optimizer_states import load_optimizer
from nemo_trd.megatron.student import Student
from nemo_trd.prompt_digests import DIGESTS_FILE
from nemo_trd.types import Refinement

log = logging.getLogger(__name__)

# Optimizer states of a distributed optimizer in a form that any TP, PP and DP can load.
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
# Newer versions of megatron-core would write in the background through another package.
_OWN_WRITER: dict[str, Any] = (
    {"async_strategy": "mcore"}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    else {}
)


class Checkpointer:
    """Saves the student's whole training state below `root`. All methods are collective."""

    def __init__(self, settings: Checkpoint, root: Path, student: Student) -> None:
        self._settings = settings
        self._root = root
        self._student = student
        self._queue = AsyncCallsQueue()
        filesystem_async._results_queue = _results_queue(settings.async_save)

    def save(
        self,
        state: TrainerState,
        samples_ahead: Mapping[int, list[Refinement]] | None = None,
        prompts: bytes = b"",
    ) -> None:
        """Write a checkpoint; with `async_save` return while it is still being written.

        `prompts`: their `prompt_digests.digests`.

        The one before stays the newest until all files of this one are on the disk.
        """
        self.wait()
        final = self._root / checkpoint_name(state.step)
        partial_dir = self._root / (final.name + PARTIAL)
        if dist.get_rank() == 0:
            for leftover in self._root.glob(f"step_*{PARTIAL}"):
                shutil.rmtree(leftover)
            partial_dir.mkdir(parents=True)
        dist.barrier()
        request = dist_checkpointing.save(
            self._state_dict(is_loading=False),
            str(partial_dir),
            async_sharded_save=self._settings.async_save,
            content_metadata=SHARDING,
            **_OWN_WRITER,
        )
        (partial_dir / "rng").mkdir(exist_ok=True)  # megatron-core takes what was there for debris
        save_file(_rng_state(), partial_dir / "rng" / _rng_file())
        if samples_ahead and dist.get_rank() == 0:
            checkpoint_dir.write_samples_ahead(partial_dir, samples_ahead)
        if prompts and dist.get_rank() == 0:
            (partial_dir / DIGESTS_FILE).write_bytes(prompts)
        if request is None:
            self._commit(partial_dir, state)
        else:
            request.add_finalize_fn(partial(self._commit, partial_dir, state))
            self._queue.schedule_async_request(request)

    def poll(self) -> None:
        """Finish a background save that has been written; to be called once a step."""
        self._queue.maybe_finalize_async_calls(blocking=False)

    def wait(self) -> None:
        """Finish every background save."""
        self._queue.maybe_finalize_async_calls(blocking=True)

    def close(self) -> None:
        self._queue.close()

    def load(self, checkpoint: Path) -> TrainerState:
        """Restore the student, also from another parallel layout or kind of optimizer.

        The settings of its optimizer and schedule stay those that it was built with.
        """
        wanted = self._state_dict(is_loading=True)
        optimizer = wanted.pop("optimizer")
        states = dist_checkpointing.load(wanted, str(checkpoint))
        for index, model in enumerate(self._student.models):
            model.load_state_dict(states["model"][f"chunk{index}"])
        load_optimizer(self._student.optimizer, optimizer, checkpoint)
        self._student.scheduler.load_state_dict(states["scheduler"])
        rng = checkpoint / "rng" / _rng_file()
        if rng.is_file():
            _restore_rng_state(load_file(rng))
        else:  # another number of ranks: nothing in a run without dropout draws from these
            log.info("%s has no random state for this layout; the seed's is used", checkpoint)
        return checkpoint_dir.read_state(checkpoint)

    def _commit(self, partial_dir: Path, state: TrainerState) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            final = checkpoint_dir.commit(partial_dir, state, self._settings.keep_last)
            log.info("saved %s", final)
        dist.barrier()

    def _state_dict(self, *, is_loading: bool) -> dict[str, Any]:
        metadata = {**SHARDING, "dp_cp_group": self._student.groups.dp_cp}
        models = {
            f"chunk{index}": model.sharded_state_dict(metadata=metadata)
            for index, model in enumerate(self._student.models)
        }
        return {
            "model": models,
            "optimizer": self._student.optimizer.sharded_state_dict(
                models, is_loading=is_loading, metadata=metadata
            ),
            "scheduler": self._student.scheduler.state_dict(),
        }


def _rng_file() -> str:
    return f"rank_{dist.get_rank():05d}_of_{dist.get_world_size():05d}.safetensors"


def _rng_state() -> dict[str, torch.Tensor]:
    """Every generator of this rank as tensors. A cached normal of `random.gauss` is dropped."""
    version, words, _ = random.getstate()
    numpy_state: Any = numpy.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "numpy": torch.tensor([*map(int, numpy_state[1]), numpy_state[2]], dtype=torch.int64),
        "numpy_gauss": torch.tensor(numpy_state[3:], dtype=torch.float64),
    }
    for name, tracked in get_cuda_rng_tracker().get_states().items():
        state[f"megatron.{name}"] = tracked
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["torch"])
    version, *words = state["python"].tolist()
    random.setstate((version, tuple(words), None))
    *keys, position = state["numpy"].tolist()
    has_gauss, cached = state["numpy_gauss"].tolist()
    numpy.random.set_state(
        ("MT19937", numpy.array(keys, dtype=numpy.uint32), position, int(has_gauss), cached)
    )
    tracked = {
        n.removeprefix("megatron."): t for n, t in state.items() if n.startswith("megatron.")
    }
    get_cuda_rng_tracker().set_states(tracked)
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _results_queue(async_save: bool) -> Any:
    """Where megatron-core's writers put their results.

    Its own is held by a process that stays behind when this one is killed, or ends at once.
    """
    if not async_save:
        return queue.Queue()  # writers are threads and forked processes that report to this one
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(_end_with_parent)
    return manager.Queue()


def _end_with_parent() -> None:
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
