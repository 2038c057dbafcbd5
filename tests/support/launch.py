"""Runs a function of a test file on several ranks, started by torchrun on a free loopback port.

As a script it is the entry point of those ranks: `launch.py FILE FUNCTION JSON_ARGUMENTS`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import psutil

TESTS = Path(__file__).resolve().parent.parent
OWN_LAUNCHER = f"""
import sys
sys.path.insert(0, {str(TESTS.parent)!r})
from nemo_trd.launch import launch
sys.exit(launch(int(sys.argv[1]), [sys.executable, *sys.argv[2:]]))
"""


def launch(
    ranks: int,
    function: Callable[..., None],
    *arguments: Any,
    timeout: float = 120,
    environment: dict[str, str] | None = None,
) -> str:
    """Call `function(*arguments)` on every rank; return what the ranks wrote together.

    `function` is a top-level function of a test file and its arguments survive JSON. The ranks
    find RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set. They are one process group, and none
    of it outlives this call.

    Raises:
        AssertionError: a rank failed, or `timeout` seconds passed; with what they wrote.
    """
    returncode, output = run_ranks(
        ranks, function, *arguments, timeout=timeout, environment=environment
    )
    assert returncode == 0, f"{function.__name__} failed ({returncode}):\n{output[-8000:]}"
    return output


def run_ranks(
    ranks: int,
    function: Callable[..., None],
    *arguments: Any,
    timeout: float = 120,
    environment: dict[str, str] | None = None,
    launcher: Literal["torchrun", "nemo_trd"] = "torchrun",
) -> tuple[int, str]:
    """As `launch`, for ranks that are meant to fail: the launcher's exit code and the output."""
    command = [sys.executable, "-c", OWN_LAUNCHER, str(ranks), __file__]
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run"]
        command += [f"--nproc-per-node={ranks}", "--master-addr=127.0.0.1"]
        command += [f"--master-port={free_port()}", __file__]
    command += [inspect.getfile(function), function.__name__, json.dumps(arguments)]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=settings | (environment or {}),
            start_new_session=True,
        )
        try:
            returncode = process.wait(timeout)
            reason = ""
        except subprocess.TimeoutExpired:
            returncode, reason = -1, f"\nstopped after {timeout} s"
        finally:
            end_group(process)
        output.seek(0)
        return returncode, output.read() + reason


def end_group(process: subprocess.Popen[Any]) -> None:
    """SIGKILL a process that leads a session, and what it started, in sessions of their own too."""
    started: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in started:  # torchrun's ranks
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _main(file: str, function: str, arguments: str) -> None:
    sys.path[:0] = [
        str(TESTS.parent),
        str(TESTS / "support"),
        str(Path(file).parent),
    ]
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    import torch

    torch.set_num_threads(1)
    getattr(module, function)(*json.loads(arguments))


if __name__ == "__main__":
    _main(*sys.argv[1:])
