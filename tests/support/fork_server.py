"""Forks the ranks of many launches from one process that has imported what they all import.

As a script: each line of standard input is a launch in JSON; what is written back is two lines,
the process that leads its session, and the exit code once that process has ended. A rank is
what an interpreter of its own would be but for two things: all ranks share one seed of `hash`,
and `/proc/PID/environ` is that of this process. Tests of either start real interpreters.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import importlib.util
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

TESTS = Path(__file__).resolve().parent.parent
# What imports megatron-core as the commands do comes before what tests import beside it. Not what
# samples: a test sees that it is not imported.
IMPORTS = [
    *("torch.distributed.checkpoint", "nemo_trd.megatron.student", "nemo_trd.megatron.checkpoint"),
    *("transformers.models.auto.modeling_auto", "transformers.models.qwen3.modeling_qwen3"),
    *("hydra", "torch.distributed.nn.functional"),
]
GRACE_SECONDS = 20.0  # in which the ranks end by themselves after the first that fails


def serve() -> None:
    """Answer launches until standard input ends. One at a time.

    With an argument, the name of a module in tests/support whose `install` comes before all else.
    """
    sys.path[:0] = [str(TESTS.parent), str(TESTS / "support")]
    for name in sys.argv[1:]:
        importlib.import_module(name).install()
    in_aligners_environment = importlib.util.find_spec("nemo_aligner") is not None
    for name in ["torch.distributed"] if in_aligners_environment else IMPORTS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        leader = os.fork()
        if leader == 0:
            _end(_lead(json.loads(line)))
        os.write(1, f"{leader}\n".encode())
        _, status = os.waitpid(leader, 0)
        os.write(1, f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _lead(request: dict[str, Any]) -> int:
    """Start the ranks and wait for them: 0, or 1 where one failed. In a rank this never returns."""
    os.setsid()
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(descriptor, target)
    running: dict[int, int] = {}
    for rank in range(request["ranks"]):
        pid = os.fork()
        if pid == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            _end(_call(request["file"], request["function"], request["arguments"]))
        running[pid] = rank
    return _wait(running)


def _wait(running: dict[int, int]) -> int:
    """Wait for the ranks, by process; end the others some time after the first that fails."""
    code, limit = 0, float("inf")
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            if time.monotonic() > limit:
                for left in running:
                    os.kill(left, signal.SIGKILL)
            time.sleep(0.02)
            continue
        rank, ended = running.pop(pid), os.waitstatus_to_exitcode(status)
        if ended and not code:
            print(f"rank {rank} was the first to end in failure: {ended}", flush=True)
            code, limit = 1, time.monotonic() + GRACE_SECONDS
    return code


def _call(file: str, function: str, arguments: list[Any]) -> int:
    """The exit code of an interpreter that calls the function."""
    # A line is written whole: the ranks share a file.
    sys.stdout.reconfigure(line_buffering=True, write_through=False)  # type: ignore[union-attr]
    try:
        run_function(file, function, arguments)
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _end(code: int) -> NoReturn:
    """End a forked process as multiprocessing does: C++ would wait for threads of its parent."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_function(file: str, function: str, arguments: list[Any]) -> None:
    """Call a top-level function of a test file, in a rank."""
    sys.path.insert(0, str(Path(file).parent))
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    import torch

    torch.set_num_threads(1)
    getattr(module, function)(*arguments)


if __name__ == "__main__":
    serve()
