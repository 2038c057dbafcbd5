"""How a run is asked to stop, and with which code it leaves."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from nemo_trd.megatron.runtime import REQUEUE_EXIT_CODE, StopRequest


def test_a_stop_file_leaves_with_0_and_stops_one_run_only(one_rank: Any, tmp_path: Path) -> None:
    stop = StopRequest(tmp_path)
    try:
        assert stop.exit_code() is None
        (tmp_path / "stop").touch()
        assert stop.exit_code() == 0
        assert not (tmp_path / "stop").exists()
    finally:
        stop.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_leaves_with_the_requeue_code_and_goes_before_a_stop_file(
    number: signal.Signals, one_rank: Any, tmp_path: Path
) -> None:
    before = signal.getsignal(number)
    stop = StopRequest(tmp_path)
    try:
        (tmp_path / "stop").touch()
        os.kill(os.getpid(), number)
        assert stop.exit_code() == REQUEUE_EXIT_CODE == 75
    finally:
        stop.close()
    assert signal.getsignal(number) == before
