"""What generated programs try in the sandbox, and that it comes to nothing."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_trd.config.errors import ConfigError
from nemo_trd.config.schema import Sandbox
from nemo_trd.verifiers import sandbox
from nemo_trd.verifiers.sandbox import SandboxedPython, Stopped, check_sandbox

LIMITS = Sandbox(
    case_seconds=3,
    total_seconds=10,
    cpu_seconds=1,
    memory_mib=128,
    files_mib=4,
    output_mib=1,
    processes=12,
    open_files=32,
)
BEGIN = "import os, sys\nos.write(1, b'ready\\n')\n"
REPOSITORY = Path(__file__).parents[2]


def output_of(program: str, seconds: float = 60) -> str:
    with SandboxedPython(BEGIN + program, [], LIMITS) as python:
        return python.exchange(b"", "end", seconds).decode()


def stopped_by(program: str, seconds: float = 60) -> str:
    with pytest.raises(Stopped) as stopped:
        output_of(program, seconds)
    return stopped.value.reason


def attempts(*statements: str) -> list[str]:
    """The errors that each of them ends with; "done" where it works."""
    program = "import socket, ctypes, signal\n"
    for statement in statements:
        program += f"try:\n    {statement}\n    print('done')\n"
        program += "except BaseException as error:\n    print(type(error).__name__)\n"
    return output_of(program).split()


def test_the_sandbox_works_here() -> None:
    check_sandbox("data.verifier", LIMITS)
    assert output_of("print(sum(map(int, ['1', '2'])))") == "3\n"


def test_it_is_nobody_without_capabilities_or_a_way_to_new_privileges() -> None:
    told = output_of(
        "print(os.getuid(), os.getgid(), os.getgroups(), open('/proc/self/status').read())"
    )
    lines = dict(line.split(":\t", 1) for line in told.splitlines()[1:] if ":\t" in line)
    assert told.startswith("65534 65534")
    assert int(lines["CapEff"], 16) == int(lines["CapPrm"], 16) == 0
    assert (lines["NoNewPrivs"], lines["Seccomp"]) == ("1", "2")


def test_outside_it_is_not_root_even_when_started_by_root() -> None:
    with SandboxedPython(BEGIN + "sys.stdin.read()", [], LIMITS) as python:
        program = descendants(python._process.pid)[-1]
        assert os.stat(f"/proc/{program}").st_uid == (os.getuid() or sandbox.NOBODY)


def test_there_is_no_network_not_even_to_this_host() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert attempts(
            f"socket.create_connection(('127.0.0.1', {port}), 1)",
            "socket.create_connection(('192.0.2.1', 80), 1)",
            "socket.getaddrinfo('localhost.example', 80)",
        ) == ["ConnectionRefusedError", "OSError", "gaierror"]


def test_nothing_but_its_tmp_can_be_written_and_that_not_without_end(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    places = ["/x", "/usr/x", "/opt/x", "/dev/x", "/dev/shm/x", "/proc/sys/kernel/hostname"]
    errors = attempts(*(f"open({place!r}, 'w').write('x')" for place in [*places, f"{tmp_path}/x"]))
    assert "done" not in errors and not list(tmp_path.iterdir())
    assert attempts("open('/tmp/x', 'w').write('x')") == ["done"]
    assert not Path("/tmp/x").exists()
    many = "[open(f'/tmp/{i}', 'wb').write(bytes(2**20)) for i in range(9)]"
    one = "open('/tmp/a', 'wb').write(bytes(5 * 2**20))"
    assert (
        attempts("signal.signal(signal.SIGXFSZ, signal.SIG_IGN)", one, many)[1:] == ["OSError"] * 2
    )


def test_nothing_of_this_machine_is_seen(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    tmp_path.chmod(0o755)
    places = ["/etc/shadow", "/etc/passwd", "/root", str(Path.home()), str(REPOSITORY), "/sys"]
    wanted = [f"os.stat({place!r})" for place in [*places, f"{tmp_path}/secret"]]
    assert attempts(*wanted) == ["FileNotFoundError"] * len(wanted)


def test_the_environment_and_open_files_of_this_process_stay_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    with (tmp_path / "file").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        told = output_of(
            "import glob\n"
            "print(dict(os.environ), os.listdir('/proc/self/fd'))\n"
            "for name in glob.glob('/proc/*/environ') + glob.glob('/proc/*/cmdline'):\n"
            "    try: print(open(name).read())\n"
            "    except OSError: pass\n"
        )
    assert "hunter2" not in told and "SECRET" not in told
    assert "['0', '1', '2', '3']" in told  # 3 is the listing itself


def test_no_process_outside_can_be_killed() -> None:
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        told = attempts(f"os.kill({sleeper.pid}, 9)", f"os.kill({os.getpid()}, 9)")
        assert told == ["ProcessLookupError"] * 2
        output_of("os.kill(-1, 9)")  # its own, at the most
        output_of("os.kill(os.getppid(), 9)")
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()


def test_a_fork_bomb_ends_at_the_limit_and_leaves_nothing() -> None:
    told = output_of(
        "import time\n"
        "forked = 0\n"
        "try:\n"
        "    while True:\n"
        "        if os.fork() == 0: time.sleep(300)\n"
        "        forked += 1\n"
        "except OSError: print(forked, flush=True)\n"
    )
    assert 0 < int(told) <= LIMITS.processes
    assert not left_behind()


def test_a_fork_bomb_that_goes_on_is_killed_whole() -> None:
    bomb = "while True:\n    try: os.fork()\n    except OSError: pass\n"
    assert stopped_by(bomb, seconds=1.0) == "time_limit"
    assert not left_behind()


def test_children_that_leave_their_session_are_killed_too() -> None:
    daemon = "if os.fork() == 0:\n    os.setsid()\n    os.fork()\n    os.close(1)\n"
    daemon += "    import time\n    time.sleep(300)\nprint('parent')\n"
    assert output_of(daemon) == "parent\n"
    assert not left_behind()


def test_memory_is_limited_in_one_process_and_in_many_together() -> None:
    assert attempts("bytearray(2**30)") == ["MemoryError"]
    many = "for _ in range(8):\n    if os.fork() == 0: break\nhold = bytearray(60 * 2**20)\n"
    many += "hold[::4096] = b'x' * len(hold[::4096])\nimport time\ntime.sleep(600)\n"
    assert stopped_by(many) == "memory_limit"
    hidden = ["os.memfd_create('x')", "ctypes.CDLL(None, use_errno=True).shmget(0, 4096, 512)"]
    assert attempts(hidden[0]) == ["PermissionError"]
    assert output_of(f"import ctypes\nprint({hidden[1]})") == "-1\n"


def test_endless_output_is_cut_off() -> None:
    assert stopped_by("while True: os.write(1, b'x' * 10000)") == "output_limit"


def test_open_files_are_limited() -> None:
    assert attempts("[open('/dev/null') for _ in range(100)]") == ["OSError"]


@pytest.mark.parametrize(
    "program", ["import time\ntime.sleep(600)", "sys.stdin.read(); os.pause()"]
)
def test_sleeping_for_ever_ends_with_the_wall_clock(program: str) -> None:
    start = time.monotonic()
    with SandboxedPython(BEGIN + program, [], LIMITS) as python, pytest.raises(Stopped) as stopped:
        python.exchange(b"", "line", 0.5)
    assert stopped.value.reason == "time_limit"
    assert time.monotonic() - start < 60


def test_closing_its_output_does_not_make_it_go_on() -> None:
    assert stopped_by("os.close(1)\nimport time\ntime.sleep(600)", seconds=0.5) == "time_limit"


def test_cpu_time_is_limited_even_when_the_signal_is_ignored() -> None:
    program = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    with SandboxedPython(BEGIN + program, [], LIMITS) as python:
        python.exchange(b"", "end", 60)
        assert python.status == 137


def test_deep_recursion_ends_the_program_only() -> None:
    deep = "sys.setrecursionlimit(10**9)\nf = lambda n: f(n + 1)\nf(0)"
    assert stopped_by(deep) == "memory_limit"
    in_c = "class A:\n    def __repr__(self): return repr(self)\n"
    in_c += "sys.setrecursionlimit(10**9)\nrepr(A())"
    with SandboxedPython(BEGIN + in_c, [], LIMITS) as python:
        python.exchange(b"", "end", 60)
        assert python.status == 128 + signal.SIGSEGV


def test_the_kernel_is_not_asked_for_namespaces_tracing_or_keys() -> None:
    libc = "ctypes.CDLL(None, use_errno=True)"
    calls = ["unshare(0x10000000)", "unshare(0x20000)", "ptrace(0, 0, 0, 0)", "syscall(250, 0, 0)"]
    program = "import ctypes\n" + "".join(f"print({libc}.{call})\n" for call in calls)
    assert output_of(program).split() == ["-1"] * len(calls)
    clone = "print(ctypes.CDLL(None, use_errno=True).syscall(56, 0x10000011, 0, 0, 0, 0))"
    if os.uname().machine == "x86_64":  # clone with a new user namespace
        assert output_of(f"import ctypes\n{clone}") == "-1\n"


def test_killing_this_process_leaves_no_sandbox_behind() -> None:
    script = (
        "import time\n"
        "from nemo_trd.verifiers.sandbox import SandboxedPython\n"
        "from test_sandbox import BEGIN, LIMITS\n"
        "python = SandboxedPython(BEGIN + 'import time; time.sleep(300)', [], LIMITS)\n"
        "python.__enter__()\n"
        "print('started', flush=True)\n"
        "time.sleep(300)\n"
    )
    path = os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)])
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    started = descendants(process.pid)
    assert len(started) > 1
    process.kill()
    process.communicate()
    wait_until_gone(started)


def test_without_bubblewrap_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    check_sandbox.cache_clear()
    which = shutil.which
    monkeypatch.setattr(sandbox.shutil, "which", lambda t: None if t == "bwrap" else which(t))
    with pytest.raises(ConfigError, match="(?s)data.verifier = 'code'.*bwrap cannot be found.*Fix"):
        check_sandbox("data.verifier", LIMITS)
    monkeypatch.undo()
    check_sandbox.cache_clear()


def test_a_sandbox_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    check_sandbox.cache_clear()
    monkeypatch.setattr(sandbox.sysconfig, "get_path", lambda name: "/does/not/exist")
    with pytest.raises(ConfigError, match="/does/not/exist"):
        check_sandbox("data.verifier", LIMITS)
    check_sandbox.cache_clear()


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests are the test of this then")
def test_it_works_for_a_user_who_is_not_root() -> None:
    script = (
        "from test_sandbox import LIMITS, output_of\n"
        "from nemo_trd.verifiers.sandbox import check_sandbox\n"
        "import os\n"
        "check_sandbox('x', LIMITS)\n"
        "print(os.getuid(), output_of('print(os.getuid(), os.listdir(\"/\"))'))\n"
    )
    path = os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)])
    command = ["bwrap", "--dev-bind", "/", "/", *reachable()]
    command += ["setpriv", "--reuid=1234", "--regid=1234", "--clear-groups"]
    command += [
        "env",
        f"PYTHONPATH={path}",
        "PYTHONDONTWRITEBYTECODE=1",
        sys.executable,
        "-c",
        script,
    ]
    told = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert told.stdout.startswith("1234 65534"), told.stderr


def reachable() -> list[str]:
    """Mounts that let every user reach the interpreter and this repository."""
    mounts: list[str] = []
    paths = [Path(sys.base_prefix), Path(sys.prefix), REPOSITORY]
    for path in paths:
        closed = [p for p in reversed(path.parents) if not p.stat().st_mode & stat.S_IXOTH]
        if closed:
            mounts += ["--perms", "0755", "--tmpfs", str(closed[0])]
            below = [p for p in reversed(path.parents) if closed[0] in p.parents]
            for directory in below:
                mounts += ["--perms", "0755", "--dir", str(directory)]
            mounts += ["--ro-bind", str(path), str(path)]
    return mounts


def descendants(pid: int) -> list[int]:
    """`pid` and all processes below it, parents first."""
    found = [pid]
    for process in found:
        for thread in Path(f"/proc/{process}/task").iterdir():
            found += map(int, (thread / "children").read_text().split())
    return found


def left_behind() -> list[str]:
    """Command lines of processes of sandboxes that still run, after a moment to end."""
    deadline = time.monotonic() + 60
    while True:
        lines = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                line = Path("/proc", pid, "cmdline").read_bytes()
            except OSError:
                continue
            if BEGIN.encode() in line and b"pytest" not in line:
                lines.append(line.decode(errors="replace"))
        if not lines or time.monotonic() > deadline:
            return lines
        time.sleep(0.05)


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
