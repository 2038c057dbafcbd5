"""What surrounds a vLLM server, without one: its guard, its key, its address, refusals."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import SecretStr

from nemo_trd.config.errors import ConfigError
from nemo_trd.config.load import compose
from nemo_trd.config.schema import Speculation, VllmServer
from nemo_trd.distributed.process import TRAINING_ENVIRONMENT
from nemo_trd.serve import guard
from nemo_trd.serve.api_key import read_api_key
from nemo_trd.serve.environment import check_draft_package, find_vllm, server_environment
from nemo_trd.serve.main import main
from nemo_trd.serve.server import CPU_ARGUMENTS, Server, ServerError, servers_of, start_all
from nemo_trd.serve.worker.nemo_trd_auth import RequireKey

KEY = "a-secret-key-of-a-test"
SETTINGS = VllmServer(
    python=None,
    dtype="fp32",
    tensor_parallel_size=1,
    max_model_len=None,
    max_num_seqs=8,
    arguments=[],
    start_timeout_seconds=60,
    stop_timeout_seconds=2,
)
# A server with a worker in a session of its own. Neither obeys; both write their pid.
STUBBORN = """
    import os, signal, subprocess, sys, time
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    worker = "import time; time.sleep(300)"  # ignored signals stay ignored
    child = subprocess.Popen([sys.executable, "-c", worker], start_new_session=True)
    print(os.getpid(), child.pid, flush=True)
    {then}
"""
OBEDIENT = """
    import os, time
    print(os.getpid(), flush=True)
    time.sleep(300)
"""


def command(script: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(script)]


def start_guard(script: str, **options: Any) -> subprocess.Popen[str]:
    """A guard of `script` below this process, in a session of its own as `Server` starts it."""
    arguments = [sys.executable, "-I", guard.__file__, str(os.getpid()), "0.3", *command(script)]
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, text=True, start_new_session=True, **options
    )


def read_pids(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout is not None
    return [int(pid) for pid in process.stdout.readline().split()]


def all_gone(pids: list[int], seconds: float = 60) -> bool:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        alive = [p for p in pids if psutil.pid_exists(p) and not is_zombie(p)]
        if not alive:
            return True
        time.sleep(0.05)
    return False


def is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def test_guard_ends_everything_when_told_to(started: list[subprocess.Popen[str]]) -> None:
    process = start_guard(STUBBORN.format(then="time.sleep(300)"))
    started.append(process)
    pids = read_pids(process)
    process.terminate()
    assert process.wait(100) == 0
    assert len(pids) == 2 and all_gone(pids)


def test_guard_ends_everything_when_its_parent_is_killed(
    started: list[subprocess.Popen[str]],
) -> None:
    server = STUBBORN.format(then="time.sleep(300)")
    parent = f"""
        import os, subprocess, sys, time
        subprocess.Popen([sys.executable, "-I", {guard.__file__!r}, str(os.getpid()), "0.3",
                          *{command(server)!r}], start_new_session=True)
        time.sleep(300)
    """
    process = subprocess.Popen(command(parent), stdout=subprocess.PIPE, text=True)
    started.append(process)
    pids = read_pids(process)
    process.kill()
    assert len(pids) == 2 and all_gone(pids)


def test_guard_ends_workers_of_a_server_that_ends_and_passes_its_status_on(
    started: list[subprocess.Popen[str]],
) -> None:
    process = start_guard(STUBBORN.format(then="sys.exit(7)"))
    started.append(process)
    pids = read_pids(process)
    assert process.wait(100) == 7
    assert all_gone(pids)


def test_guard_reports_a_killed_server_as_a_shell_does(
    started: list[subprocess.Popen[str]],
) -> None:
    process = start_guard(OBEDIENT)
    started.append(process)
    (pid,) = read_pids(process)
    os.kill(pid, signal.SIGKILL)
    assert process.wait(100) == 128 + signal.SIGKILL


def test_server_is_asked_to_end_when_its_guard_is_killed(
    started: list[subprocess.Popen[str]],
) -> None:
    process = start_guard(OBEDIENT)
    started.append(process)
    pids = read_pids(process)
    process.kill()
    assert all_gone(pids)


def answer(path: str, authorization: str | None, kind: str = "http") -> list[Any]:
    """Messages that go out for a request of `path`; "app" stands for the server's own."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sent.append("app")

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {}

    headers = [(b"authorization", authorization.encode())] if authorization else []
    scope = {"type": kind, "path": path, "headers": headers}
    asyncio.run(RequireKey(app)(scope, receive, send))
    return sent


