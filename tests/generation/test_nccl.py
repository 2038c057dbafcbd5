"""The binding of libnccl and the sender's end of a weight sync over it.

NCCL itself needs GPUs: a stand-in of a few functions (tests/support/fake_nccl.c) checks the
arguments and moves the bytes. That NCCL does the same is for `make test-gpu`.
"""

from __future__ import annotations

import base64
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_nccl import compile_fake_nccl, use_fake_nccl
from test_weight_sync import TENSORS, StandIn, make_sync

from nemo_trd.generation import nccl
from nemo_trd.generation import transport as weight_transport
from nemo_trd.generation.nccl import Communicator, Nccl, NcclError
from nemo_trd.generation.transport import NcclLink
from nemo_trd.generation.weight_sync import WeightSyncError


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_fake_nccl(tmp_path_factory.mktemp("fake_nccl"))


@pytest.fixture(autouse=True)
def fake(library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_fake_nccl(monkeypatch, library)
    monkeypatch.setenv("FAKE_NCCL_CALLS", str(tmp_path / "calls"))


def aborts(tmp_path: Path) -> list[str]:
    calls = tmp_path / "calls"
    return calls.read_text().splitlines() if calls.exists() else []


def wait_for_abort(tmp_path: Path) -> None:
    """Return when there is one; after 30 s all the same."""
    deadline = time.monotonic() + 30
    while not aborts(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)


class Receiver:
    """The worker's end: joins as rank 1 and takes what is announced, by the calls of NCCL."""

    def __init__(self, library: Path) -> None:
        self._nccl = Nccl(str(library))
        self._group = nccl.ctypes.c_void_p()
        self.received: dict[str, torch.Tensor] = {}

    def __call__(self, path: str, body: dict[str, Any]) -> None:
        if path == "/init_weight_transfer_engine":
            info = body["init_info"]
            unique_id = nccl.UniqueId.from_buffer_copy(base64.b64decode(info["nccl_unique_id"]))
            join = self._nccl._library.ncclCommInitRank
            join.argtypes = nccl._SIGNATURES["ncclCommInitRankConfig"][:4]
            assert join(nccl.ctypes.byref(self._group), info["world_size"], unique_id, 1) == 0
            return
        info = body["update_info"]
        for name, dtype, shape in zip(info["names"], info["dtypes"], info["shapes"], strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            place = (tensor.data_ptr(), tensor.data_ptr(), tensor.nbytes, nccl.UINT8, 0)
            self._nccl.call("ncclBroadcast", *place, self._group, None)
            self.received[name] = tensor


def test_tensors_of_any_type_reach_the_other_rank(library: Path, tmp_path: Path) -> None:
    receiver = Receiver(library)
    link = NcclLink(receiver, "http://127.0.0.1:1", workers=1, timeout=60)
    sent = {
        "a": torch.randn(3, 5),
        "b": torch.randn(70_000).bfloat16(),
        "c": torch.randn(4, 2).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(7),
    }
    link.send(list(sent.items())[:2])
    link.send(list(sent.items())[2:])
    assert list(receiver.received) == list(sent)
    for name, tensor in sent.items():
        other = receiver.received[name]
        assert other.dtype == tensor.dtype and other.shape == tensor.shape
        assert torch.equal(other.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
    assert aborts(tmp_path) == []
    link.close()
    link.close()
    assert aborts(tmp_path) == ["abort 0"]


def test_a_failed_call_says_which_and_what_nccl_says() -> None:
    library = Nccl()
    assert library.version() == 22907 and nccl.version_text(22907) == "2.29.7"
    assert len(library.unique_id()) == 128
    with pytest.raises(NcclError, match=r"ncclCommInitRankConfig: invalid argument \(4\)"):
        Communicator(library, bytes(128), 2, timeout=1)


def test_a_library_that_is_not_there_or_not_nccl_is_named() -> None:
    with pytest.raises(NcclError, match="libnowhere.so cannot be used"):
        Nccl("libnowhere.so")
    with pytest.raises(NcclError, match=r"libm.so.6 cannot be used: .*ncclGetVersion"):
        Nccl("libm.so.6")


def test_a_server_that_does_not_join_ends_in_an_abort_within_the_limit(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="ncclCommInitRankConfig did not end within 1 s"):
        NcclLink(lambda path, body: wait_for_abort(tmp_path), "http://h:1", workers=1, timeout=1)
    assert time.monotonic() - started < 20
    assert aborts(tmp_path) == ["abort 0"]


def test_a_broadcast_without_end_is_aborted_and_the_link_is_of_no_use(
    library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    link = NcclLink(Receiver(library), "http://h:1", workers=1, timeout=60)
    assert link._group is not None
    link._timeout = link._group._timeout = 0.5
    monkeypatch.setenv("FAKE_NCCL_STALL", "1")
    link._call = lambda path, body: time.sleep(0.9)
    with pytest.raises(TimeoutError, match=r"ncclBroadcast did not end within 0.5 s|no answer"):
        link.send([("a", torch.zeros(3))])
    wait_for_abort(tmp_path)
    assert aborts(tmp_path) == ["abort 0"]
    with pytest.raises(NcclError, match="the group has been aborted"):
        link.send([("a", torch.zeros(3))])


def test_an_abort_in_another_thread_ends_a_wait(library: Path, tmp_path: Path) -> None:
    receiver = Receiver(library)
    link = NcclLink(receiver, "http://h:1", workers=1, timeout=20)
    group = link._group
    assert group is not None
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(group._wait, "ncclBroadcast", lambda: False)
        time.sleep(0.1)
        link.close()
        with pytest.raises(NcclError, match="the group has been aborted"):
            waiting.result(5)
    assert aborts(tmp_path) == ["abort 0"]


@pytest.mark.parametrize(
    ("worker", "told"),
    [
        (
            {"version": 22809, "failure": None},
            r"nccl_version: the trainer has NCCL 2\.29\.7, the server 2\.28\.9: .* Fix: ",
        ),
        ({"version": None, "failure": "OSError: libnccl.so.2"}, "nccl_version: OSError: libnccl"),
    ],
)
def test_a_server_with_another_nccl_is_refused_before_it_is_joined(
    tmp_path: Path, worker: dict[str, Any], told: str
) -> None:
    server = StandIn()
    server.nccl_version = worker
    sync = make_sync([server], tmp_path, backend="nccl")
    with pytest.raises(WeightSyncError, match=told):
        sync.load_weights(TENSORS.items(), 1)
    assert "init_weight_transfer_engine" not in server.calls
    server.close()


def test_a_trainer_without_nccl_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "LIBRARY", "libnowhere.so")
    monkeypatch.setattr(weight_transport, "END_SECONDS", 0.2)
    server = StandIn()
    sync = make_sync([server], tmp_path, backend="nccl")
    with pytest.raises(WeightSyncError, match="libnowhere.so cannot be used"):
        sync.load_weights(TENSORS.items(), 1)
    server.close()
