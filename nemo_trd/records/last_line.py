"""The end of a process: its cause is the last line of stderr, and of the run's log.txt."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"  # of log.txt


@dataclass(frozen=True)
class Cause:
    """Why something ends: one line, and what there is to say beside it."""

    line: str
    details: str = ""  # further lines of the message, for people
    trace: str = ""

    @classmethod
    def of(cls, error: BaseException) -> Cause:
        """Type and first line of the message; its further lines are details."""
        name, (first, _, details) = type(error).__name__, str(error).strip().partition("\n")
        trace = "".join(traceback.format_exception(error))
        return cls(f"{name}: {first.strip()}" if first else name, details.rstrip(), trace)

    def said_by(self, prefix: str) -> Cause:
        """The same with something before its line."""
        return replace(self, line=f"{prefix} {self.line}")


def append_to_log(
    log_file: Path, message: str, trace: str = "", level: int = logging.ERROR
) -> bool:
    """Append `trace` and then `message` as a line of the log. False where it cannot be written."""
    said = message.removeprefix("nemo_trd: ")  # the name of the logger comes before it
    record = logging.LogRecord("nemo_trd", level, "", 0, said, None, None)
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


def say_last(cause: Cause, log_file: Path | None = None) -> None:
    """Write why this process ends; nothing that its threads still log comes after that.

    The traceback goes to the log of the run, or to stderr where there is no log. Without a
    `log_file` another rank writes it, or there is none.
    """
    logging.disable(logging.CRITICAL)
    before, line = cause.trace or cause.details, cause.line
    if log_file is not None and append_to_log(log_file, line, cause.trace):
        before, line = cause.details, f"{line}; see {log_file}"
    if getattr(tqdm, "_instances", None):  # a progress bar has left its line open
        print(file=sys.stderr)
    with contextlib.suppress(OSError, ValueError):  # nobody listens any more
        sys.stdout.flush()  # or what waits there would come after the last line
    with contextlib.suppress(OSError):
        print(*filter(None, (before.rstrip(), line)), sep="\n", file=sys.stderr, flush=True)


def end_process(cause: Cause | str, code: int, log_file: Path | None = None) -> NoReturn:
    """Say why, and exit at once: no destructor of a process group may wait for a rank that is gone.

    For the arguments see `say_last`.
    """
    say_last(Cause(cause) if isinstance(cause, str) else cause, log_file)
    leave(code)


def leave(code: int) -> NoReturn:
    """Exit at once, with what has been printed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
