"""The process side of a run: device, rendezvous, signals, and ending all ranks when one fails."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)

REQUEUE_EXIT_CODE = 75  # EX_TEMPFAIL: the run was asked to stop, saved, and can be resumed
FAILURE_KEY = "nemo_trd/failure"
POLL_SECONDS = 0.5


def device() -> torch.device:
    """Where this rank computes."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def world_from_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun or srun set them; one process without either."""
    environment = os.environ
    if "RANK" in environment:
        rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        return rank, world, int(environment.get("LOCAL_RANK", 0))
    # SLURM_* are also set in a plain `salloc` shell; only srun's steps have ranks of their own.
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        rank, world = int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"])
        return rank, world, int(environment["SLURM_LOCALID"])
    return 0, 1, 0


def init_distributed(timeout_minutes: float) -> FailureWatch:
    """Join the other ranks: NCCL for CUDA tensors where there are any, gloo for the rest.

    Raises:
        ValueError: several ranks without MASTER_ADDR and MASTER_PORT.
    """
    rank, world, local_rank = world_from_environment()
    if world > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise ValueError(
            f"WORLD_SIZE = {world}: several ranks meet at MASTER_ADDR:MASTER_PORT. "
            "Fix: launch with torchrun, or export both before srun."
        )
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(local_rank))
    timeout = timedelta(minutes=timeout_minutes)
    store: dist.Store
    if world == 1:
        store = dist.HashStore()
    else:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return FailureWatch(store)


class FailureWatch:
    """Ends this process when another rank has failed, also while it waits in a collective."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="failure-watch", daemon=True)
        if dist.get_world_size() > 1:
            self._thread.start()

    def _watch(self) -> None:
        # The main thread may block on its own connection. (The type stubs lack this method.)
        store: dist.Store = getattr(self._store, "clone")()  # noqa: B009
        while not self._done.wait(POLL_SECONDS):
            try:
                failed = store.check([FAILURE_KEY])
                cause = store.get(FAILURE_KEY).decode() if failed else ""
            except RuntimeError:
                if self._done.is_set():
                    return
                cause = "the rank that holds the rendezvous store is gone"
            if cause:
                end_process(f"rank {dist.get_rank()} stops: {cause}", 1)

    def fail(self, error: BaseException) -> None:
        """Report `error` as the cause unless another rank was first, and end this process."""
        self._done.set()
        traceback.print_exception(error)
        own = f"rank {dist.get_rank()} failed first: {type(error).__name__}: {error}"
        try:
            cause = self._store.compare_set(FAILURE_KEY, "", own).decode()
        except RuntimeError:
            cause = own
        if dist.get_world_size() > 1:
            time.sleep(4 * POLL_SECONDS)  # the store may live here: let the others read it
        end_process(f"rank {dist.get_rank()} stops: {cause}", 1)

    def close(self) -> None:
        """Leave together with the other ranks."""
        dist.barrier()
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        dist.destroy_process_group()


def end_process(message: str, code: int) -> None:
    """Exit at once: no destructor of a process group may wait for a rank that is gone."""
    print(message, file=sys.stderr, flush=True)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)


class StopRequest:
    """Whether the run should save and leave after the step that it is in.

    SIGTERM and SIGUSR1 (preemption, time limit) leave with `REQUEUE_EXIT_CODE`; a file named
    `stop` in the run directory leaves with 0, and is removed when it is obeyed.
    """

    def __init__(self, run_dir: Path) -> None:
        self._stop_file = run_dir / "stop"
        self._signal = 0
        self._previous: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def signalled(self) -> bool:
        """Whether this rank has been told to leave: it should not wait long for anything."""
        return self._signal != 0

    def exit_code(self) -> int | None:
        """None to go on. Collective: all ranks get the same answer."""
        asked = torch.tensor([int(self.signalled()), int(self._stop_file.exists())])
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        signalled, stop_file = asked.tolist()
        if signalled:
            return REQUEUE_EXIT_CODE
        if not stop_file:
            return None
        if dist.get_rank() == 0:
            self._stop_file.unlink(missing_ok=True)
        return 0

    def close(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
