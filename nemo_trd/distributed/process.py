"""Process side of a run: device, rendezvous, and the end of all ranks when one fails."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from nemo_trd.config.errors import ConfigError, rule_broken
from nemo_trd.records.last_line import Cause, end_process, leave, say_last

FAILURE_KEY, RECORDED_KEY = "nemo_trd/failure", "nemo_trd/failure_recorded"
POLL_SECONDS = 0.5
# For CUDA and torch, which read them when they first touch a GPU; what the caller has set holds.
TRAINING_ENVIRONMENT = {
    # One queue to the GPU: kernels start in the order in which they were launched. megatron-core
    # and TransformerEngine launch the communication of tensor parallel ranks before the matrix
    # product that it overlaps with, and rely on it to start first.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # Every micro-batch has another length: blocks of fixed size would leave holes that none fits.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}
IsOurs = Callable[[str, int], bool]
RECORD_SECONDS = 5.0  # in which rank 0 writes down the cause; else the rank that failed does


def device() -> torch.device:
    """Device on which this rank computes."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def to_device(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on this rank's device. The host does not wait for the copy.

    From pageable memory it would: until the device has done all that was asked of it before.
    """
    if device().type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device(), non_blocking=True)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned host memory for `to_device`, for which the host does not wait either.

    The host itself must not read it: it is complete when the device has come so far. A tensor that
    is on the host already is returned as it is.
    """
    if not tensor.is_cuda:
        return tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)


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


def set_training_environment() -> None:
    """Set `TRAINING_ENVIRONMENT`, where neither the variable nor its other name is set."""
    for name, value in TRAINING_ENVIRONMENT.items():
        if name.replace("_CUDA_ALLOC_", "_ALLOC_") not in os.environ:  # of torch 2.9 and newer
            os.environ.setdefault(name, value)


_timeout: timedelta | None = None  # of `init_distributed`


def new_group(ranks: Sequence[int] | None = None, **how: Any) -> dist.ProcessGroup:
    """Make a group with the time limit of the world; torch gives any other half an hour, or less.

    Collective. Arguments as `torch.distributed.new_group` has them.
    """
    group: dist.ProcessGroup = dist.new_group(ranks, timeout=_timeout, **how)
    return group


def init_distributed(
    timeout_minutes: float, log_file: Path | None = None, is_ours: IsOurs | None = None
) -> FailureWatch:
    """Join the other ranks: NCCL for CUDA tensors where there are any, gloo for the rest.

    Args:
        timeout_minutes: longest wait for other ranks, here and in collectives.
        log_file: file in which the watch records the cause of a failure.
        is_ours: see `FailureWatch`.

    Raises:
        ConfigError: several ranks without MASTER_ADDR and MASTER_PORT, or more than GPUs here.
        torch.distributed.DistError: they do not meet.
    """
    set_training_environment()
    rank, world, local_rank = world_from_environment()
    if world > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise ConfigError(
            f"WORLD_SIZE = {world}: several ranks meet at MASTER_ADDR:MASTER_PORT. "
            "Fix: launch with nemo_trd.launch or torchrun, or export both before srun."
        )
    _check_gpus(local_rank)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(local_rank))
    global _timeout
    _timeout = timeout = timedelta(minutes=timeout_minutes)
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
    return FailureWatch(store, log_file, is_ours)


def _check_gpus(local_rank: int) -> None:
    """Raises ConfigError: a rank of this machine would have no GPU of its own."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks_here = max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), local_rank + 1)
    if gpus and ranks_here > gpus:
        raise rule_broken(
            "ranks on this machine",
            ranks_here,
            f"each rank has a GPU of its own and {gpus} are visible",
            "start fewer ranks a machine, or make more GPUs visible (CUDA_VISIBLE_DEVICES)",
        )


@dataclass(frozen=True)
class Process:
    """Process of a rank."""

    on: str  # the machine, within which process ids mean the same
    pid: int
    stderr: tuple[int, int]  # device and inode of its stderr

    @classmethod
    def own(cls) -> Process:
        """Process that calls this."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
        stderr = os.fstat(2)
        where = f"{socket.gethostname()} {boot} {namespace}"
        return cls(where, os.getpid(), (stderr.st_dev, stderr.st_ino))

    def is_gone(self) -> bool:
        """Whether the process has ended; only its own machine can tell."""
        try:
            status = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return True
        return status.rpartition(")")[2].split()[0] in "ZX"


