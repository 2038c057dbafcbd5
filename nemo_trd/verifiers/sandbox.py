"""Sandbox for generated programs: bubblewrap's namespaces, rlimits, a system call filter.

A program in it sees the interpreter and /usr, read-only, and may write to a small /tmp that is
gone with it. It has no network, no other process, no user but nobody, no environment, and limits
on everything it can use up. Without bubblewrap nothing is run at all.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Literal

from nemo_trd.config.errors import rule_broken
from nemo_trd.config.schema import Sandbox

NOBODY = 65534
PYTHON, PACKAGES = "/opt/python", "/opt/packages"  # their places inside the sandbox
READY = b"ready\n"
START_SECONDS = 60.0
WATCH_SECONDS = 0.05  # between two looks at the memory of all its processes
MIB = 2**20
TOOLS = ("bwrap", "prlimit", "setpriv")
INSTALL = "install bubblewrap and util-linux (`make system-packages`), and allow user namespaces"


class SandboxBroken(RuntimeError):
    """The sandbox itself does not work, so nothing is known of the program."""


class Stopped(Exception):
    """The program was killed at a limit, or ended before it had replied."""

    def __init__(self, reason: Literal["time_limit", "memory_limit", "output_limit", "ended"]):
        super().__init__(reason)
        self.reason = reason


class SandboxedPython:
    """Python process in a sandbox of its own, as a context manager.

    `script` must first write `READY` to its stdout; then the context is entered. Leaving it kills
    every process of the sandbox.

    Raises:
        SandboxBroken: the sandbox, or the script in it, does not start.
    """

    def __init__(self, script: str, arguments: list[str], limits: Sandbox) -> None:
        self._limits = limits
        self._received = bytearray()
        self._total = 0  # bytes that it has written
        with _system_call_filter() as seccomp:
            interpreter_arguments = ["-I", "-S", "-c", script, *arguments]
            self._process = subprocess.Popen(
                _command(limits, seccomp) + interpreter_arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={"PATH": os.defpath},
                pass_fds=[seccomp],
                start_new_session=True,
                bufsize=0,
            )

    def __enter__(self) -> SandboxedPython:
        try:
            if self.exchange(b"", "line", START_SECONDS) != READY:
                raise SandboxBroken("the script in the sandbox does not begin as it should")
        except BaseException as error:
            self.kill()
            if isinstance(error, Stopped):
                raise SandboxBroken(f"bubblewrap does not start: {error.reason}") from None
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def exchange(self, data: bytes, until: Literal["line", "end"], seconds: float) -> bytes:
        """Write `data` to its stdin, and return its next line, or its whole output until it ends.

        With "end", its stdin is closed after `data`; `status` is known afterwards.

        Raises:
            Stopped: at a limit, or with "line" when it ends without one.
        """
        deadline = time.monotonic() + seconds
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        unsent = memoryview(data)
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            if unsent:
                os.set_blocking(stdin.fileno(), False)
                selector.register(stdin, selectors.EVENT_WRITE)
            elif until == "end":
                stdin.close()
            while until == "end" or b"\n" not in self._received:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    self._stop("time_limit")
                for key, _ in selector.select(min(WATCH_SECONDS, remaining)):
                    if key.fileobj is stdin:
                        unsent = self._write(unsent)
                        if not unsent:
                            selector.unregister(stdin)
                            if until == "end":
                                stdin.close()
                    elif not self._read():
                        return self._ended(until, deadline)
                if self._memory() > self._limits.memory_mib * MIB:
                    self._stop("memory_limit")
        line, _, rest = self._received.partition(b"\n")
        self._received = rest
        return bytes(line) + b"\n"

    @property
    def status(self) -> int | None:
        """Exit status, 128 + N where signal N ended it; None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """End all processes of the sandbox: with its first one the kernel ends the others."""
        if self._process.poll() is None:  # afterwards the number may be another group's
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _write(self, unsent: memoryview) -> memoryview:
        assert self._process.stdin is not None
        try:
            return unsent[os.write(self._process.stdin.fileno(), unsent[:65536]) :]
        except BlockingIOError:
            return unsent
        except BrokenPipeError:  # it does not read its input, which is no error
            return unsent[len(unsent) :]

    def _read(self) -> bool:
        """Read some output; whether there was any before the end."""
        assert self._process.stdout is not None
        received = os.read(self._process.stdout.fileno(), 65536)
        self._received += received
        self._total += len(received)
        if self._total > self._limits.output_mib * MIB:
            self._stop("output_limit")
        return bool(received)

    def _ended(self, until: str, deadline: float) -> bytes:
        """Wait for the process, whose stdout is closed, up to `deadline`; return the output."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._stop("time_limit")
        if until == "line":
            self._stop("ended")
        received, self._received = bytes(self._received), bytearray()
        return received

    def _stop(self, reason: Literal["time_limit", "memory_limit", "output_limit", "ended"]) -> None:
        self.kill()
        raise Stopped(reason)

    def _memory(self) -> int:
        """Bytes of memory of all its processes together; shared pages count for each."""
        total, pending = 0, [self._process.pid]
        while pending:
            process = Path("/proc", str(pending.pop()))
            with contextlib.suppress(OSError, ValueError):  # it has just ended
                total += int((process / "statm").read_text().split()[1])
                for thread in (process / "task").iterdir():
                    pending += map(int, (thread / "children").read_text().split())
        return total * os.sysconf("SC_PAGE_SIZE")


@lru_cache(maxsize=8)
def check_sandbox(field: str, limits: Sandbox) -> None:
    """Try the sandbox.

    Args:
        field: setting that asks for programs to be run.

    Raises:
        ConfigError: on `field`, with the cause.
    """
    missing_tools = [tool for tool in TOOLS if shutil.which(tool) is None]
    cause = f"{', '.join(missing_tools)} cannot be found" if missing_tools else None
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        cause = "the kernel does not list children (CONFIG_PROC_CHILDREN), so memory is not limited"
    if not cause:
        try:
            with SandboxedPython("print('ready', flush=True)", [], limits):
                pass
        except SandboxBroken as error:
            cause = str(error)
            with contextlib.suppress(SandboxBroken):  # the same one again
                cause += f": {_complaint(limits)}"
    if cause:
        rule = f"generated programs run in a sandbox or not at all, and {cause}"
        raise rule_broken(field, "code", rule, INSTALL)


def _complaint(limits: Sandbox) -> str:
    """Message of bubblewrap where a program cannot be started."""
    with _system_call_filter() as seccomp:
        process = subprocess.run(
            [*_command(limits, seccomp), "-I", "-S", "-c", ""],
            capture_output=True,
            text=True,
            pass_fds=[seccomp],
            env={"PATH": os.defpath},
            timeout=START_SECONDS,
            check=False,
        )
    return process.stderr.strip().splitlines()[-1] if process.stderr.strip() else "no message"


def _command(limits: Sandbox, seccomp: int) -> list[str]:
    """Command line up to the interpreter's arguments.

    Inside, a user namespace maps nobody to whoever starts it. Root first becomes nobody for good,
    in a mount namespace that makes the interpreter reachable wherever it is: as root, rlimits on
    processes do not count, and files of root's could be read.
    """
    bwrap, prlimit, setpriv = (shutil.which(tool) or tool for tool in TOOLS)
    base, packages = sys.base_prefix, sysconfig.get_path("purelib")
    outer: list[str] = []
    if os.geteuid() == 0:
        outer = [bwrap, "--die-with-parent", "--unshare-pid", "--unshare-net"]
        outer += ["--dev-bind", "/proc", "/proc"]
        outer += ["--dev-bind", "/dev", "/dev", *_system(), "--dir", "/opt"]
        outer += ["--ro-bind", base, PYTHON, "--ro-bind", packages, PACKAGES]
        outer += ["--tmpfs", "/tmp", "--chdir", "/"]
        outer += [setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        outer += ["--inh-caps=-all", "--bounding-set=-all", "--pdeathsig=KILL"]
        base, packages = PYTHON, PACKAGES
    inner = [bwrap, "--die-with-parent", "--new-session", "--disable-userns"]
    inner += [f"--unshare-{what}" for what in ("user", "pid", "net", "ipc", "uts", "cgroup-try")]
    inner += ["--uid", str(NOBODY), "--gid", str(NOBODY), "--hostname", "sandbox"]
    inner += [*_system(), "--dir", "/opt", "--ro-bind", base, PYTHON]
    inner += ["--ro-bind", packages, PACKAGES, "--proc", "/proc", "--dev", "/dev"]
    inner += ["--remount-ro", "/dev", "--size", str(limits.files_mib * MIB), "--tmpfs", "/tmp"]
    inner += ["--remount-ro", "/", "--chdir", "/tmp", "--seccomp", str(seccomp), "--clearenv"]
    for name, value in (
        ("PATH", "/usr/bin"),
        ("LD_LIBRARY_PATH", f"{PYTHON}/lib"),
        ("HOME", "/tmp"),
        ("LANG", "C.UTF-8"),
        ("OPENBLAS_NUM_THREADS", "1"),
    ):
        inner += ["--setenv", name, value]
    memory = 2 * limits.memory_mib * MIB  # address space is larger than memory in use
    limiter = [prlimit, f"--as={memory}", f"--nproc={limits.processes}", "--core=0"]
    limiter += [f"--cpu={limits.cpu_seconds}:{limits.cpu_seconds + 1}", "--memlock=0"]
    limiter += [f"--fsize={limits.files_mib * MIB}", f"--nofile={limits.open_files}", "--"]
    executable, prefix = Path(sys.executable).resolve(), Path(sys.base_prefix).resolve()
    if not executable.is_relative_to(prefix):
        raise SandboxBroken(f"the interpreter {executable} is not below its prefix {prefix}")
    return [*outer, *inner, *limiter, f"{PYTHON}/{executable.relative_to(prefix)}"]


def _system() -> list[str]:
    """Mounts of the system's programs and libraries, under the names that they have here."""
    mounts = ["--ro-bind", "/usr", "/usr"]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        path = Path(name)
        if path.is_symlink():
            mounts += ["--symlink", os.readlink(path), name]
        elif path.is_dir():
            mounts += ["--ro-bind", name, name]
    return mounts