@pytest.mark.parametrize("path", ["/v1/models", "/collective_rpc", "/pause", "/health/../pause"])
def test_nothing_but_health_is_answered_without_the_key(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    for wrong in (None, "Bearer ", f"Bearer {KEY}x", KEY):
        assert answer(path, wrong)[0]["status"] == 401
    assert answer(path, f"Bearer {KEY}") == ["app"]
    assert answer("/health", None) == ["app"]
    assert answer(path, None, "websocket")[0]["type"] == "websocket.close"
    assert answer("", None, "lifespan") == ["app"]
    monkeypatch.delenv("VLLM_API_KEY")
    assert answer(path, None) == ["app"]


def test_key_comes_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", f" {KEY}\n")
    from_environment = read_api_key("SOME_KEY", None)
    assert from_environment == SecretStr(KEY) and KEY not in repr(from_environment)
    (tmp_path / "key").write_text("another\n")
    assert read_api_key("SOME_KEY", str(tmp_path / "key")) == SecretStr("another")
    assert read_api_key("ABSENT_KEY", None) is None
    with pytest.raises(ConfigError, match="api_key_file = .*cannot be read"):
        read_api_key("SOME_KEY", str(tmp_path / "absent"))
    monkeypatch.setenv("SOME_KEY", "two words")
    with pytest.raises(ConfigError) as refused:
        read_api_key("SOME_KEY", None)
    assert "api_key_env = 'SOME_KEY'" in str(refused.value) and "words" not in str(refused.value)


def test_interpreter_without_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"server\.python = '/no/python'.*does not run.*vllm-env"):
        find_vllm("/no/python")
    monkeypatch.setenv("NEMO_TRD_VLLM_PYTHON", sys.executable)
    with pytest.raises(ConfigError, match="it has no vLLM"):
        find_vllm(None)


def test_a_server_that_checks_drafts_is_told_where_they_come_from(tmp_path: Path) -> None:
    drafts = Speculation(method="ngram", tokens=5, lookup_max=4, lookup_min=2)
    server = Server("m", SETTINGS.model_copy(update={"speculation": drafts}), tmp_path / "log")
    arguments = server._arguments(is_cpu=False)
    expected = {"method": "ngram", "num_speculative_tokens": 5}
    expected |= {"prompt_lookup_max": 4, "prompt_lookup_min": 2}
    assert json.loads(arguments[arguments.index("--speculative-config") + 1]) == expected
    assert "--worker-extension-cls" not in arguments  # the kernels of a GPU need no mending

    suffix = Speculation(method="suffix", tokens=8)
    with pytest.raises(
        ConfigError, match=r"speculation\.method = 'suffix'.*arctic-inference.*ngram"
    ):
        check_draft_package(suffix, sys.executable, "speculation")


def test_a_gpu_computes_no_adapter_in_fp32(tmp_path: Path) -> None:
    exact = SETTINGS.model_copy(update={"dtype": "fp32"})
    server = Server("m", exact, tmp_path / "log", weight_backend="nccl", adapter_rank=8)
    server._check_adapters(is_cpu=True)
    with pytest.raises(ConfigError, match=r"dtype = 'fp32'.*bf16 and fp16.*what=merged"):
        server._check_adapters(is_cpu=False)


def test_url_is_where_others_reach_it(tmp_path: Path) -> None:
    def url(host: str) -> str:
        return Server("m", SETTINGS, tmp_path / "log", host=host, port=8000).url

    assert url("10.0.0.3") == "http://10.0.0.3:8000"
    assert url("::1") == "http://[::1]:8000"
    assert url("0.0.0.0") == f"http://{socket.gethostname()}:8000"


