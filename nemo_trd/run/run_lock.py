"""Lock that allows one run at a time in a run directory. Imports no torch.

RUN_DIR/run.lock holds, as JSON, its holder: host, process, time of the start. The holder renews its
time every `HEARTBEAT_SECONDS`. A lock that a crash has left behind is taken over:

- on the same machine at once, when its process is gone (a process id that was given to another
  process since is recognised by its start time);
- from the same Slurm job, requeued, at once: Slurm ended the attempt before;
- from another machine, or another container, when its time stood still for `LOST_SECONDS`. All
  times are those of the file system, so the machines' clocks may differ.

It is made with link(2) or O_EXCL, which shared file systems do exactly once; flock(2) is not asked.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from nemo_trd.config.errors import ConfigError, rule_broken

log = logging.getLogger(__name__)

NAME = "run.lock"
HEARTBEAT_SECONDS = 10.0
LOST_SECONDS = 60.0
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Holder:
    """Holder of a lock, as in the file."""

    token: str  # another one for each time that a lock is taken
    host: str
    pid: int
    process_start: int  # in ticks since the machine started
    machine: str  # this start of the machine, and the name space of process ids in it
    since: str
    slurm_job: str | None = None
    slurm_attempt: str | None = None

    def __str__(self) -> str:
        job = f", Slurm job {self.slurm_job}" if self.slurm_job else ""
        return f"process {self.pid} on {self.host} since {self.since}{job}"


UNREADABLE = Holder("unreadable", "an unknown host", 0, 0, "", "an unknown time")


def this_process() -> Holder:
    """Holder that this process would be, with a new token."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        machine = ""  # cannot be told from others: only its heartbeat counts
    return Holder(
        token=uuid.uuid4().hex,
        host=socket.gethostname(),
        pid=os.getpid(),
        process_start=_process_start(os.getpid()) or 0,
        machine=machine,
        since=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        slurm_job=os.environ.get("SLURM_JOB_ID"),
        slurm_attempt=os.environ.get("SLURM_RESTART_COUNT", "0"),
    )


