"""One run at a time in a directory; a lock that was left behind is taken over by one process."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemo_trd.config.errors import ConfigError
from nemo_trd.distributed.process import FailureWatch, Process
from nemo_trd.run import run_lock
from nemo_trd.run.run_lock import Holder, RunLock, at_work, is_of, this_process


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(run_lock, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(run_lock, "LOST_SECONDS", 0.6)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def child() -> Iterator[Holder]:
    """A process of this machine that lives for the time of the test."""
    process = subprocess.Popen(["sleep", "60"])
    start = run_lock._process_start(process.pid)
    assert start is not None
    yield replace(this_process(), token="other", pid=process.pid, process_start=start)
    process.kill()
    process.wait()


def held_by(run_dir: Path, holder: Holder, age: float = 0.0) -> Path:
    """The lock of another process, renewed `age` seconds ago."""
    file = run_dir / "run.lock"
    written = run_dir / "run.lock.written"
    written.write_text(json.dumps(asdict(holder)))
    os.utime(written, (time.time() - age,) * 2)
    return written.replace(file)


def test_a_second_run_is_refused_with_host_process_and_time(tmp_path: Path, child: Holder) -> None:
    held_by(tmp_path, child, age=1000)  # a process that can be looked at needs no heartbeat
    with pytest.raises(ConfigError) as refused:
        RunLock(tmp_path).acquire()
    text = str(refused.value)
    for part in (f"process {child.pid} on {child.host} since {child.since}", "Fix: wait for it"):
        assert part in text
    assert os.listdir(tmp_path) == ["run.lock"]


def test_a_lock_is_given_back_and_never_taken_from_another(tmp_path: Path, child: Holder) -> None:
    lock = RunLock(tmp_path / "new")
    assert lock.acquire() == []
    with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
        RunLock(tmp_path / "new").acquire()
    lock.check()
    held_by(tmp_path / "new", child)
    deadline = time.monotonic() + 30
    while lock._new_holder is None and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(ConfigError, match=f"process {child.pid} .* took the directory over"):
        lock.check()
    lock.release()
    assert json.loads((tmp_path / "new" / "run.lock").read_text())["pid"] == child.pid
    (tmp_path / "new" / "run.lock").unlink()
    for _ in range(2):
        lock = RunLock(tmp_path / "new")
        assert lock.acquire() == []
        lock.release()
    assert os.listdir(tmp_path / "new") == []


@pytest.mark.parametrize("gone", ["ended", "its id is another's now", "requeued"])
def test_a_lock_left_behind_on_this_machine_is_taken_over_at_once(
    gone: str, tmp_path: Path, child: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "LOST_SECONDS", 600)
    if gone == "ended":
        process = subprocess.Popen(["true"])
        process.wait()
        holder = replace(child, pid=process.pid)
    elif gone == "requeued":
        holder = replace(child, machine="a node that was lost", slurm_job="7", slurm_attempt="0")
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    else:
        holder = replace(child, process_start=child.process_start - 1)
    held_by(tmp_path, holder)
    lock = RunLock(tmp_path)
    [notice] = lock.acquire()
    assert f"took {tmp_path / 'run.lock'} over from process {holder.pid} on {holder.host}" in notice
    lock.release()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("machine", ["another", ""])
def test_on_another_machine_the_heartbeat_decides(
    machine: str,
    tmp_path: Path,
    child: Holder,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_lock, "LOST_SECONDS", 60)
    holder = replace(child, machine=machine, host="far")
    file = held_by(tmp_path, holder)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.05):
            os.utime(file)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(ConfigError, match=f"process {child.pid} on far.* gives a sign of life"):
        RunLock(tmp_path).acquire()
    stop.set()
    thread.join()
    monkeypatch.setattr(run_lock, "LOST_SECONDS", 1)
    lock = RunLock(tmp_path)
    last_sign = held_by(tmp_path, holder).stat().st_mtime
    [notice] = lock.acquire()  # stands still
    assert "its last sign of life was " in notice and "(1 are allowed)" in notice
    assert file.stat().st_mtime - last_sign > 0.9
    assert "waiting for the next one" in caplog.text
    lock.release()
    monkeypatch.setattr(run_lock, "LOST_SECONDS", 60)
    held_by(tmp_path, holder, age=100)
    start = time.monotonic()
    lock.acquire()
    assert time.monotonic() - start < 30  # nothing to wait for
    lock.release()


def test_a_lock_that_was_cut_off_in_writing_is_taken_over_in_time(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text('{"tok')
    [notice] = RunLock(tmp_path).acquire()
    assert "an unknown host" in notice


def test_of_many_that_take_over_at_once_one_does(
    tmp_path: Path, child: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the file system has no hard links."""
    monkeypatch.setattr(run_lock, "LOST_SECONDS", 600)  # none is slow enough to be taken for lost
    for number in range(6):
        run_dir = tmp_path / str(number)
        run_dir.mkdir()
        held_by(run_dir, replace(child, process_start=0))
        locks = [RunLock(run_dir) for _ in range(8)]
        outcomes: list[str] = []

        def start(lock: RunLock, outcomes: list[str] = outcomes) -> None:
            try:
                outcomes.append(f"held {len(lock.acquire())}")
            except ConfigError as error:
                outcomes.append("refused" if f"process {os.getpid()}" in str(error) else str(error))

        threads = [threading.Thread(target=start, args=(lock,)) for lock in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["held 1", *["refused"] * 7]
        for lock in locks:
            lock.release()
        assert os.listdir(run_dir) == []


def test_without_hard_links_the_lock_is_made_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    lock = RunLock(tmp_path)
    assert lock.acquire() == []
    with pytest.raises(ConfigError, match="another run is at work"):
        RunLock(tmp_path).acquire()
    lock.release()


def test_a_lock_that_cannot_be_written_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_text

    def full(self: Path, *_: object, **__: object) -> int:
        write(self, "", encoding="utf-8")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ConfigError, match="nothing can be written there: No space left"):
        RunLock(tmp_path).acquire()
    assert os.listdir(tmp_path) == []


def test_a_directory_is_known_to_be_at_work_while_its_run_lives(
    tmp_path: Path, child: Holder
) -> None:
    assert not at_work(tmp_path)
    lock = RunLock(tmp_path)
    lock.acquire()
    assert at_work(tmp_path)
    lock.release()
    assert not at_work(tmp_path)
    held_by(tmp_path, replace(child, process_start=1))
    assert not at_work(tmp_path), "its process is gone"


def test_a_rank_that_was_lost_writes_no_end_into_the_log_of_a_later_attempt(
    tmp_path: Path, child: Holder
) -> None:
    first = Process(f"{child.host} boot namespace", child.pid, (0, 0))  # of the lost rank's run
    log, is_ours = tmp_path / "log.txt", partial(is_of, tmp_path)
    lost = SimpleNamespace(_first_rank=first, _is_ours=is_ours, _log_file=log)
    held_by(tmp_path, child)
    assert FailureWatch._log(lost) == log  # type: ignore[arg-type]
    held_by(tmp_path, this_process())  # the next attempt is at work
    assert FailureWatch._log(lost) is None  # type: ignore[arg-type]
    (tmp_path / "run.lock").unlink()  # and has finished
    assert FailureWatch._log(lost) is None  # type: ignore[arg-type]
    own = SimpleNamespace(_first_rank=Process.own(), _is_ours=is_ours, _log_file=log)
    assert FailureWatch._log(own) == log  # type: ignore[arg-type]
    (tmp_path / "run.lock").mkdir()
    assert FailureWatch._log(own) is None  # type: ignore[arg-type]
