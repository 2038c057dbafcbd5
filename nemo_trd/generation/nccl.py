"""Broadcasts to vLLM's workers by NCCL itself: the calls of libnccl that a weight sync needs.

torch.cuda.nccl cannot join a group: before Python 3.13 its `init_rank` raises SystemError
(PY_SSIZE_T_CLEAN), and it has no abort. nccl4py would bring cuda-core and a build for each Python.
Names, types and values are those of nccl.h, NCCL 2.14 and newer.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

# torch has loaded its own, and the loader takes one in memory that has this name.
LIBRARY = "libnccl.so.2"
SUCCESS, IN_PROGRESS = 0, 7  # ncclResult_t
UINT8 = 1  # ncclDataType_t
POLL_SECONDS = 0.001


class UniqueId(ctypes.Structure):
    """ncclUniqueId. It is passed by value."""

    _fields_ = [("internal", ctypes.c_char * 128)]


class Config(ctypes.Structure):
    """ncclConfig_t as it was in 2.14; newer versions take defaults for what they have added."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
    ]


class NcclError(RuntimeError):
    """A call of libnccl failed; has the name of the call and what NCCL says."""


_SIGNATURES = {
    "ncclGetVersion": [ctypes.POINTER(ctypes.c_int)],
    "ncclGetUniqueId": [ctypes.POINTER(UniqueId)],
    "ncclCommInitRankConfig": [
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.c_int,
        UniqueId,
        ctypes.c_int,
        ctypes.POINTER(Config),
    ],
    "ncclCommGetAsyncError": [ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)],
    "ncclBroadcast": [
        ctypes.c_void_p,  # what is sent
        ctypes.c_void_p,  # where it is received
        ctypes.c_size_t,  # elements
        ctypes.c_int,  # ncclDataType_t
        ctypes.c_int,  # root
        ctypes.c_void_p,  # communicator
        ctypes.c_void_p,  # CUDA stream
    ],
    "ncclCommAbort": [ctypes.c_void_p],
}


class Nccl:
    """libnccl, loaded.

    Raises:
        NcclError: there is none, or it lacks a call.
    """

    def __init__(self, path: str | None = None) -> None:
        path = path or LIBRARY
        try:
            self._library = ctypes.CDLL(path)
            for name, types in _SIGNATURES.items():
                function = getattr(self._library, name)
                function.argtypes, function.restype = types, ctypes.c_int
            self._library.ncclGetErrorString.argtypes = [ctypes.c_int]
            self._library.ncclGetErrorString.restype = ctypes.c_char_p
        except (OSError, AttributeError) as error:
            raise NcclError(f"{path} cannot be used: {error}") from error

    def call(self, name: str, *arguments: object) -> None:
        """Raises: NcclError, unless the call succeeded or goes on in the background."""
        self.check(name, getattr(self._library, name)(*arguments))

    def check(self, name: str, result: int) -> None:
        if result not in (SUCCESS, IN_PROGRESS):
            text = self._library.ncclGetErrorString(result).decode()
            raise NcclError(f"{name}: {text} ({result})")

    def version(self) -> int:
        """As in NCCL_VERSION_CODE: 22907 for 2.29.7."""
        number = ctypes.c_int()
        self.call("ncclGetVersion", ctypes.byref(number))
        return number.value

    def unique_id(self) -> bytes:
        """A new group's id, 128 bytes. This process helps its ranks to meet."""
        unique_id = UniqueId()
        self.call("ncclGetUniqueId", ctypes.byref(unique_id))
        return bytes(unique_id)


class Communicator:
    """Rank 0 of a group, which sends. Every wait has a limit, after which the group is aborted.

    The group is made for the current CUDA device. NCCL does not block: any thread may abort.

    Raises:
        NcclError: of a call, also of one that another rank made fail.
        TimeoutError: not all ranks have joined within `timeout` seconds.
    """

    def __init__(self, library: Nccl, unique_id: bytes, size: int, timeout: float) -> None:
        self._library, self._timeout = library, timeout
        self._lock = threading.Lock()  # of the handle, which no call may use once it is aborted
        self._handle: ctypes.c_void_p | None = ctypes.c_void_p()
        config = Config(ctypes.sizeof(Config), 0xCAFEBEEF, 21400, 0)
        joined = (ctypes.byref(self._handle), size, UniqueId.from_buffer_copy(unique_id), 0)
        library.call("ncclCommInitRankConfig", *joined, ctypes.byref(config))
        self._wait("ncclCommInitRankConfig", lambda: True)

    def broadcast(self, tensor: Tensor) -> None:
        """Send a contiguous tensor to all ranks, as bytes, and wait until it has gone.

        It is sent on the current CUDA stream of this thread.

        Raises: as the constructor.
        """
        stream = torch.cuda.current_stream()
        address = tensor.data_ptr()
        with self._lock:
            place = (address, address, tensor.nbytes, UINT8, 0, self._open(), stream.cuda_stream)
            self._library.call("ncclBroadcast", *place)
        self._wait("ncclBroadcast", stream.query)

    def _wait(self, name: str, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self._timeout
        try:
            while self._state(name) == IN_PROGRESS or not done():
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{name} did not end within {self._timeout:g} s")
                time.sleep(POLL_SECONDS)
        except BaseException:
            self.abort()  # else its kernel would keep the stream for ever
            raise

    def _state(self, name: str) -> int:
        state = ctypes.c_int()
        with self._lock:
            self._library.call("ncclCommGetAsyncError", self._open(), ctypes.byref(state))
        self._library.check(name, state.value)
        return state.value

    def _open(self) -> ctypes.c_void_p:
        if self._handle is None:
            raise NcclError("the group has been aborted")
        return self._handle

    def abort(self) -> None:
        """End the group, whatever it does. ncclCommDestroy would wait for the other ranks."""
        with self._lock:
            handle, self._handle = self._handle, None
        if handle is not None:
            self._library.call("ncclCommAbort", handle)


def version_text(number: int) -> str:
    """2.29.7 for 22907."""
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