def test_key_goes_by_the_environment_and_gpus_need_no_special_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    server = Server("m", SETTINGS, tmp_path / "log", api_key=SecretStr(KEY), weight_backend="nccl")
    arguments = " ".join(server._arguments(is_cpu=False))
    assert KEY not in arguments and KEY not in repr(vars(server))
    # Chunked prefill and CUDA graphs are vLLM's defaults on GPUs.
    of_cpus = (*CPU_ARGUMENTS, "--max-num-batched-tokens", "--kv-cache-memory-bytes")
    assert not any(flag in arguments for flag in of_cpus)
    assert '{"backend": "nemo_trd"}' in arguments
    environment = server_environment(False, SecretStr(KEY), (4, 5))
    assert environment["VLLM_API_KEY"] == KEY and environment["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert environment["VLLM_USE_V2_MODEL_RUNNER"] == "0"


def test_devices_are_numbers_of_those_that_this_process_sees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-6ef,7")
    assert server_environment(False, None, (2, 3))["CUDA_VISIBLE_DEVICES"] == "GPU-6ef,7"
    assert server_environment(False, None, ())["CUDA_VISIBLE_DEVICES"] == "4,5,GPU-6ef,7"
    with pytest.raises(ConfigError, match=r"devices = \[4\]: .*CUDA_VISIBLE_DEVICES=4,5,GPU"):
        server_environment(False, None, (4,))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert server_environment(True, None, (4,))["CUDA_VISIBLE_DEVICES"] == ""  # builds for CPUs


def test_servers_on_one_gpu_start_in_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[str] = []
    for name in ("start", "wait_until_healthy"):
        monkeypatch.setattr(Server, name, lambda self, n=name: told.append(f"{n} {self.model[-1]}"))
    servers = [
        Server(name, SETTINGS, tmp_path / "log", devices=devices)
        for name, devices in (("a", (0,)), ("b", (0, 1)), ("c", (1,)), ("d", ()), ("e", ()))
    ]
    start_all(servers)
    first = ["a", "c", "d", "e"]
    assert told == [
        *(f"{what} {name}" for what in ("start", "wait_until_healthy") for name in first),
        *("start b", "wait_until_healthy b"),
    ]


def test_arguments_of_a_user_win_over_those_of_cpus(tmp_path: Path) -> None:
    own = SETTINGS.model_copy(
        update={"max_model_len": 512, "arguments": ["--kv-cache-memory-bytes", "4096"]}
    )
    arguments = Server("m", own, tmp_path / "log")._arguments(is_cpu=True)
    sizes = [arguments[i + 1] for i, a in enumerate(arguments) if a == "--kv-cache-memory-bytes"]
    assert sizes == [str(2**30), "4096"]  # vLLM takes the last


def test_server_does_not_take_itself_for_a_rank_of_the_trainer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainers = {"RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "PYTHONHOME", *TRAINING_ENVIRONMENT}
    for name in (*trainers, "VLLM_API_KEY"):
        monkeypatch.setenv(name, "1")
    environment = server_environment(True, None, ())
    assert not trainers & environment.keys()
    assert "VLLM_API_KEY" not in environment
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_servers_of_a_run_share_its_gpus_out(tmp_path: Path) -> None:
    config = compose(
        [
            *("generation=vllm", "generation.vllm.server.tensor_parallel_size=2"),
            *("generation.vllm.student.replicas=2", "generation.vllm.student.devices=[4,5,6,7]"),
        ]
    )
    vllm = config.generation.vllm
    assert vllm is not None
    servers = servers_of(config.model.student, vllm.student, vllm, tmp_path / "student", None, None)
    assert [list(server._devices) for server in servers] == [[4, 5], [6, 7]]
    assert [server.log_file.name for server in servers] == ["student-0.log", "student-1.log"]


def test_port_in_use_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_trd.serve.server.find_vllm", lambda *_: (sys.executable, True))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServerError, match=f"127.0.0.1 port {port}: .*port 0"):
            Server("m", SETTINGS, tmp_path / "log", port=port).start()


def test_command_line_refuses_what_cannot_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NEMO_TRD_API_KEY", raising=False)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        assert main(["--model", "m"]) == 2
        assert "NEMO_TRD_API_KEY" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            main(["--model", "m", "--no-api-key", "max_num_seqs=0"])
        assert "max_num_seqs: " in capsys.readouterr().err
        with pytest.raises(SystemExit):
            main(["--model", "m", "--no-api-key", "max_num_seq=4"])
        assert "max_num_seq: " in capsys.readouterr().err
        with pytest.raises(SystemExit):
            main(["--model", "m", "--no-api-key", "--devices", "0;1"])
        assert "--devices 0;1: " in capsys.readouterr().err
        for wrong in (["--adapter-rank", "8"], ["--weight-backend", "file", "--adapter-rank", "0"]):
            with pytest.raises(SystemExit):
                main(["--model", "m", "--no-api-key", *wrong])
            assert f"--adapter-rank {wrong[-1]}: " in capsys.readouterr().err
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), handlers, strict=True):
            signal.signal(number, handler)


def test_starting_a_server_imports_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, nemo_trd.serve.main; "
        "assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
