"""Stands between us and a server: whatever happens to us, the server's processes end.

A script of its own, standard library only: `python -I guard.py PARENT_PID GRACE_SECONDS COMMAND`.
It leads a session, runs COMMAND in it, and ends every process below itself when it is told to
(SIGTERM, SIGINT), when PARENT_PID is gone (SIGKILL included), or when COMMAND ends. A server that
is killed leaves workers behind; they are adopted here and ended too. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def _end_with_guard() -> None:
    """In the server's process. SIGINT, which a shell may have ignored and nobody has blocked."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _prctl(PR_SET_PDEATHSIG, signal.SIGINT)


def descendants(root: int) -> list[int]:
    """Pids of every process below `root`, zombies left out."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # The command's name, in parentheses, may hold spaces and parentheses itself.
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    children.setdefault(int(parent), []).append(int(entry.name))
    pids: list[int] = []
    pending = [root]
    while pending:
        below = children.get(pending.pop(), [])
        pids += below
        pending += below
    return pids


def _reap() -> None:
    """Take the exit status of adopted processes that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _end_everything_below() -> None:
    """Give them a moment to end and to remove their shared memory, then kill them."""
    patience = time.monotonic() + 1
    while alive := descendants(os.getpid()):
        for pid in alive if time.monotonic() > patience else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
        _reap()


def main(parent: int, grace: float, command: list[str]) -> int:
    """The command's exit status as a shell gives it; 0 when it was ended on request."""
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    parent_end = os.pidfd_open(parent)
    if os.getppid() != parent:  # it ended before we looked, and the pid may be another's
        return 0
    # Should this process be killed, the server is asked to end and ends its workers itself.
    server = subprocess.Popen(command, preexec_fn=_end_with_guard)
    server_end = os.pidfd_open(server.pid)
    ready, _, _ = select.select([woken, parent_end, server_end], [], [])
    ended_by_itself = server_end in ready
    if not ended_by_itself:
        server.send_signal(signal.SIGINT)
        select.select([server_end], [], [], grace)
    status = server.poll()
    _end_everything_below()
    if not ended_by_itself:
        return 0
    status = server.wait() if status is None else status
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
