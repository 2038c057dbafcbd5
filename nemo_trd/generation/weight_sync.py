"""The student's weights, from any layout of Megatron to every vLLM server that samples from it.

A server is updated through vLLM's own endpoints for this, in this order:

    pause -> start_weight_update -> update_weights ... -> finish_weight_update(version)
          -> reset_prefix_cache -> resume

While its weights are neither the old nor the new ones it is paused and its version, as
/weight_info gives it, is "incomplete". A server whose update breaks off stays like that until a
later sync completes, whatever becomes of this process.
"""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from functools import partial

import torch.distributed as dist
from pydantic import SecretStr
from torch import Tensor

from nemo_trd.config import schema as config
from nemo_trd.generation.api import INITIAL_WEIGHTS
from nemo_trd.generation.protocol import GenerationFailed
from nemo_trd.generation.replica import Replica, ReplicaError
from nemo_trd.generation.transport import Bucket, WeightFiles, buckets

log = logging.getLogger(__name__)

GRACE_SECONDS = 5.0  # beyond a limit, for whoever ran into it to say so
_sync_numbers = itertools.count()  # the same on all ranks: syncs are collective


class WeightSyncError(GenerationFailed):
    """No server has the new weights. Names URL and phase of every failure."""


class WeightSync:
    """Keeps the servers at `urls` at the student's weights. Each training rank makes one.

    Rank 0 sends. It holds one bucket of `bucket_bytes` and one tensor at a time.

    `version` is what a server must have to be given work: that of the last `load_weights`,
    whether that succeeded or not. None before the first: the model that the servers loaded when
    they started.
    """

    def __init__(
        self, urls: Sequence[str], settings: config.WeightSync, api_key: SecretStr | None
    ) -> None:
        self._settings = settings
        self._replicas = {url: Replica(url, settings, api_key) for url in urls}
        self._files = WeightFiles(settings.directory) if settings.backend == "file" else None
        self._lock = threading.Lock()
        self._deadline = 0.0
        self.version: int | None = None
        self.failures: dict[str, str] = {}  # by URL, of the last sync

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Bring all servers to these weights. Collective; every rank consumes `tensors`.

        A server that fails is left out, with a warning and an entry in `failures`, and the
        others go on. It does not generate until a later sync reaches it.

        Raises:
            WeightSyncError: all servers failed; on every rank. Or rank 0 did not tell how it
                went within `timeout_seconds`.
            Exception: what `tensors` raised, on the ranks where it did. No server has the new
                weights then; with backend `file` all are as they were.
        """
        key = f"nemo_trd/weight_sync/{next(_sync_numbers)}"
        stream = (item for item in tensors)  # once broken, it has ended: see _send_all
        if _rank() == 0:
            with self._lock:  # `update_replica` has ended, with the weights before
                self.version = version
                self._send_all(stream, version, key)
            return
        self.version = version
        self._hear(f"{key}/ready")
        for _ in stream:
            pass
        outcome = json.loads(self._hear(f"{key}/done"))
        self.failures = outcome["failures"]
        if outcome["error"] is not None:
            raise WeightSyncError(outcome["error"])

    def is_current(self, url: str) -> bool:
        """Whether the server has the weights of the last sync, all of them, and serves them."""
        replica = self._replicas[url]
        expected = INITIAL_WEIGHTS if self.version is None else str(self.version)
        try:
            return replica.version() == expected and not replica.is_paused()
        except ReplicaError:
            return False

    def update_replica(self, url: str) -> bool:
        """Whether the server is current, after an attempt to make it so.

        With backend `file`, rank 0 gives it the files of the last sync. Otherwise it becomes
        current with the next sync. Safe in any thread.
        """
        if self.is_current(url):
            return True
        files = self._files
        if files is None or _rank() != 0 or not self._lock.acquire(blocking=False):
            return False  # not possible here, or a sync is under way
        try:
            if self.version is None or files.version != self.version:
                return False
            self._set_deadline()
            version, paths = self.version, files.paths
            self._on_each([url], lambda replica: replica.load_files(paths, version))
        finally:
            self._lock.release()
        return self.is_current(url)

    def close(self) -> None:
        """Drop connections and files. The servers go on with the weights that they have."""
        for replica in self._replicas.values():
            replica.close()
        if self._files is not None and _rank() == 0:
            self._files.delete()

    def _send_all(self, stream: Iterator[tuple[str, Tensor]], version: int, key: str) -> None:
        """Rank 0's part: send, and tell the other ranks how it went."""
        self._set_deadline()
        self.failures.clear()
        live = list(self._replicas)
        if self._files is None:
            live = self._on_each(live, Replica.begin)
        _tell(f"{key}/ready", "")  # pausing may take longer than the others may wait in `stream`
        error: BaseException | None = None
        try:
            self._send(stream, version, live)
        except BaseException as raised:
            error = raised
        text = None if error is None else f"rank 0: {type(error).__name__}: {error}"
        _tell(f"{key}/done", json.dumps({"error": text, "failures": self.failures}))
        if error is not None:
            # The others still take part in the exchanges that make the tensors.
            for _ in stream:
                pass
            raise error

    def _send(self, stream: Iterator[tuple[str, Tensor]], version: int, live: list[str]) -> None:
        settings = self._settings
        content = buckets(stream, settings.bucket_bytes, to_host=settings.backend != "nccl")
        if self._files is not None:
            self._files.write(version, content)  # the servers generate meanwhile
            paths = self._files.paths
            self._set_deadline()
            live = self._on_each(live, lambda replica: replica.load_files(paths, version))
            self._files.delete_others()
        else:
            live = self._broadcast(content, live)
            live = self._on_each(live, lambda replica: replica.finish(version))
        if not live:
            failures = "\n".join(self.failures.values())
            raise WeightSyncError(f"no server has the weights of version {version}:\n{failures}")

    def _broadcast(self, content: Iterator[Bucket], live: list[str]) -> list[str]:
        try:
            for bucket in content:
                live = self._on_each(live, partial(Replica.send, bucket=bucket))
                if not live:
                    break
        except BaseException as error:
            for url in live:
                cause = f"the tensors ended with {type(error).__name__}"
                self.failures[url] = f"{url}: update_weights: {cause}"
                self._replicas[url].give_up()
            raise
        return live

    def _on_each(self, urls: Sequence[str], action: Callable[[Replica], None]) -> list[str]:
        """Do something with several servers at a time; return those for which it worked."""
        for url in urls:
            self.failures.pop(url, None)
        if not urls:
            return []
        threads = ThreadPoolExecutor(len(urls), "weight-sync")
        tasks = {url: threads.submit(_attempt, self._replicas[url], action) for url in urls}
        threads.shutdown(wait=False)
        wait(tasks.values(), max(0.0, self._deadline + GRACE_SECONDS - time.monotonic()))
        for url, task in tasks.items():
            replica = self._replicas[url]
            cause: BaseException | None
            if task.done():
                cause = task.exception()
            else:
                cause = ReplicaError(replica.url, replica.phase, "no end within timeout_seconds")
            if cause is not None:
                self.failures[url] = str(cause)
                log.warning("weights of version %d did not reach %s", self.version, cause)
        return [url for url in urls if url not in self.failures]

    def _set_deadline(self) -> None:
        limits = self._settings.pause_timeout_seconds + self._settings.timeout_seconds
        self._deadline = time.monotonic() + limits
        for replica in self._replicas.values():
            replica.deadline = self._deadline

    def _hear(self, key: str) -> str:
        """The message of rank 0 to the other ranks.

        Raises:
            WeightSyncError: it told nothing for longer than a sync may take.
        """
        limit = self._settings.pause_timeout_seconds + self._settings.timeout_seconds
        limit += 2 * GRACE_SECONDS
        try:
            _store().wait([key], timedelta(seconds=limit))
        except RuntimeError as error:
            raise WeightSyncError(f"no word of rank 0 within {limit:g} s: {error}") from error
        return _store().get(key).decode()


def _attempt(replica: Replica, action: Callable[[Replica], None]) -> None:
    try:
        action(replica)
    except Exception as error:
        phase = replica.phase
        replica.give_up()
        if isinstance(error, ReplicaError):
            raise
        raise ReplicaError(replica.url, phase, f"{type(error).__name__}: {error}") from error


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _tell(key: str, message: str) -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        _store().set(key, message)


def _store() -> dist.Store:
    # What torch offers in public cannot wait with a limit while a rank is missing.
    return dist.distributed_c10d._get_default_store()
