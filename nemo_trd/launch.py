"""Start the ranks of a run on this machine, pass signals on to them, and keep their exit code.

python -m nemo_trd.launch --nproc 4 parallel.student.tensor_model_parallel_size=2 run.dir=runs/mine

Like `torchrun --nproc-per-node`, except that a run ends in its own way: SIGTERM, SIGUSR1
and Ctrl-C reach the ranks, which take all the time that a step and its checkpoint need, and the
exit code is theirs (75: stopped, saved, can be resumed). A second Ctrl-C ends them at once. When
one rank fails, or is killed, none is left.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from nemo_trd.distributed.parent import end_with_parent

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
GRACE_SECONDS = 20.0  # in which the ranks end by themselves after the first of them has
POLL_SECONDS = 0.1


def launch(ranks: int, command: Sequence[str]) -> int:
    """Run `command` once for each rank, wait for all, and return the exit code.

    It is the code of the first rank that failed, 128 + number where a signal ended it, else 0.
    The ranks find each other by the variables that torchrun sets. They are in sessions of their
    own, so a terminal's Ctrl-C reaches them through this process alone.
    """
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), **address}
    threads = {} if ranks == 1 else {"OMP_NUM_THREADS": "1"}  # ranks share the cores
    processes: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        for rank in range(ranks):
            rank_environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), **world}
            processes.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    env={**threads, **os.environ, **rank_environment},
                    start_new_session=True,
                    preexec_fn=end_with_parent,  # nobody else passes signals on to a rank
                )
            )
        return _wait(processes)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    first, limit = 0, None
    while running := [process for process in processes if process.poll() is None]:
        ended = [process for process in processes if process not in running]
        if ended and limit is None:  # the others are about to end: all leave a run together
            limit = time.monotonic() + GRACE_SECONDS
        first = first or next((p.returncode for p in ended if p.returncode), 0)
        if limit is not None and time.monotonic() > limit:
            numbers = ", ".join(str(processes.index(process)) for process in running)
            print(f"nemo_trd: rank {numbers} did not end with the others: killed", file=sys.stderr)
            return _exit_code(processes, first or 1)
        time.sleep(POLL_SECONDS)
    first = first or next((p.returncode for p in processes if p.returncode), 0)
    return _exit_code(processes, first)


def _exit_code(processes: Sequence[subprocess.Popen[bytes]], first: int) -> int:
    """Exit code as a shell has it; reports the ranks that a signal ended."""
    for rank, process in enumerate(processes):
        if process.returncode is not None and process.returncode < 0:
            name = signal.Signals(-process.returncode).name
            print(f"nemo_trd: rank {rank} was ended by {name}", file=sys.stderr)
    return first if first >= 0 else 128 - first


def free_port() -> int:
    """A port of this machine that nobody has, for rank 0 to take a little later.

    It is none of those that a system gives to whoever asks for any: 32768 and above on Linux.

    Raises:
        OSError: 100 of them are taken.
    """
    *others, last = random.SystemRandom().sample(range(20_000, 30_000), 100)
    for port in others:
        with contextlib.suppress(OSError):
            return _bound(port)
    return _bound(last)


def _bound(port: int) -> int:
    with socket.socket() as probe:
        probe.bind(("", port))
        return port


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m nemo_trd.launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--nproc", type=int, required=True, metavar="N", help="ranks, one for each GPU"
    )
    parser.add_argument(
        "--module",
        default="nemo_trd.train",
        choices=("nemo_trd.train", "nemo_trd.generate"),
        help="what each rank runs (default: %(default)s)",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the module")
    options = parser.parse_intermixed_args(arguments)
    if options.nproc < 1:
        parser.error(f"--nproc {options.nproc}: at least 1")
    return launch(options.nproc, [sys.executable, "-m", options.module, *options.overrides])


if __name__ == "__main__":
    sys.exit(main())
