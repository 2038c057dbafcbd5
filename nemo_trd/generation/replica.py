"""One vLLM server, as a weight sync sees it: its endpoints and the connection to its workers."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import httpx
from pydantic import SecretStr

from nemo_trd.config import schema as config
from nemo_trd.generation.api import CHECK_SECONDS
from nemo_trd.generation.nccl import Nccl, NcclError, version_text
from nemo_trd.generation.transport import Bucket, GlooLink, Link, NcclLink

log = logging.getLogger(__name__)

INCOMPLETE = "incomplete"  # the version of weights that are neither the old nor the new ones
PAUSE_MODES = {"finish": "wait", "keep": "keep", "abort": "abort"}


class ReplicaError(RuntimeError):
    """One server did not do what a phase of the sync asks for."""

    def __init__(self, url: str, phase: str, cause: object) -> None:
        super().__init__(f"{url}: {phase}: {cause}")


class Replica:
    """The endpoints of one server that a weight sync needs."""

    def __init__(self, url: str, settings: config.WeightSync, api_key: SecretStr | None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.deadline = 0.0  # of the sync under way
        self.phase = ""  # the last endpoint called
        self._settings = settings
        self._link: Link | None = None
        self._linked_version = ""  # that a complete sync stamped through that link
        headers = {"Authorization": f"Bearer {api_key.get_secret_value()}"} if api_key else {}
        # No proxy from the environment: servers are inside the cluster.
        self._client = httpx.Client(base_url=self.url, headers=headers, trust_env=False)

    def version(self) -> str:
        """The version of its weights; `INITIAL_WEIGHTS` until the first update."""
        return self._call("GET", "/weight_info", CHECK_SECONDS)["weight_version"]

    def is_paused(self) -> bool:
        return self._call("GET", "/is_paused", CHECK_SECONDS)["is_paused"]

    def begin(self) -> None:
        """Pause, and prepare for new weights, also where an earlier update broke off."""
        settings = self._settings
        mode = PAUSE_MODES[settings.in_flight]
        self._call("POST", f"/pause?mode={mode}", self._within(settings.pause_timeout_seconds))
        if self._link is not None and self.version() != self._linked_version:
            self._drop_link()  # it was started again since, or somebody else gave it weights
        self._post("/update_weight_version", {"new_version": INCOMPLETE})
        self._on_workers("abandon_weight_update")
        if settings.backend != "file" and self._link is None:
            self._connect()
        self._post("/start_weight_update", {})

    def _connect(self) -> None:
        self._post("/shutdown_weight_transfer_engine", {})
        layout = self._call("GET", "/get_world_size", CHECK_SECONDS)
        workers = int(layout["world_size"])  # tensor x pipeline x data parallel
        if self._settings.backend == "nccl":
            self._check_nccl()
        timeout = self._within(self._settings.call_timeout_seconds)
        kind = GlooLink if self._settings.backend == "gloo" else NcclLink
        try:
            self._link = kind(self._post, self.url, workers, timeout)
        except Exception as error:
            self._raise("init_weight_transfer_engine", error)

    def _check_nccl(self) -> None:
        """Raises: ReplicaError, where NCCL differs: joining would fail, or wait for ever."""
        try:
            ours = Nccl().version()
        except NcclError as error:
            raise ReplicaError(self.url, "nccl_version", error) from error
        for theirs in self._on_workers("nccl_version"):
            if theirs["failure"] is not None:
                raise ReplicaError(self.url, self.phase, theirs["failure"])
            if theirs["version"] != ours:
                raise ReplicaError(
                    self.url,
                    self.phase,
                    f"the trainer has NCCL {version_text(ours)}, the server "
                    f"{version_text(theirs['version'])}: a group needs one version. Fix: start the "
                    "server with VLLM_NCCL_SO_PATH at a libnccl.so.2 of the trainer's version, "
                    "take images with the same, or set "
                    "generation.vllm.weight_sync.backend=gloo",
                )

    def send(self, bucket: Bucket) -> None:
        assert self._link is not None
        try:
            self._link.send(bucket)
        except Exception as error:
            self._drop_link()
            self._raise("update_weights", error)

    def _raise(self, phase: str, error: Exception) -> NoReturn:
        """Raise what a worker says has gone wrong, or else the error as our end sees it."""
        if isinstance(error, ReplicaError):
            raise error
        states = self._on_workers("weight_update_state")
        causes = [state["failure"] for state in states if state["failure"]]
        raise ReplicaError(self.url, phase, causes or f"{type(error).__name__}: {error}") from error

    def finish(self, version: int) -> None:
        """Stamp the new weights, forget what the old ones computed, and serve again."""
        for state in self._on_workers("weight_update_state"):
            if state["failure"]:
                raise ReplicaError(self.url, "update_weights", state["failure"])
            if state["missing"]:
                text = f"not all tensors came, or wrong ones, for {state['missing']}"
                raise ReplicaError(self.url, "finish_weight_update", text)
        self._post("/finish_weight_update", {"weight_version": str(version)})
        self._linked_version = str(version)
        # Kept requests hold blocks of the cache: these are computed again with the new weights.
        path = "/reset_prefix_cache?reset_running_requests=true&reset_external=true"
        if not self._post(path, {})["success"]:
            raise ReplicaError(self.url, self.phase, "the server could not reset it")
        self._post("/resume", {})

    def load_files(self, paths: Sequence[str], version: int) -> None:
        """A whole update from safetensors."""
        self.begin()
        for path in paths:
            self._post("/update_weights", {"update_info": {"paths": [path]}})
        self.finish(version)

    def give_up(self) -> None:
        """Leave it paused. Requests that it still holds end now, so that others can take them."""
        self._drop_link()
        try:
            self._call("POST", "/abort_requests", CHECK_SECONDS, {})
        except ReplicaError:
            log.debug("%s does not abort its requests", self.url)

    def close(self) -> None:
        self._drop_link()
        self._client.close()

    def _drop_link(self) -> None:
        if self._link is not None:
            self._link.close()
        self._link = None

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self._call("POST", path, self._within(self._settings.call_timeout_seconds), body)

    def _on_workers(self, method: str) -> list[Any]:
        """Call a method of `WorkerExtension`, and return what each worker returns."""
        limit = self._within(self._settings.call_timeout_seconds)
        response = self._call("POST", "/collective_rpc", limit, {"method": method}, method)
        return response["results"]

    def _within(self, seconds: float) -> float:
        """So many seconds, or as many as the sync has left."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise ReplicaError(self.url, self.phase, "the sync takes too long (timeout_seconds)")
        return min(seconds, left)

    def _call(
        self,
        method: str,
        path: str,
        timeout: float,
        body: dict[str, Any] | None = None,
        phase: str | None = None,
    ) -> Any:
        """The JSON that the server responds with within `timeout` seconds.

        Raises:
            ReplicaError: no answer in time, or one that is not 200 with JSON.
        """
        self.phase = phase = phase or path.strip("/").partition("?")[0]
        try:
            response = self._client.request(method, path, json=body, timeout=timeout)
            if response.status_code != 200:
                text = f"status {response.status_code}: {response.text[:300].strip()}"
                raise ReplicaError(self.url, phase, text)
            return response.json() if response.content else None
        except httpx.TimeoutException:
            raise ReplicaError(self.url, phase, f"no answer within {timeout:g} s") from None
        except (httpx.HTTPError, ValueError) as error:
            raise ReplicaError(self.url, phase, f"{type(error).__name__}: {error}") from None
