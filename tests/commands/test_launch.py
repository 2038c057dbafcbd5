"""`nemo_trd.launch`: signals reach the ranks, their exit code comes back, and none is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Of a rank: says that it is ready, then does what its line in the test says.
RANK = """
import os, signal, sys, time
rank, directory = int(os.environ["RANK"]), sys.argv[1]
heard = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: heard.append(number))
open(f"{directory}/{rank}.{os.getpid()}", "w").close()
def wait_for_both():
    while len(os.listdir(directory)) < 2:
        time.sleep(0.01)
def wait_for(number):
    while number not in heard:
        time.sleep(0.01)
"""
LAUNCHER = """
import sys
from nemo_trd import launch
launch.GRACE_SECONDS = float(sys.argv[1])
sys.exit(launch.launch(2, [sys.executable, "-c", *sys.argv[2:]]))
"""


def start(directory: Path, what: str, grace: float = 0.5) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", LAUNCHER, str(grace), RANK + what, str(directory)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def ready(directory: Path) -> list[int]:
    """Process ids of both ranks, in order."""
    limit = time.monotonic() + 100
    while len(files := sorted(directory.iterdir())) < 2:
        assert time.monotonic() < limit
        time.sleep(0.02)
    return [int(file.suffix[1:]) for file in files]


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_reaches_every_rank_and_their_exit_code_comes_back(
    number: signal.Signals, tmp_path: Path
) -> None:
    what = f"wait_for({int(number)}); time.sleep(0.3 * rank); sys.exit(75)"
    process = start(tmp_path, what, grace=60)
    ready(tmp_path)
    os.killpg(process.pid, number)  # as a terminal does: to its foreground group, not to the ranks
    assert (process.wait(100), process.communicate()[1]) == (75, "")


@pytest.mark.parametrize(("of_rank", "expected"), [(7, 7), (0, 1)])
def test_the_code_of_the_rank_that_failed_first_counts_and_no_rank_is_left(
    of_rank: int, expected: int, tmp_path: Path
) -> None:
    what = f"wait_for_both(); sys.exit({of_rank}) if rank else time.sleep(300)"
    process = start(tmp_path, what)
    pids = ready(tmp_path)
    assert process.wait(100) == expected
    assert process.communicate()[1] == "nemo_trd: rank 0 did not end with the others: killed\n"
    assert not any(map(is_there, pids))


def test_a_killed_rank_is_named_and_a_killed_launcher_leaves_no_ranks(tmp_path: Path) -> None:
    process = start(tmp_path, "wait_for(signal.SIGTERM)")
    pids = ready(tmp_path)
    os.kill(pids[1], signal.SIGKILL)
    assert process.wait(100) == 128 + signal.SIGKILL
    assert "nemo_trd: rank 1 was ended by SIGKILL" in process.communicate()[1]
    (tmp_path / "again").mkdir()
    process = start(tmp_path / "again", "time.sleep(300)")
    pids = ready(tmp_path / "again")
    process.kill()
    process.communicate()
    limit = time.monotonic() + 60
    while any(map(is_there, pids)) and time.monotonic() < limit:
        time.sleep(0.02)
    assert not any(map(is_there, pids))
