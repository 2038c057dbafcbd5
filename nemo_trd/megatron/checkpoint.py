"""Saves and restores a run: Megatron's distributed checkpoint plus the trainer state."""

from __future__ import annotations

import inspect
import logging
import multiprocessing
import queue
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
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
from torch.distributed.checkpoint.api import CheckpointException

from nemo_trd.config.schema import Checkpoint
from nemo_trd.data.prompt_digests import DIGESTS_FILE
from nemo_trd.data.types import Refinement
from nemo_trd.distributed.exchange import all_come, from_first_rank
from nemo_trd.distributed.parent import end_with_parent
from nemo_trd.megatron.model_states import load_models
from nemo_trd.megatron.optimizer import fill_states
from nemo_trd.megatron.optimizer_states import load_optimizer
from nemo_trd.megatron.student import Student
from nemo_trd.records import checkpoint_dir, checksums, disk_space, latest
from nemo_trd.records.abandoned import begin_line
from nemo_trd.records.checkpoint_dir import PARTIAL, TrainerState, checkpoint_name

log = logging.getLogger(__name__)

# Optimizer states of a distributed optimizer in a form that any TP, PP and DP can load, and any EP:
# then the states of experts, which have an optimizer of their own, have names like all others.
SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}
# Newer versions of megatron-core would write in the background through another package.
_OWN_WRITER: dict[str, Any] = (
    {"async_strategy": "mcore"}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    else {}
)
CLOSE_SECONDS = 10.0  # within which all ranks fail where the cause is that of all


class SaveFailed(RuntimeError):
    """A checkpoint could not be written. The message is one line: cause and newest checkpoint."""