# Memory that no rlimit counts (memfd), parts of the kernel that no solution of a problem needs.
# Numbers: (x86_64, aarch64) of linux/arch/*/include/*/unistd.h.
DENIED = {
    "ptrace": (101, 117),
    "mount": (165, 40),
    "unshare": (272, 97),
    "setns": (308, 268),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "perf_event_open": (298, 241),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "memfd_create": (319, 279),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
}
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
LOAD, EQUAL, GREATER_OR_EQUAL, RETURN = 0x20, 0x15, 0x35, 0x06  # instructions of classic BPF
ALLOW, PERMISSION_DENIED, KILL_PROCESS = 0x7FFF0000, 0x00050000 | 1, 0x80000000
X32_CALLS = 0x40000000  # the same calls once more, under other numbers


def _filter_program() -> bytes:
    """Filter in classic BPF over struct seccomp_data: number at 0, architecture at 4."""
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        raise SandboxBroken(f"there is no system call filter for {machine}")
    column, architecture = ARCHITECTURES[machine]
    numbers = [numbers[column] for numbers in DENIED.values()]
    program = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL_PROCESS)]
    program += [(LOAD, 0, 0, 0), (GREATER_OR_EQUAL, len(numbers) + 1, 0, X32_CALLS)]
    for position, number in enumerate(numbers):
        program.append((EQUAL, len(numbers) - position, 0, number))
    program += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, PERMISSION_DENIED)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


@contextlib.contextmanager
def _system_call_filter() -> Iterator[int]:
    """Open a file descriptor from which bubblewrap reads the filter."""
    descriptor = os.memfd_create("filter")
    try:
        os.write(descriptor, _filter_program())
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)
