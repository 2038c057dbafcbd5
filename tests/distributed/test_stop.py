"""How a run is asked to stop, and with which code it leaves."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from nemo_trd.distributed import stop as stop_request
from nemo_trd.distributed.stop import REQUEUE_EXIT_CODE, StopRequest


def test_a_stop_file_leaves_with_0_and_stops_one_run_only(one_rank: Any, tmp_path: Path) -> None:
    stop = StopRequest(tmp_path, rank=0)
    try:
        assert stop.exit_code() is None
        (tmp_path / "stop").touch()
        assert stop.exit_code() == 0
        assert not (tmp_path / "stop").exists()
    finally:
        stop.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_leaves_with_the_requeue_code_and_goes_before_a_stop_file(
    number: signal.Signals, one_rank: Any, tmp_path: Path
) -> None:
    before = signal.getsignal(number)
    stop = StopRequest(tmp_path, rank=0)
    try:
        (tmp_path / "stop").touch()
        os.kill(os.getpid(), number)
        assert stop.exit_code() == REQUEUE_EXIT_CODE == 75
    finally:
        stop.close()
    assert signal.getsignal(number) == before


def test_a_signal_to_a_forked_child_is_none_to_the_run(tmp_path: Path) -> None:
    """A terminal's Ctrl-C reaches the writers of a checkpoint too, perhaps much later."""
    stop = StopRequest(tmp_path, rank=0)
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    os.waitpid(child, 0)
    stop.close()  # reads what came by then
    assert not stop.signalled()


@pytest.mark.parametrize("rank", [0, 1])
def test_the_second_ctrl_c_ends_a_process_whose_main_thread_is_busy_and_a_second_sigterm_does_not(
    rank: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In a child of this process: what it writes and how it leaves is what a terminal would see."""
    (tmp_path / "checkpoints" / "step_00000003").mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest").symlink_to("step_00000003")
    child = os.fork()
    if child == 0:
        logging.getLogger("nemo_trd").handlers[:] = []
        logging.getLogger().handlers[:] = []  # pytest's
        stop_request.SAME_PRESS_SECONDS = 0.05
        StopRequest(tmp_path, rank)
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)  # the last: what a launcher passes on once more
            time.sleep(0.01)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)  # the first press still counts
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        ctypes.CDLL(None).sleep(200)  # no handler of Python's is called in here
        os._exit(0)
    start = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert time.monotonic() - start < 100
    told = capfd.readouterr().err.splitlines()
    log_file = tmp_path / "log.txt"
    if rank == 1:
        assert told == [] and not log_file.exists()
        return
    stops = "the run saves and stops after the step that it is in"
    ended = (
        f"ended at once by a second Ctrl-C: {tmp_path / 'checkpoints'} is kept, and the "
        "run can be resumed from there"
    )
    assert told == [
        f"SIGTERM: {stops}",
        f"SIGINT: {stops}; Ctrl-C once more ends it at once",
        f"nemo_trd: {ended}; see {log_file}",
    ]
    assert log_file.read_text().endswith(f" ERROR nemo_trd: {ended}\n")