def _process_start(pid: int) -> int | None:
    """Start of a process, in ticks since the machine started; None when it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def is_gone(holder: Holder) -> bool:
    """Whether a holder on this machine has ended."""
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's, whose /proc may be hidden
        return False
    return _process_start(holder.pid) != holder.process_start


def at_work(run_dir: Path) -> bool:
    """Whether a run seems to hold the directory; decided without waiting for a heartbeat."""
    lock = RunLock(run_dir)
    holder, beaten_at = lock.holder(), lock.beaten_at()
    if holder is None or beaten_at is None:
        return False
    if lock.is_of_this_machine(holder):
        return not is_gone(holder)
    return time.time() - beaten_at < LOST_SECONDS


def is_of(run_dir: Path, host: str, pid: int) -> bool:
    """Whether the records of a directory are still those of the run with this first rank.

    That process holds the lock until it gives it back. Without a lock only the process itself may
    say so: to another rank it means that a later attempt took the lock over, and has finished.
    """
    try:
        holder = RunLock(run_dir).holder()
    except OSError:
        return False
    if holder is None:
        return (host, pid) == (socket.gethostname(), os.getpid())
    return (host, pid) == (holder.host, holder.pid)


class RunLock:
    """`RUN_DIR/run.lock`. One process of a run holds it, from `acquire` to `release`."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._file = run_dir / NAME
        self._own = this_process()
        self._fresh = run_dir / f"{NAME}.{self._own.token}"  # before it is the lock
        self._ended = threading.Event()
        self._new_holder: Holder | None = None
        self._thread: threading.Thread | None = None

    def acquire(self) -> list[str]:
        """Take the lock, or wait until it is sure that its holder lives.

        Returns:
            Lines for the log: whose lock was taken over.

        Raises:
            ConfigError: another run is at work in the directory, with its host and process; or
                the directory cannot be written.
        """
        notices: list[str] = []
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            self._fresh.write_text(json.dumps(asdict(self._own)), encoding="utf-8")
        except OSError as error:
            with contextlib.suppress(OSError):
                self._fresh.unlink()
            raise rule_broken(
                "run.dir",
                str(self._run_dir),
                f"nothing can be written there: {error.strerror}",
                "choose another directory, free some space, or change its permissions",
            ) from None
        try:
            while not self._create():
                holder = self.holder()
                if holder is None:  # released just now
                    continue
                reason = self._why_lost(holder)
                if reason is not None and self._replace(holder):
                    notices.append(f"took {self._file} over from {holder}: {reason}")
                    break
        finally:
            self._fresh.unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()
        return notices

    def check(self) -> None:
        """Check that the lock is still ours; call it before output that must not appear twice.

        Raises:
            ConfigError: this process seemed lost, and another run has taken the directory over.
        """
        if self._new_holder is not None:
            raise rule_broken(
                "run.dir",
                str(self._run_dir),
                f"this run showed no sign of life for {LOST_SECONDS:.0f} s, and {self._new_holder} "
                "took the directory over",
                "let that run go on, or stop it and start this one again",
            )

    def release(self) -> None:
        """Give the lock back; do nothing when it is not held."""
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join()
        self._thread = None
        if self.holder() == self._own:
            self._file.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            os.link(self._fresh, self._file)  # appears with all that it holds
        except FileExistsError:
            return False
        except OSError:  # no links on this file system
            try:
                descriptor = os.open(self._file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                return False
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(json.dumps(asdict(self._own)))
        return True

    def holder(self) -> Holder | None:
        """Holder of the lock; None when nobody holds it."""
        try:
            return Holder(**json.loads(self._file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):  # being written, or cut off
            return UNREADABLE

    def _why_lost(self, holder: Holder) -> str | None:
        """Reason why the lock may be taken over; None to look at it again.

        Raises:
            ConfigError: the holder lives.
        """
        own = self._own
        same_job = own.slurm_job is not None and own.slurm_job == holder.slurm_job
        if same_job and own.slurm_attempt != holder.slurm_attempt:
            return "an earlier attempt of this Slurm job, which was requeued"
        if self.is_of_this_machine(holder):
            if is_gone(holder):
                return "that process is gone"
            raise self._refusal(holder, "that process is running")
        return self._wait_for_heartbeat(holder)

    def _wait_for_heartbeat(self, holder: Holder) -> str | None:
        """Watch the heartbeat of a process on another machine; the reason when it stands still."""
        first = self.beaten_at()
        warned = False
        while (last := self.beaten_at()) is not None and last == first:
            age = self._now() - last
            if age >= LOST_SECONDS:
                return f"its last sign of life was {age:.0f} s ago ({LOST_SECONDS:.0f} are allowed)"
            if not warned:
                log.warning(
                    "%s is held by %s, last sign of life %.0f s ago: waiting for the next one, or "
                    "until it is %.0f s old",
                    self._file,
                    holder,
                    age,
                    LOST_SECONDS,
                )
                warned = True
            time.sleep(POLL_SECONDS)
        if last is not None and self.holder() == holder:
            raise self._refusal(holder, f"it gives a sign of life every {HEARTBEAT_SECONDS:.0f} s")
        return None

    def is_of_this_machine(self, holder: Holder) -> bool:
        """Whether the holder runs on this machine, and its process can be examined."""
        return bool(self._own.machine) and self._own.machine == holder.machine

    def beaten_at(self) -> float | None:
        """Time of the holder's last sign of life, in seconds since the epoch."""
        try:
            return self._file.stat().st_mtime
        except FileNotFoundError:
            return None

    def _now(self) -> float:
        """Present time by the clock of the file system, in seconds since the epoch."""
        os.utime(self._fresh)
        return self._fresh.stat().st_mtime

    def _refusal(self, holder: Holder, sign: str) -> ConfigError:
        return rule_broken(
            "run.dir",
            str(self._run_dir),
            f"another run is at work in it: {holder}; {sign}",
            f"wait for it, stop it (touch {self._run_dir / 'stop'}), or give another run.dir",
        )

    def _replace(self, holder: Holder) -> bool:
        """Put our lock in the place of a lost one. Of several processes that try, one succeeds.

        Whoever makes the marker of that holding may replace it, if it is still there then.
        """
        marker = self._run_dir / f"{NAME}.over-{holder.token}"
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            self._remove_old(marker)
            time.sleep(POLL_SECONDS / 10)
            return False
        try:
            if self.holder() != holder:
                return False
            os.replace(self._fresh, self._file)
            return True
        finally:
            marker.unlink(missing_ok=True)

    def _remove_old(self, marker: Path) -> None:
        """Remove the marker of a process that ended in the moment of taking over."""
        try:
            if self._now() - marker.stat().st_mtime > LOST_SECONDS:
                marker.unlink(missing_ok=True)
        except FileNotFoundError:
            pass

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            try:
                holder = self.holder()
                if holder is None:  # removed by hand
                    self._fresh.write_text(json.dumps(asdict(self._own)), encoding="utf-8")
                    self._create()
                    self._fresh.unlink(missing_ok=True)
                elif holder == self._own:
                    os.utime(self._file)
                else:
                    self._new_holder = holder
                    return
            except OSError as error:  # a file server that is away for a moment
                log.warning("cannot renew %s: %s", self._file, error)
