"""Ways for full tensors to get from the rank that sends them into the workers of vLLM servers.

`WeightFiles` writes safetensors that the servers read. `GlooLink` and `NcclLink` connect the
sender, rank 0 of a group, with all workers of one server, ranks 1 and up: one group a server, so
that the loss of one disturbs no other. Each bucket is announced by POST /update_weights and then
broadcast, tensor by tensor. The other ends are in serve/worker/nemo_trd_worker.py.
"""

from __future__ import annotations

import base64
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from nemo_trd.generation.nccl import Communicator, Nccl

Bucket = list[tuple[str, Tensor]]
END_SECONDS = 5.0  # within these one end of a transfer notices that the other has ended
Call = Callable[[str, dict[str, Any]], object]  # POST this body to this path of a server


def buckets(
    tensors: Iterable[tuple[str, Tensor]], max_bytes: int, to_host: bool
) -> Iterator[Bucket]:
    """Group tensors into lists of at most `max_bytes`; one that is larger comes alone.

    Each list is emptied when the next one is asked for, so that never more than one list and one
    tensor exist.
    """
    bucket: Bucket = []
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > max_bytes:
            yield bucket
            bucket.clear()
            size = 0
        own = tensor.detach().cpu() if to_host else tensor.detach()
        bucket.append((name, own.contiguous()))
        size += tensor.nbytes
    if bucket:
        yield bucket
        bucket.clear()


class WeightFiles:
    """One directory of safetensors per version, below a path that trainer and servers share."""

    def __init__(self, directory: str) -> None:
        self._root = Path(directory).absolute()
        self.version: int | None = None  # that `paths` are of
        self.paths: list[str] = []

    def write(self, version: int, content: Iterator[Bucket]) -> None:
        """Write one file a bucket. The files appear under their names when all are complete.

        Raises:
            OSError: the directory cannot be written.
        """
        target = self._root / f"version-{version}"
        temporary = self._root / f".{target.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        names = []
        for number, bucket in enumerate(content):
            names.append(f"{number:05d}.safetensors")
            save_file(dict(bucket), temporary / names[-1])
        shutil.rmtree(target, ignore_errors=True)
        os.rename(temporary, target)
        self.version, self.paths = version, [str(target / name) for name in names]

    def delete_others(self) -> None:
        """Delete all versions but the last one written, with what a killed run left."""
        for pattern in ("version-*", ".version-*.tmp"):
            for directory in self._root.glob(pattern):
                if directory.name != f"version-{self.version}":
                    shutil.rmtree(directory, ignore_errors=True)

    def delete(self) -> None:
        self.version, self.paths = None, []
        self.delete_others()


class Link(Protocol):
    """Connected on construction; carries any number of buckets."""

    def send(self, bucket: Bucket) -> None: ...

    def close(self) -> None: ...


class GlooLink:
    """Broadcasts of CPU tensors over TCP. As everywhere in gloo, GLOO_SOCKET_IFNAME is obeyed.

    Raises:
        Exception: what the server answered, or that it did not join within `timeout` seconds.
    """

    def __init__(self, call: Call, url: str, workers: int, timeout: float) -> None:
        self._call, self._timeout = call, timeout
        self._threads = ThreadPoolExecutor(2, "gloo-link")
        address = local_address(url)
        limit = timedelta(seconds=timeout)
        store = dist.TCPStore(
            address, 0, 1 + workers, is_master=True, timeout=limit, wait_for_workers=False
        )
        init = {
            "master_address": address,
            "master_port": store.port,
            "world_size": 1 + workers,
            "timeout_seconds": timeout,
        }

        def join() -> None:
            self._group: Any = dist.ProcessGroupGloo(store, 0, 1 + workers, limit)

        both(
            self._threads,
            lambda: call("/init_weight_transfer_engine", {"init_info": init}),
            join,
            timeout,
        )

    def send(self, bucket: Bucket) -> None:
        """Raises: Exception, as the constructor; the link is of no use then."""

        def broadcast() -> None:
            try:
                for _, tensor in bucket:
                    self._group.broadcast(tensor, 0).wait()
            except Exception:
                self._group = None  # closes the connections: no worker waits for more
                raise

        both(
            self._threads,
            lambda: self._call("/update_weights", {"update_info": announcement(bucket)}),
            broadcast,
            self._timeout,
        )

    def close(self) -> None:
        self._group = None
        self._threads.shutdown(wait=False)


class NcclLink:
    """Broadcasts of GPU tensors between GPUs.

    Raises:
        Exception: what the server answered, or that it did not join within `timeout` seconds.
    """

    def __init__(self, call: Call, url: str, workers: int, timeout: float) -> None:
        self._call, self._timeout = call, timeout
        self._threads = ThreadPoolExecutor(2, "nccl-link")
        self._device = torch.cuda.current_device()
        self._group: Communicator | None = None
        library = Nccl()
        unique_id = library.unique_id()
        init = {
            "nccl_unique_id": base64.b64encode(unique_id).decode(),
            "world_size": 1 + workers,
            "timeout_seconds": timeout,
        }

        def join() -> None:
            with torch.cuda.device(self._device):
                self._group = Communicator(library, unique_id, 1 + workers, timeout)

        try:
            both(
                self._threads,
                lambda: call("/init_weight_transfer_engine", {"init_info": init}),
                join,
                timeout,
            )
        except Exception:
            self.close()
            raise

    def send(self, bucket: Bucket) -> None:
        """Raises: Exception, as the constructor; the link is of no use then."""
        assert self._group is not None
        group = self._group
        # The tensors were made on the stream of the thread that calls the sync.
        torch.cuda.synchronize(self._device)

        def broadcast() -> None:
            with torch.cuda.device(self._device):
                for _, tensor in bucket:
                    group.broadcast(tensor)

        both(
            self._threads,
            lambda: self._call("/update_weights", {"update_info": announcement(bucket)}),
            broadcast,
            self._timeout,
        )

    def close(self) -> None:
        if self._group is not None:
            self._group.abort()
        self._group = None
        self._threads.shutdown(wait=False)


def announcement(bucket: Bucket) -> dict[str, list[Any]]:
    """What a server must know of tensors that are about to be broadcast."""
    return {
        "names": [name for name, _ in bucket],
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
    }


def both(
    threads: ThreadPoolExecutor,
    call: Callable[[], object],
    collective: Callable[[], None],
    timeout: float,
) -> None:
    """Run a call to a server beside our end of what it takes part in.

    Raises:
        Exception: that of the call, which says more, or else that of our end; TimeoutError.
    """
    calling: Future[Any] = threads.submit(call)
    ours: Future[Any] = threads.submit(collective)
    wait([calling, ours], timeout, FIRST_COMPLETED)
    if calling.done() or (ours.done() and ours.exception()):
        wait([calling, ours], END_SECONDS)  # one end alone does not get far
    else:
        wait([calling], timeout)
    if calling.done():
        calling.result()
    if ours.done():
        ours.result()
    if not calling.done():
        raise TimeoutError(f"no answer within {timeout:g} s")
    if not ours.done():
        raise TimeoutError("the server has answered without taking all tensors")


def local_address(url: str) -> str:
    """This machine's address as the server at `url` sees it."""
    parts = urlsplit(url)
    family, _, _, _, address = socket.getaddrinfo(
        parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM
    )[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # chooses a route; sends nothing
        return probe.getsockname()[0]