class FailureWatch:
    """Ends this process when another rank has failed or is gone, also while it waits for that one.

    The first failure is the cause for all. Rank 0 writes it to `log_file`, rank 1 where rank 0 is
    gone; of the ranks that write to the same stderr the lowest tells it there.

    Args:
        is_ours: whether the log is still that of the run whose rank 0 is on a host under a process
            id. Where it is not, the cause goes to stderr alone: a rank that was lost with its node
            may end when another attempt of the run is at work, or has finished.
    """

    def __init__(
        self, store: dist.Store, log_file: Path | None = None, is_ours: IsOurs | None = None
    ) -> None:
        self._store = store
        self._log_file = log_file
        self._is_ours = is_ours
        self._first_rank = Process.own()
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._done = threading.Event()
        self._ending = threading.Lock()  # taken by the thread that ends this process
        self._thread = threading.Thread(target=self._watch, name="failure-watch", daemon=True)
        self._others: dict[int, Process] = {}  # on this machine
        self._listeners = [self._rank]  # ranks that write to the same stderr
        self._no_first_rank = False  # nor a store, where rank 0 held it
        if self._world > 1:
            self._meet()
            self._thread.start()

    def _meet(self) -> None:
        own = Process.own()
        processes: list[Process | None] = [None] * self._world
        dist.all_gather_object(processes, own)
        here = {
            r: process for r, process in enumerate(processes) if process and process.on == own.on
        }
        self._listeners = [rank for rank in here if here[rank].stderr == own.stderr]
        self._others = {rank: process for rank, process in here.items() if rank != self._rank}
        self._first_rank = processes[0] or own

    def _watch(self) -> None:
        # The main thread may block on its own connection. (The type stubs lack this method.)
        store: dist.Store = getattr(self._store, "clone")()  # noqa: B009
        while not self._done.wait(POLL_SECONDS):
            try:
                failure = self._first(store, self._lost())
            except RuntimeError:
                if self._done.is_set():
                    return
                self._no_first_rank = True
                store_gone = Cause(
                    "the rendezvous store is gone, and rank 0 or the launcher with it"
                )
                failure = self._lost() or store_gone
            if failure is not None:
                self._end(store, failure)

    def _lost(self) -> Cause | None:
        """Cause where a rank of this machine has ended without a report; else None."""
        for rank, process in self._others.items():
            if process.is_gone():
                self._no_first_rank |= rank == 0
                where = f"process {process.pid} on {process.on.split()[0]}"
                return Cause(f"rank {rank} is gone ({where}): killed, or out of memory")
        return None

    @staticmethod
    def _first(store: dist.Store, cause: Cause | None) -> Cause | None:
        """Cause that was reported first; `cause`, which is then reported, where none was.

        Raises:
            RuntimeError: the store is gone.
        """
        if cause is not None:
            reported = store.compare_set(FAILURE_KEY, "", json.dumps(asdict(cause)))
        elif store.check([FAILURE_KEY]):
            reported = store.get(FAILURE_KEY)
        else:
            return None
        return Cause(**json.loads(reported))

    def fail(self, error: BaseException) -> NoReturn:
        """Report `error` as the cause unless another rank was first, and end this process."""
        cause = Cause.of(error)
        if self._world == 1:
            end_process(cause.said_by("nemo_trd:"), 1, self._log())
        time.sleep(POLL_SECONDS / 5)  # a rank that is killed closes its connections first
        cause = cause.said_by(f"rank {self._rank} failed first:")
        try:
            failure = self._first(self._store, self._lost() or cause) or cause
            if self._rank != 0 and not self._no_first_rank:
                self._wait_for_record()
        except RuntimeError:
            self._no_first_rank = True
            failure = self._lost() or cause
        self._end(self._store, failure)

    def _wait_for_record(self) -> None:
        limit = time.monotonic() + RECORD_SECONDS
        while not self._store.check([RECORDED_KEY]):
            if time.monotonic() > limit:
                raise RuntimeError("rank 0 does not answer")
            time.sleep(POLL_SECONDS / 5)

    def _end(self, store: dist.Store, failure: Cause) -> NoReturn:
        self._ending.acquire()  # for good: a second thread waits here until the process is gone
        first = min(self._rank, 1) if self._no_first_rank else 0
        cause = failure.said_by(f"rank {self._rank} stops:")
        if self._rank != first:
            cause = Cause(cause.line)
        if self._rank == min((rank for rank in self._listeners if rank >= first), default=first):
            say_last(cause, self._log() if self._rank == first else None)
        if self._rank == 0:
            with contextlib.suppress(RuntimeError):
                store.set(RECORDED_KEY, "1")
            time.sleep(2 * POLL_SECONDS)  # the store may live here: let the others read
        leave(1)

    def _log(self) -> Path | None:
        """The log, where this run may write its end there."""
        first = self._first_rank
        if self._is_ours is None or self._is_ours(first.on.split()[0], first.pid):
            return self._log_file
        return None

    def close(self) -> None:
        """Leave together with the other ranks."""
        self._others = {}  # they may leave before this one
        dist.barrier()
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        dist.barrier()  # no rank looks at the store any longer, which goes with rank 0
        dist.destroy_process_group()
