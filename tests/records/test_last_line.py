"""What a process that ends leaves as the last line of its log and of stderr."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_trd.records.last_line import Cause, append_to_log, say_last
from nemo_trd.run.run_lock import RunLock
from nemo_trd.run.session import record_end

SERVER = "the server at http://h:1 ended with status 3. The end of s.log:\nOSError: no room\nbye"


@pytest.fixture(autouse=True)
def logging_goes_on() -> Iterator[None]:
    yield
    logging.disable(logging.NOTSET)


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def test_the_line_is_the_first_of_the_message_and_the_traceback_stands_above_it_in_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log_file = tmp_path / "run" / "log.txt"
    append_to_log(log_file, "step 1")
    with log_file.open("a") as file:
        file.write("a line that was cut o")
    say_last(Cause.of(raised(RuntimeError(SERVER))).said_by("nemo_trd:"), log_file)
    logging.getLogger("nemo_trd").error("of a thread that goes on")
    line = "RuntimeError: the server at http://h:1 ended with status 3. The end of s.log:"
    said = f"OSError: no room\nbye\nnemo_trd: {line}; see {log_file}\n"
    assert capsys.readouterr().err == said
    lines = log_file.read_text().splitlines()
    assert lines[0].endswith(" ERROR nemo_trd: step 1")
    assert lines[1:3] == ["a line that was cut o", "Traceback (most recent call last):"]
    assert lines[-1].endswith(f" ERROR nemo_trd: {line}")


def test_a_refusal_of_several_lines_is_one_record_with_its_time_and_name_once(
    tmp_path: Path,
) -> None:
    log_file = tmp_path / "log.txt"
    log_file.write_text("step 1\n")
    record_end("a = 1: no. Fix: 2.\nb = 1: no. Fix: 3.", log_file)
    _, first, second = log_file.read_text().splitlines()
    assert first.endswith(" ERROR nemo_trd: a = 1: no. Fix: 2.") and second == "b = 1: no. Fix: 3."


def test_without_a_log_that_can_be_written_the_traceback_is_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text("no directory")
    say_last(Cause.of(raised(ValueError())), tmp_path / "run" / "log.txt")
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "Traceback (most recent call last):" and told[-1] == "ValueError"


def test_an_end_before_the_start_is_written_into_the_log_of_a_run_that_is_not_at_work(
    tmp_path: Path,
) -> None:
    log_file, lock = tmp_path / "log.txt", RunLock(tmp_path)
    record_end("no run was here", log_file)
    assert not log_file.exists()
    log_file.write_text("step 1\n")
    lock.acquire()
    record_end("another is at work", log_file)
    lock.release()
    record_end("refused", log_file)
    assert [line.split()[-1] for line in log_file.read_text().splitlines()] == ["1", "refused"]
    (tmp_path / "run.lock").mkdir()
    record_end("what cannot be read hides no refusal", log_file)
    record_end("nor what cannot be named", tmp_path / ("x" * 300) / "log.txt")
