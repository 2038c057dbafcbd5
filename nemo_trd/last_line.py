"""The end of a process: its cause is the last line of stderr, and of the run's log.txt."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"  # of log.txt


def cause_of(error: BaseException) -> str:
    """Type and first line of what went wrong; further lines are in its traceback."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def append_to_log(
    log_file: Path, message: str, trace: str = "", level: int = logging.ERROR
) -> bool:
    """Append `trace` and then `message` as a line of the log. False where it cannot be written."""
    record = logging.LogRecord("nemo_trd", level, "", 0, message, None, None)
    line = logging.Formatter(LOG_FORMAT).format(record)
    text = f"{trace.rstrip()}\n{line}\n".lstrip()
    try:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("a+b") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                text = text if file.read() == b"\n" else f"\n{text}"
            file.write(text.encode(errors="replace"))
    except OSError:
        return False
    return True


def say_last(message: str, log_file: Path | None = None, trace: str = "") -> None:
    """Write why this process ends; nothing that its threads still log comes after that.

    Args:
        message: for stderr and, where there is one, for the log.
        log_file: of the run; None where another rank writes it, or there is none.
        trace: for the log, or for stderr where it cannot go there.
    """
    logging.disable(logging.CRITICAL)
    if log_file is not None and append_to_log(log_file, message, trace):
        message, trace = f"{message}; see {log_file}", ""
    if getattr(tqdm, "_instances", None):  # a progress bar has left its line open
        print(file=sys.stderr)
    with contextlib.suppress(OSError):  # nobody listens any more
        print(f"{trace}{message}", file=sys.stderr, flush=True)


def end_process(message: str, code: int, log_file: Path | None = None, trace: str = "") -> NoReturn:
    """Say why, and exit at once: no destructor of a process group may wait for a rank that is gone.

    For the arguments see `say_last`.
    """
    say_last(message, log_file, trace)
    leave(code)


def leave(code: int) -> NoReturn:
    """Exit at once, with what has been printed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
