"""Real vLLM servers of tests: their settings, and a few of them for a module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pydantic import SecretStr

from nemo_trd.config.schema import VllmServer
from nemo_trd.serve.server import Server, start_all, stop_all

SERVER = VllmServer(
    python=None,
    dtype="fp32",
    tensor_parallel_size=1,
    max_model_len=512,
    max_num_seqs=16,
    arguments=[],
    start_timeout_seconds=200,
    stop_timeout_seconds=10,
)


@contextmanager
def served(
    models: Path, backends: Mapping[str, str | None], key: str, start_timeout_seconds: float
) -> Iterator[dict[str, str]]:
    """Serve directories below `models`, each with a backend of weight sync or None: their URLs.

    Their logs stand beside them, as NAME.log.
    """
    settings = SERVER.model_copy(update={"start_timeout_seconds": start_timeout_seconds})
    servers = {
        name: Server(
            str(models / name),
            settings,
            models / f"{name}.log",
            api_key=SecretStr(key),
            weight_backend=backend,
        )
        for name, backend in backends.items()
    }
    start_all(list(servers.values()))
    try:
        yield {name: server.url for name, server in servers.items()}
    finally:
        stop_all(list(servers.values()))
