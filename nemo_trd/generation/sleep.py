"""Servers that give the memory of their GPUs back while somebody else computes on them.

Through vLLM's own endpoints: /sleep moves the weights to the host and drops keys and values,
/wake_up brings back the weights ("weights"), room for keys and values ("kv_cache"), or both.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlencode

import httpx
from pydantic import SecretStr

from nemo_trd.generation.protocol import GenerationFailed

PARTS = ("weights", "kv_cache")


class SleepingServers:
    """Servers of one model that sleep and wake up together. For one process.

    Args:
        timeout: seconds that a server may take for one of it.
    """

    def __init__(self, urls: Sequence[str], api_key: SecretStr | None, timeout: float) -> None:
        headers = {"Authorization": f"Bearer {api_key.get_secret_value()}"} if api_key else {}
        self._urls = [url.rstrip("/").removesuffix("/v1") for url in urls]
        # No proxy from the environment: servers are inside the cluster.
        self._client = httpx.Client(headers=headers, timeout=timeout, trust_env=False)
        self._awake = set(PARTS)

    def sleep(self) -> None:
        """Give the memory back.

        Raises:
            GenerationFailed: a server does not.
        """
        if self._awake:
            self._post("/sleep?level=1")
            self._awake = set()

    def wake(self, *parts: str) -> None:
        """Take memory for these of `PARTS` that are not awake.

        Raises:
            GenerationFailed: a server cannot.
        """
        missing = [part for part in parts if part not in self._awake]
        if missing:
            self._post(f"/wake_up?{urlencode([('tags', part) for part in missing])}")
            self._awake |= set(missing)

    def close(self) -> None:
        """Drop the connections. The servers stay as they are."""
        self._client.close()

    def _post(self, path: str) -> None:
        with ThreadPoolExecutor(len(self._urls), "sleep") as threads:
            failures = list(threads.map(lambda url: self._ask(url, path), self._urls))
        told = "\n".join(text for text in failures if text)
        if told:
            raise GenerationFailed(told)

    def _ask(self, url: str, path: str) -> str | None:
        """What went wrong, if anything."""
        try:
            response = self._client.post(url + path)
        except httpx.HTTPError as error:
            return f"{url}{path}: {type(error).__name__}: {error}"
        if response.status_code != 200:
            return f"{url}{path}: status {response.status_code}: {response.text[:300].strip()}"
        return None