class Checkpointer:
    """Saves the student's whole training state below `root`. All methods are collective."""

    def __init__(self, settings: Checkpoint, root: Path, student: Student, needed: int) -> None:
        """Prepare to save.

        Args:
            needed: estimated bytes of a checkpoint; measured ones replace them.
        """
        self._settings = settings
        self._root = root
        self._student = student
        self._needed = needed
        self._queue = AsyncCallsQueue()
        self._under_way: Path | None = None  # a background save
        filesystem_async._results_queue = _results_queue(settings.async_save)
        # An error in a writer is raised here; megatron-core prints it besides.
        logging.getLogger(filesystem_async.__name__).setLevel(logging.CRITICAL)

    def begin(self, resumed: Path | None) -> list[str]:
        """Make room for the checkpoints of this run; return lines for the log, on rank 0."""
        lines: list[str] = []
        if dist.get_rank() == 0:
            if resumed is not None:
                self._needed = checkpoint_dir.checkpoint_size(resumed)
            lines = begin_line(self._root, resumed)
        dist.barrier()
        return lines

    def save(
        self,
        state: TrainerState,
        samples_ahead: Mapping[int, list[Refinement]] | None = None,
        prompts: bytes = b"",
    ) -> None:
        """Write a checkpoint; with `async_save` return while it is still being written.

        The one before stays the newest until all files of this one are on the disk.

        Args:
            samples_ahead: refinements made for later steps, by step.
            prompts: `prompt_digests.digests` of the run's prompts.

        Raises:
            SaveFailed: on all ranks; the files written so far are removed.
        """
        self.wait()
        partial_dir = self._root / (checkpoint_name(state.step) + PARTIAL)
        self._make_room(partial_dir)
        with self._explained(partial_dir):
            # Also a save in the foreground: the writers' work is then in reach here.
            request = dist_checkpointing.save(
                self._state_dict(is_loading=False),
                str(partial_dir),
                async_sharded_save=True,
                content_metadata=SHARDING,
                **_OWN_WRITER,
            )
            if request.async_fn is not None:
                write = partial(_write_and_hash, request.async_fn, partial_dir)
                request = request._replace(async_fn=write)
            (partial_dir / "rng").mkdir(exist_ok=True)  # megatron-core takes it for debris if first
            save_file(_rng_state(), partial_dir / "rng" / _rng_file())
            if samples_ahead and dist.get_rank() == 0:
                checkpoint_dir.write_samples_ahead(partial_dir, samples_ahead)
            if prompts and dist.get_rank() == 0:
                (partial_dir / DIGESTS_FILE).write_bytes(prompts)
            request.add_finalize_fn(partial(self._commit, partial_dir, state))
            if self._settings.async_save:
                self._under_way = partial_dir
                self._queue.schedule_async_request(request)
            else:
                request.execute_sync()

    def poll(self) -> None:
        """Finish a background save whose files are written; call it once a step."""
        self._finish(blocking=False)

    def wait(self) -> None:
        """Finish every background save."""
        self._finish(blocking=True)

    def _finish(self, *, blocking: bool) -> None:
        if self._under_way is not None:
            with self._explained(self._under_way):
                self._queue.maybe_finalize_async_calls(blocking=blocking)
        if not self._queue.get_num_unfinalized_calls():
            self._under_way = None

    def close(self, succeeded: bool = True) -> None:
        """Finish a background save and end the writers. Collective if the run has `succeeded`.

        After a failure a save is finished if all ranks have failed, and else given up: the others
        wait elsewhere for this rank, and are to hear of the cause.
        """
        unfinished = self._queue.get_num_unfinalized_calls()
        if succeeded or not unfinished or all_come("close", CLOSE_SECONDS):
            self.wait()
            self._queue.close()
            return
        for call in self._queue.async_calls:
            call.async_caller.close(abort=True)

    def _make_room(self, partial_dir: Path) -> None:
        """Make the directory to write into; refuse a checkpoint for which the disk has no room."""
        problem: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                problem = [disk_space.lacking(self._root, self._needed)]
                if problem == [None]:
                    if partial_dir.exists():
                        shutil.rmtree(partial_dir)
                    partial_dir.mkdir(parents=True)
            except OSError as error:
                problem = [str(error)]
        dist.broadcast_object_list(problem, src=0)
        if problem[0] is not None:
            raise SaveFailed(self._message(partial_dir, problem[0]))

    @contextmanager
    def _explained(self, partial_dir: Path) -> Iterator[None]:
        """Turn any error of a save into a SaveFailed of one line, and give its space back.

        megatron-core raises CheckpointException on all ranks together and gives the cause to rank 0
        alone. Any other error is of this rank alone; the other ranks are ended with its cause.
        """
        try:
            yield
        except (Exception, CheckpointException) as error:
            cause = ""
            origin: BaseException | None = None  # shown with its trace, unless the disk is full
            if dist.get_rank() == 0:
                shutil.rmtree(partial_dir, ignore_errors=True)
            if dist.get_rank() == 0 or not isinstance(error, CheckpointException):
                full = self._full(error)
                cause = full or self._first_line(error)
                origin = error if full is None else None
            if isinstance(error, CheckpointException):
                cause = from_first_rank(lambda: cause)
            raise SaveFailed(self._message(partial_dir, cause)) from origin

    def _full(self, error: BaseException) -> str | None:
        """Message that the disk is full; None where something else ended the save.

        torch's writer hides the error of the system ("unexpected pos 704 vs 598"), so this looks
        at the free space.
        """
        message = disk_space.lacking(self._root, self._needed)
        if message is None and any(map(disk_space.is_full, _causes(error))):
            free = disk_space.free_bytes(self._root) or 0
            message = (
                "a write was cut short (no space left, or a quota): "
                f"{disk_space.size(free)} are free in "
                f"{self._root} now, and a checkpoint needs {disk_space.size(self._needed)}"
            )
        return message

    def _first_line(self, error: BaseException) -> str:
        cause = _causes(error)[0]
        line = next(iter(str(cause).splitlines()), "")
        return f"{self._root} cannot be written to ({type(cause).__name__}: {line})"

    def _message(self, partial_dir: Path, cause: str) -> str:
        name = partial_dir.name.removesuffix(PARTIAL)
        checkpoint = latest.read(self._root)
        newest = (
            f"The newest checkpoint is {checkpoint}" if checkpoint else "There is no checkpoint yet"
        )
        return f"{name} could not be saved: {cause}. {newest}."

    def load(self, checkpoint: Path) -> TrainerState:
        """Restore the student, also from another parallel layout or kind of optimizer or layers.

        The settings of its optimizer and schedule stay those that it was built with.
        """
        state_dict = self._state_dict(is_loading=True)
        optimizer = state_dict.pop("optimizer")
        whole = self._student.adapter is None
        states = load_models(self._student.models, state_dict, checkpoint, strict=whole)
        load_optimizer(self._student.optimizer, optimizer, checkpoint)
        self._student.scheduler.load_state_dict(states["scheduler"])
        if self._student.average is not None:
            self._student.load_average(states["average"])
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
            self._needed = checkpoint_dir.checkpoint_size(final)
            log.info("saved %s", final)
        dist.barrier()

    def _state_dict(self, *, is_loading: bool) -> dict[str, Any]:
        metadata = {**SHARDING, "dp_cp_group": self._student.groups.dp_cp}
        fill_states(self._student.optimizer)
        models, average = self._student.sharded_state_dict(metadata), self._student.average
        return {
            **({} if average is None else {"average": average.sharded_state_dict(models)}),
            "model": models,
            "optimizer": self._student.optimizer.sharded_state_dict(
                models, is_loading=is_loading, metadata=metadata
            ),
            "scheduler": self._student.scheduler.state_dict(),
        }


def _causes(error: BaseException) -> list[BaseException]:
    """Errors of the ranks that failed, from a CheckpointException; else the error itself."""
    return [cause for cause, _ in getattr(error, "failures", {}).values()] or [error]


def _write_and_hash(
    write: Callable[..., None], directory: Path, rank: int, buckets: list[Any], results: Any
) -> None:
    """Write a rank's files as megatron-core does, and their checksums while they are cached.

    A background save runs this in a process beside the training. Without the checksums, say on a
    full disk, the rank that commits computes them, or fails with the same error.
    """
    write(rank, buckets, results)
    with suppress(OSError):
        checksums.leave(directory, rank, [name for _, name, _ in buckets])


def _rng_file() -> str:
    return f"rank_{dist.get_rank():05d}_of_{dist.get_world_size():05d}.safetensors"


def _rng_state() -> dict[str, torch.Tensor]:
    """States of all random generators of this rank, as tensors.

    A cached normal of `random.gauss` is dropped.
    """
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
    """Queue for the results of megatron-core's writers.

    That of megatron-core lives in a process that stays behind when this one is killed.
    """
    if not async_save:
        return queue.Queue()  # writers are threads and forked processes that report to this one
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(end_with_parent)
    return manager.Queue()
