"""Weight sync against stand-ins of vLLM servers: order, failures, time limits, memory, files.

tests/generation/test_weight_sync_on_servers.py has real servers.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import weakref
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pydantic import SecretStr
from safetensors.torch import load_file

from nemo_trd.config import schema as config
from nemo_trd.generation import transport as weight_transport
from nemo_trd.generation.transport import GlooLink, WeightFiles, buckets
from nemo_trd.generation.weight_sync import WeightSync, WeightSyncError

KEY = SecretStr("sk-not-to-be-seen")
TENSORS = {f"layer.{i}": torch.full((10,), float(i)) for i in range(10)}  # 40 bytes each
PHASES = [
    "pause",
    "update_weight_version",
    "abandon_weight_update",
    "start_weight_update",
    "update_weights",
    "weight_update_state",
    "finish_weight_update",
    "reset_prefix_cache",
    "resume",
]


class StandIn:
    """Answers as a server would. `fault` maps a path to "500", "garbage", "no reset" or "hang"."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.authorization: set[str | None] = set()
        self.fault: dict[str, str] = {}
        self.version, self.paused = "default", False
        self.loaded: dict[str, torch.Tensor] = {}
        self.worker_state: dict[str, Any] = {"failure": None, "missing": []}
        self.nccl_version: dict[str, Any] = {"version": None, "failure": "none here"}
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stand_in.answer(self)

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path, _, query = request.path.strip("/").partition("?")
        length = int(request.headers.get("content-length", 0))
        body = json.loads(request.rfile.read(length) or "{}")
        path = body.get("method", path)  # of /collective_rpc
        self.authorization.add(request.headers.get("authorization"))
        self.calls.append(f"{path} {query}".strip())
        fault = self.fault.get(path)
        if fault == "hang":
            time.sleep(100)
            return  # nobody waits any more: an answer would be an error in a later test's stderr
        answer: Any = {}
        if fault is None:
            answer = self.act(path, body)
        elif fault == "no reset":
            answer = {"success": False}
        text = b"<html>" if fault == "garbage" else json.dumps(answer).encode()
        request.send_response(500 if fault == "500" else 200)
        request.send_header("content-length", str(len(text)))
        request.end_headers()
        request.wfile.write(text)

    def act(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path in ("pause", "resume"):
            self.paused = path == "pause"
        if path == "update_weights":
            for file in body["update_info"]["paths"]:
                self.loaded |= load_file(file)
        if path == "update_weight_version":
            self.version = body["new_version"]
        if path == "finish_weight_update":
            self.version = body["weight_version"]
        told = {"weight_update_state": self.worker_state, "nccl_version": self.nccl_version}
        results = [told.get(path)]
        return {
            "results": results,
            "success": True,
            "weight_version": self.version,
            "is_paused": self.paused,
            "world_size": 1,
        }

    def restart(self) -> None:
        self.version, self.paused, self.loaded = "default", False, {}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def servers() -> Iterator[list[StandIn]]:
    made = [StandIn(), StandIn()]
    yield made
    for server in made:
        server.close()


def settings(directory: Path, **changes: Any) -> config.WeightSync:
    chosen = {
        "backend": "file",
        "in_flight": "finish",
        "directory": str(directory),
        "bucket_bytes": 100,
        "pause_timeout_seconds": 30.0,
        "call_timeout_seconds": 30.0,
        "timeout_seconds": 60.0,
    }
    return config.WeightSync.model_validate(chosen | changes)


def make_sync(servers: list[StandIn], directory: Path, **changes: Any) -> WeightSync:
    return WeightSync([s.url for s in servers], settings(directory, **changes), KEY)


@pytest.mark.parametrize("mode, asked", [("finish", "wait"), ("keep", "keep"), ("abort", "abort")])
def test_a_server_goes_through_all_phases_in_order(
    servers: list[StandIn], tmp_path: Path, mode: str, asked: str
) -> None:
    sync = make_sync(servers, tmp_path, in_flight=mode)
    sync.load_weights(TENSORS.items(), 3)
    for server in servers:
        calls = list(dict.fromkeys(server.calls))
        assert calls[0] == f"pause mode={asked}"
        assert [call.split()[0] for call in calls] == PHASES
        assert "reset_running_requests=true" in calls[7]
        assert server.loaded.keys() == TENSORS.keys()
        assert all(torch.equal(server.loaded[name], TENSORS[name]) for name in TENSORS)
        assert sync.is_current(server.url)
        assert server.version == "3"
    assert not sync.failures


@pytest.mark.parametrize("fault", ["500", "garbage"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_failure_in_any_phase_leaves_that_server_out_and_a_later_sync_repairs_it(
    servers: list[StandIn], tmp_path: Path, phase: str, fault: str
) -> None:
    good, bad = servers
    sync = make_sync(servers, tmp_path)
    bad.fault = {phase: fault}
    sync.load_weights(TENSORS.items(), 1)
    assert sync.is_current(good.url) and not sync.is_current(bad.url)
    assert list(sync.failures) == [bad.url]
    assert sync.failures[bad.url].startswith(f"{bad.url}: {phase}: ")
    assert bad.paused or phase == "pause"
    if phase != "resume":
        assert "resume" not in bad.calls
    bad.fault = {}
    sync.load_weights(TENSORS.items(), 2)
    assert sync.is_current(good.url) and sync.is_current(bad.url)
    assert not sync.failures


@pytest.mark.parametrize(
    "state, told",
    [
        ({"failure": "OSError: no such file", "missing": []}, "update_weights: OSError: no such"),
        ({"failure": None, "missing": ["a"]}, "finish_weight_update: not all tensors came, or"),
    ],
)
def test_a_server_whose_worker_reports_a_failure_does_not_serve(
    servers: list[StandIn], tmp_path: Path, state: dict[str, Any], told: str
) -> None:
    sync = make_sync(servers, tmp_path)
    servers[0].worker_state = state
    sync.load_weights(TENSORS.items(), 1)
    assert servers[0].paused and servers[0].version == "incomplete"
    assert f"{servers[0].url}: {told}" in sync.failures[servers[0].url]
    assert sync.is_current(servers[1].url)


def test_a_server_that_cannot_reset_its_cache_does_not_serve(
    servers: list[StandIn], tmp_path: Path
) -> None:
    sync = make_sync(servers, tmp_path)
    servers[0].fault = {"reset_prefix_cache": "no reset"}
    sync.load_weights(TENSORS.items(), 1)
    assert servers[0].paused and not sync.is_current(servers[0].url)
    assert "reset_prefix_cache" in sync.failures[servers[0].url]


@pytest.mark.parametrize("phase", ["pause", "update_weights"])
def test_a_server_that_does_not_answer_is_left_out_when_its_time_is_up(
    servers: list[StandIn], tmp_path: Path, phase: str
) -> None:
    limits = {"pause_timeout_seconds": 1.0, "call_timeout_seconds": 1.0}
    sync = make_sync(servers, tmp_path, **limits)
    servers[0].fault = {phase: "hang"}
    started = time.monotonic()
    sync.load_weights(TENSORS.items(), 1)
    assert time.monotonic() - started < 30
    assert sync.is_current(servers[1].url)
    assert "no answer within 1 s" in sync.failures[servers[0].url]


def test_the_whole_sync_has_a_time_limit(servers: list[StandIn], tmp_path: Path) -> None:
    limits = {"pause_timeout_seconds": 1.0, "call_timeout_seconds": 60.0, "timeout_seconds": 1.0}
    sync = make_sync(servers, tmp_path, **limits)
    for server in servers:
        server.fault = {"update_weights": "hang"}
    started = time.monotonic()
    with pytest.raises(WeightSyncError):
        sync.load_weights(TENSORS.items(), 1)
    assert time.monotonic() - started < 30


def test_when_all_servers_fail_the_error_names_each_with_its_phase(
    servers: list[StandIn], tmp_path: Path
) -> None:
    sync = make_sync(servers, tmp_path)
    servers[0].fault = {"start_weight_update": "500"}
    servers[1].close()
    with pytest.raises(WeightSyncError) as raised:
        sync.load_weights(TENSORS.items(), 1)
    assert f"{servers[0].url}: start_weight_update: status 500" in str(raised.value)
    assert f"{servers[1].url}: pause: ConnectError" in str(raised.value)


def test_when_the_tensors_break_off_servers_with_files_are_not_touched(
    servers: list[StandIn], tmp_path: Path
) -> None:
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(TENSORS.items())[:5]
        raise ZeroDivisionError("the export failed")

    sync = make_sync(servers, tmp_path)
    sync.load_weights(TENSORS.items(), 1)
    calls = [list(server.calls) for server in servers]
    with pytest.raises(ZeroDivisionError, match="the export failed"):
        sync.load_weights(broken(), 2)
    assert [server.calls for server in servers] == calls
    assert not any(server.paused for server in servers)
    assert not any(sync.is_current(server.url) for server in servers)  # version 2 is asked for
    assert not sync.update_replica(servers[0].url)  # and version 1 is not given instead
    sync.load_weights(TENSORS.items(), 2)
    assert all(sync.is_current(server.url) for server in servers)


def test_when_the_files_cannot_be_written_all_tensors_are_still_consumed(
    servers: list[StandIn], tmp_path: Path
) -> None:
    """The other ranks would wait for ever in the collectives that make the tensors."""
    (tmp_path / "file").write_text("in the way")
    sync = make_sync(servers, tmp_path / "file")
    left = dict(TENSORS)
    with pytest.raises(OSError):
        sync.load_weights(((name, left.pop(name)) for name in TENSORS), 1)
    assert not left


def test_a_restarted_server_is_brought_up_to_date_from_the_files(
    servers: list[StandIn], tmp_path: Path
) -> None:
    sync = make_sync(servers, tmp_path)
    assert sync.is_current(servers[0].url)  # before the first sync: as started
    sync.load_weights(TENSORS.items(), 1)
    servers[0].restart()
    assert not sync.is_current(servers[0].url)
    assert sync.update_replica(servers[0].url)
    assert servers[0].version == "1"
    assert servers[0].loaded.keys() == TENSORS.keys()


def test_the_key_is_sent_and_never_shown(
    servers: list[StandIn], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    sync = make_sync(servers, tmp_path)
    servers[0].fault = {"pause": "500"}
    sync.load_weights(TENSORS.items(), 1)
    key = KEY.get_secret_value()
    assert servers[0].authorization == servers[1].authorization == {f"Bearer {key}"}
    assert key not in caplog.text + str(sync.failures) + repr(vars(sync))
    assert "did not reach" in caplog.text


SIZES = [4, 40, 400, 8, 8, 8, 80, 1000, 12, 100]


class Tracked:
    """Yields tensors of `SIZES` floats; checks how many bytes of earlier ones exist by then."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._alive: dict[int, int] = {}

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for number, size in enumerate(SIZES):
            self._check(4 * SIZES[number - 1] if number else 0)
            memory = np.full(size, number, dtype=np.float32)
            self._alive[number] = memory.nbytes
            weakref.finalize(memory, self._alive.pop, number)
            tensor = torch.from_numpy(memory)
            del memory
            yield str(number), tensor
            del tensor

    def _check(self, previous: int) -> None:
        bound = max(self._max_bytes, previous)
        deadline = time.monotonic() + 30
        # A thread of gloo lets go of a tensor a moment after the broadcast has ended.
        while sum(self._alive.values()) > bound and time.monotonic() < deadline:
            time.sleep(0.001)
        assert previous <= sum(self._alive.values()) <= bound


@pytest.mark.parametrize("max_bytes", [1, 100, 10_000])
def test_with_files_never_more_than_a_bucket_and_one_tensor_exist(
    servers: list[StandIn], tmp_path: Path, max_bytes: int
) -> None:
    tensors = Tracked(max_bytes)
    sync = make_sync(servers, tmp_path, bucket_bytes=max_bytes)
    sync.load_weights(tensors, 1)
    assert [len(servers[0].loaded[str(n)]) for n in range(len(SIZES))] == SIZES


class Receiver:
    """The other end of a `GlooLink`: what the worker of a server does."""

    def __init__(self) -> None:
        self.received: dict[str, torch.Tensor] = {}
        self.takes_tensors = True

    def __call__(self, path: str, body: dict[str, Any]) -> None:
        limit = timedelta(seconds=60)
        if path == "/init_weight_transfer_engine":
            info = body["init_info"]
            place = (info["master_address"], info["master_port"], info["world_size"])
            store = dist.TCPStore(*place, is_master=False, timeout=limit)
            self.group: Any = dist.ProcessGroupGloo(store, 1, info["world_size"], limit)
        elif self.takes_tensors:
            info = body["update_info"]
            for name, dtype, shape in zip(
                info["names"], info["dtypes"], info["shapes"], strict=True
            ):
                tensor = torch.empty(shape, dtype=getattr(torch, dtype))
                self.group.broadcast(tensor, 0).wait()
                self.received[name] = tensor


@pytest.mark.parametrize("max_bytes", [1, 100, 10_000])
def test_with_gloo_never_more_than_a_bucket_and_one_tensor_exist(max_bytes: int) -> None:
    tensors, receiver = Tracked(max_bytes), Receiver()
    link = GlooLink(receiver, "http://127.0.0.1:1", workers=1, timeout=60)
    for bucket in buckets(tensors, max_bytes, to_host=True):
        link.send(bucket)
    link.close()
    assert list(receiver.received) == [str(number) for number in range(len(SIZES))]
    for number, size in enumerate(SIZES):
        assert torch.equal(receiver.received[str(number)], torch.full((size,), float(number)))


def test_a_server_that_answers_without_taking_the_tensors_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weight_transport, "END_SECONDS", 0.5)
    receiver = Receiver()
    link = GlooLink(receiver, "http://127.0.0.1:1", workers=1, timeout=40)
    receiver.takes_tensors = False
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="without taking all tensors"):
        link.send([("large", torch.zeros(1_000_000))])
    assert time.monotonic() - started < 20
    receiver.group = None  # or the broadcast would wait on
    link.close()


def test_files_appear_whole_and_old_versions_go(tmp_path: Path) -> None:
    files = WeightFiles(str(tmp_path))
    for left_over in (".version-7.tmp", "version-6"):
        (tmp_path / left_over).mkdir()
        (tmp_path / left_over / "00000.safetensors").write_text("cut")
    (tmp_path / "not-ours").mkdir()
    seen = []

    def content() -> Iterator[list[tuple[str, torch.Tensor]]]:
        for bucket in buckets(TENSORS.items(), 100, to_host=True):
            seen.append((tmp_path / "version-7").exists())
            yield bucket

    files.write(7, content())
    assert seen == [False] * 5
    assert len(files.paths) == 5
    loaded = {name: t for path in files.paths for name, t in load_file(path).items()}
    assert all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)
    files.delete_others()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["not-ours", "version-7"]
    files.delete()
    assert [p.name for p in tmp_path.iterdir()] == ["not-ours"]


def test_the_version_stays_while_a_server_is_brought_up_to_date(
    servers: list[StandIn], tmp_path: Path
) -> None:
    """Another thread gives it the weights of the version before, and labels them so."""
    sync = make_sync(servers, tmp_path)
    sync.load_weights(TENSORS.items(), 3)
    next_one = threading.Thread(target=sync.load_weights, args=(TENSORS.items(), 4))
    with sync._lock:
        next_one.start()
        next_one.join(0.3)
        assert sync.version == 3
    next_one.join(60)
    assert sync.version == 4 and all(server.version == "4" for server in servers)
