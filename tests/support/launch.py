"""Runs a function of a test file on several ranks, which meet on a free loopback port.

As a script it is the entry point of ranks that are interpreters of their own:
`launch.py FILE FUNCTION JSON_ARGUMENTS`.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from typing import IO, Any, Literal

import psutil
from fork_server import TESTS, run_function

from nemo_trd.launch import free_port

OWN_LAUNCHER = f"""
import sys
sys.path.insert(0, {str(TESTS.parent)!r})
from nemo_trd.launch import launch
sys.exit(launch(int(sys.argv[1]), [sys.executable, *sys.argv[2:]]))
"""
Launcher = Literal["fork", "torchrun", "nemo_trd"]


def launch(
    ranks: int,
    function: Callable[..., None],
    *arguments: Any,
    timeout: float = 400,
    environment: dict[str, str] | None = None,
    transformer_engine: bool = False,
) -> str:
    """Call `function(*arguments)` on every rank; return what the ranks wrote together.

    `function` is a top-level function of a test file and its arguments survive JSON. The ranks
    find RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set. They are one process group, and none
    of it outlives this call.

    Args:
        transformer_engine: give the ranks TransformerEngine on the CPU (`te_stand_in`).

    Raises:
        AssertionError: a rank failed, or `timeout` seconds passed; with what they wrote.
    """
    returncode, output = run_ranks(
        ranks,
        function,
        *arguments,
        timeout=timeout,
        environment=environment,
        transformer_engine=transformer_engine,
    )
    assert returncode == 0, f"{function.__name__} failed ({returncode}):\n{output[-8000:]}"
    return output


def run_ranks(
    ranks: int,
    function: Callable[..., None],
    *arguments: Any,
    timeout: float = 400,
    environment: dict[str, str] | None = None,
    launcher: Launcher = "fork",
    transformer_engine: bool = False,
) -> tuple[int, str]:
    """As `launch`, for ranks that are meant to fail: the launcher's exit code and the output.

    `launcher`: `fork` has imported already what ranks import (`fork_server`); `torchrun` and
    `nemo_trd` start an interpreter for each rank, which takes ten seconds. `transformer_engine` is
    for `fork`.
    """
    call = (inspect.getfile(function), function.__name__, json.dumps(arguments))
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    settings |= environment or {}
    with tempfile.NamedTemporaryFile("w+") as output:
        if launcher == "fork":
            server = fork_server(*(["te_stand_in"] if transformer_engine else []))
            returncode = _fork(server, ranks, call, settings, output.name, timeout)
        else:
            returncode = _start([*_launcher(launcher, ranks), *call], settings, output, timeout)
        output.seek(0)
        reason = f"\nstopped after {timeout} s" if returncode == -1 else ""
        return returncode, output.read() + reason


def _fork(
    server: subprocess.Popen[bytes],
    ranks: int,
    call: tuple[str, str, str],
    environment: dict[str, str],
    output: str,
    timeout: float,
) -> int:
    """The exit code of forked ranks; -1 after `timeout` seconds."""
    file, function, arguments = call
    world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    request = {
        "ranks": ranks,
        "file": file,
        "function": function,
        "arguments": json.loads(arguments),
        "environment": environment | world | address,
        "directory": os.getcwd(),
        "output": output,
    }
    assert server.stdin and server.stdout
    server.stdin.write(json.dumps(request).encode() + b"\n")
    leader = int(server.stdout.readline())
    ended, _, _ = select.select([server.stdout], [], [], timeout)
    end_session(leader)
    returncode = int(server.stdout.readline())
    return returncode if ended else -1


@cache
def fork_server(*installed_first: str) -> subprocess.Popen[bytes]:
    """The server of this session's launches. It ends with the session: its input does."""
    return subprocess.Popen(
        [sys.executable, str(TESTS / "support" / "fork_server.py"), *installed_first],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )


def _launcher(launcher: Launcher, ranks: int) -> list[str]:
    """The command that starts this file on every rank."""
    if launcher == "nemo_trd":
        return [sys.executable, "-c", OWN_LAUNCHER, str(ranks), __file__]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    return [*command, "--master-addr=127.0.0.1", f"--master-port={free_port()}", __file__]


def _start(command: list[str], environment: dict[str, str], output: IO[str], timeout: float) -> int:
    """The exit code of a command; -1 after `timeout` seconds. Nothing that it started is left."""
    process = subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return -1
    finally:
        end_group(process)


def end_group(process: subprocess.Popen[Any]) -> None:
    """SIGKILL a process that leads a session, and what it started, in sessions of their own too."""
    end_session(process.pid)
    process.wait()


def end_session(leader: int) -> None:
    """SIGKILL a process group by its leader, and what it started, in sessions of their own too."""
    started: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(leader).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
    for child in started:  # torchrun's ranks
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def commands_below() -> dict[int, str]:
    """Command lines of the processes below this one, by id; without those that have ended."""
    commands = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            commands[process.pid] = " ".join(process.cmdline())
    return commands


def processes_of(mark: str) -> list[psutil.Process]:
    """Processes whose programs were started with TEST_MARK=mark in their environment.

    Ranks that are forked are not among them (`fork_server`); what they start is.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TEST_MARK") == mark:
                found.append(process)
    return found


def _main(file: str, function: str, arguments: str) -> None:
    sys.path[:0] = [str(TESTS.parent), str(TESTS / "support")]
    run_function(file, function, json.loads(arguments))


if __name__ == "__main__":
    _main(*sys.argv[1:])
