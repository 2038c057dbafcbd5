"""Requests to stop a run: signals, Ctrl-C, and a file in its directory."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from nemo_trd.records.last_line import end_process, leave

log = logging.getLogger(__name__)

REQUEUE_EXIT_CODE = 75  # EX_TEMPFAIL: the run was asked to stop, saved, and can be resumed
INTERRUPTED_EXIT_CODE = 130  # exit code of a program that SIGINT ends
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_PRESS_SECONDS = 0.5  # a launcher may pass on the signal that the terminal has sent


def _keep_signals_apart() -> None:
    """In a forked child: what it is sent is not sent to this process, whose pipe it has too."""
    with contextlib.suppress(ValueError):  # only the main thread of an interpreter has one
        signal.set_wakeup_fd(-1)


# Writers of a checkpoint are such children. A terminal's Ctrl-C reaches them as well, and a second
# later would count as a second one where a write takes that long.
os.register_at_fork(after_in_child=_keep_signals_apart)


class StopRequest:
    """Watch for requests that the run save and leave after its current step.

    SIGTERM, SIGUSR1 (preemption, time limit) and SIGINT (Ctrl-C) leave with `REQUEUE_EXIT_CODE`; a
    second SIGINT ends the process at once. A file named `stop` in the run directory leaves with 0,
    and is removed when it is obeyed. Rank 0 logs a request at once.

    Signals take effect while the main thread is in a library or waits for another rank, too: Python
    calls their handlers in between only, so a thread reads the pipe of `signal.set_wakeup_fd`.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._run_dir = run_dir
        self._rank = rank
        self._stop_file = run_dir / "stop"
        self._signal = 0
        self._announced = False  # whether the log says that the run stops
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous_wakeup = signal.set_wakeup_fd(
            self._writer.fileno(), warn_on_full_buffer=False
        )
        self._previous: dict[int, Callable[[int, FrameType | None], object] | int | None] = {
            number: signal.signal(number, self._note) for number in SIGNALS
        }
        self._listener = threading.Thread(target=self._listen, name="stop-request", daemon=True)
        self._listener.start()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def _listen(self) -> None:
        interrupted = None
        while (number := self._reader.recv(1)[0]) != 0:
            if number == signal.SIGINT and interrupted is not None:
                if time.monotonic() - interrupted > SAME_PRESS_SECONDS:
                    self._end_at_once()
            elif number in SIGNALS:
                self._signal = number
                again = number == signal.SIGINT
                if self._rank == 0 and (again or not self._announced):
                    log.warning(
                        "%s: the run saves and stops after the step that it is in%s",
                        signal.Signals(number).name,
                        "; Ctrl-C once more ends it at once" if again else "",
                    )
                self._announced = True
                interrupted = time.monotonic() if again else interrupted

    def _end_at_once(self) -> None:
        """Leave without saving. Processes that the run started end with it."""
        if self._rank != 0:
            leave(INTERRUPTED_EXIT_CODE)
        saved = self._run_dir / "checkpoints"
        notice = f"{saved} is kept, and the run can be resumed from there"
        end_process(
            f"nemo_trd: ended at once by a second Ctrl-C: "
            f"{notice if (saved / 'latest').exists() else 'nothing was saved'}",
            INTERRUPTED_EXIT_CODE,
            self._run_dir / "log.txt" if self._run_dir.exists() else None,
        )

    def signalled(self) -> bool:
        """Whether this rank got a signal to leave: it should not wait long for anything."""
        return self._signal != 0

    def exit_code(self) -> int | None:
        """Exit code of a run that is to stop, the same on all ranks; None to go on. Collective."""
        requests = torch.tensor([int(self.signalled()), int(self._stop_file.exists())])
        dist.all_reduce(requests, op=dist.ReduceOp.MAX)
        signalled, stop_file = requests.tolist()
        self._announced |= bool(
            signalled or stop_file
        )  # nothing may follow the last line of the log
        if signalled:
            return REQUEUE_EXIT_CODE
        if not stop_file:
            return None
        if dist.get_rank() == 0:
            self._stop_file.unlink(missing_ok=True)
        return 0

    def close(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup)
        self._writer.send(b"\0")
        self._listener.join()
        self._reader.close()
        self._writer.close()
