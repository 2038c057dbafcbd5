"""Runs math-verify, which compares answers, in a process of its own.

Symbolic comparison can run for ever or eat the memory, in C code that no signal handler interrupts,
and math-verify's own limit (signal.alarm) works in the main thread only. So it happens in a worker
process that the kernel ends at its limit. The limit is processor time: a busy machine changes no
verdict.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import selectors
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from nemo_trd.verifiers.judgement import NO_ANSWER, RIGHT, WRONG, Judgement

log = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0  # importing sympy from a cold network file system
CLOCK_TO_CPU = 60  # a comparison that waits, and does not compute, ends after so many limits
MEMORY_LIMIT_BYTES = 4 * 2**30


class MathWorker:
    """Process that compares one pair at a time; started on first use, and again after a kill.

    `timeout_s` is processor time of one comparison.
    """

    def __init__(self, timeout_s: float = 5.0) -> None:
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def compare(self, text: str, answer: str) -> Judgement:
        """Whether an answer found in `text` equals `answer`, both in math-verify's notation.

        Raises:
            RuntimeError: the worker process does not start; its own message is on stderr.
        """
        with self._lock:
            if self._process is None:
                self._start()
            reply = self._ask(text, answer)
        if reply is None:
            return NO_ANSWER
        if isinstance(reply, bool):
            return RIGHT if reply else WRONG
        reason, explanation = reply
        log.warning("no verdict on the answer %r: %s", answer, explanation)
        return Judgement(None, reason)

    def stop(self) -> None:
        """End the process; the next comparison starts another."""
        with self._lock:
            self._kill()

    def _start(self) -> None:
        package_root = str(Path(__file__).parents[2])
        inherited = os.environ.get("PYTHONPATH")
        path = package_root if not inherited else os.pathsep.join((package_root, inherited))
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from nemo_trd.verifiers.math_worker import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the run alone, which finishes its step first
        )
        try:
            self._read(START_TIMEOUT_S)
        except (TimeoutError, EOFError) as error:
            self._kill()
            raise RuntimeError(
                "the process that compares mathematical answers did not start"
            ) from error

    def _ask(self, text: str, answer: str) -> bool | None | tuple[str, str]:
        """Verdict (None: no answer in the text), or (reason for none, explanation)."""
        assert self._process is not None and self._process.stdin is not None
        line = memoryview(json.dumps([text, answer, self.timeout_s]).encode() + b"\n")
        try:
            while line:  # an unbuffered pipe may take a part only
                line = line[self._process.stdin.write(line) :]
            reply = self._read(CLOCK_TO_CPU * self.timeout_s)
        except TimeoutError:
            self._kill()
            return "timeout", f"stopped after {CLOCK_TO_CPU * self.timeout_s:g} s"
        except (EOFError, BrokenPipeError):
            process = self._process
            self._kill()
            if process.returncode == -signal.SIGPROF:
                return "timeout", f"stopped after {self.timeout_s:g} s of processor time"
            return "error", f"its process died, perhaps out of {MEMORY_LIMIT_BYTES >> 30} GiB"
        return ("error", reply) if isinstance(reply, str) else reply

    def _read(self, timeout_s: float) -> bool | str | None:
        """Read one reply.

        Raises:
            TimeoutError: there is none in time.
            EOFError: the process has ended.
        """
        assert self._process is not None and self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                raise TimeoutError
        line = self._process.stdout.readline()
        if not line:
            raise EOFError
        return json.loads(line)

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def serve() -> None:
    """Run the worker: text, answer and limit as one line of JSON on stdin; true, false, null or an
    error text as one line on stdout. At the limit it dies of SIGPROF.

    It ends with its stdin, so it never outlives the process that asks.
    """
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)  # nothing that a library prints may pass for a reply
        sys.set_int_max_str_digits(0)  # answer_size has refused larger ones
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # "timeout is disabled": it is
        _compare("$x$", "$2x$")  # imports and tables belong to the start, not to a limit
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the parent may use a profiler
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
        print("true", file=replies, flush=True)
        for line in sys.stdin:
            text, answer, timeout_s = json.loads(line)
            signal.setitimer(signal.ITIMER_PROF, timeout_s)
            try:
                reply: bool | str | None = _compare(text, answer)
            except Exception as error:  # the process border: any error goes to the caller
                reply = f"{type(error).__name__}: {error}"[:500]
            signal.setitimer(signal.ITIMER_PROF, 0)
            print(json.dumps(reply), file=replies, flush=True)


def _compare(text: str, answer: str) -> bool | None:
    """Whether the text's answer equals the expected one; None where the text has none."""
    from math_verify import parse, verify

    gold = parse(answer, parsing_timeout=None, raise_on_error=True)
    if all(isinstance(reading, str) for reading in gold):
        raise ValueError("math-verify cannot read the expected answer")
    readings = parse(text, parsing_timeout=None, raise_on_error=True)
    if not readings:
        return None
    return verify(
        *_computed(gold, readings),
        timeout_seconds=None,
        raise_on_error=True,
        allow_set_relation_comp=True,
    )


def _computed(*sides: list[Any]) -> list[list[Any]]:
    """Compute whole numbers (10^{10^3}); read i as a number where one side has it as not real."""
    from sympy import Expr, I, Symbol

    complex_i, real_i = Symbol("i", real=False), Symbol("i", real=True)
    if any(not isinstance(x, str) and x.has(complex_i) for side in sides for x in side):
        meant = {complex_i: I, real_i: I}
        sides = tuple([x if isinstance(x, str) else x.subs(meant) for x in s] for s in sides)
    return [[x.doit() if isinstance(x, Expr) and x.is_integer else x for x in s] for s in sides]
