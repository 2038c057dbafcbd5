"""Opening generators: in this process, or on vLLM servers that run already or are started here.

Runs and evaluations say which models they need; everything else about it is here. What an image of
servers lacks (torch, transformers) is imported when a generator is opened.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import SecretStr

from nemo_trd.config.schema import (
    LocalGeneration,
    ModelSource,
    ServedPool,
    VllmClient,
    VllmSettings,
)
from nemo_trd.serve.api_key import read_api_key
from nemo_trd.serve.server import servers_of, start_all, stop_all
from nemo_trd.serve.worker import ADAPTER_NAME

if TYPE_CHECKING:
    from nemo_trd.generation.api import Wanted
    from nemo_trd.generation.local import LocalGenerator
    from nemo_trd.generation.vllm import VllmGenerator
    from nemo_trd.generation.weight_sync import WeightSync


@dataclass(frozen=True)
class ServedModel:
    """A model, and the pool of servers that serve it."""

    source: ModelSource
    pool: ServedPool
    field: str  # the setting that holds the pool, for errors
    log_files: Path  # servers that are started write to `log_files`-0.log and so on
    weight_backend: str | None = None  # None: they keep the weights that they have loaded
    adapter_rank: int | None = None  # of the LoRA adapter that they are given; None: all weights
    sleeps: bool = False  # they may be told to give the memory of their GPUs back


@dataclass(frozen=True)
class Servers:
    """Servers of one model that answer, and the key that they ask for."""

    urls: list[str]
    api_key: SecretStr | None


@contextmanager
def open_servers(
    models: Mapping[str, ServedModel], settings: VllmSettings
) -> Iterator[dict[str, Servers]]:
    """The servers of every model, under the names of `models`.

    Those that are not given by URL are started, of all models together, and stopped on leaving.

    Raises:
        ConfigError: of the key, or of the servers' settings.
        ServerError: a server did not start; none is left running.
    """
    configured = read_api_key(settings.api_key_env, settings.api_key_file)
    # Servers of our own never stand open, whether or not anybody thought of a key.
    own = configured or SecretStr(secrets.token_urlsafe(32))
    started = {
        name: servers_of(
            model.source,
            model.pool,
            settings,
            model.log_files,
            own,
            model.weight_backend,
            adapter_rank=model.adapter_rank,
            sleeps=model.sleeps,
            field=model.field,
        )
        for name, model in models.items()
    }
    together = list(chain(*started.values()))
    start_all(together)
    try:
        yield {
            name: Servers(model.pool.urls, configured)
            if model.pool.urls
            else Servers([server.url for server in started[name]], own)
            for name, model in models.items()
        }
    finally:
        stop_all(together)


def generator_on_servers(
    source: ModelSource,
    servers: Servers,
    client: VllmClient,
    *,
    student: ModelSource | None = None,
    sync: WeightSync | None = None,
    initial_version: int | None = 0,
    adapted: bool = False,
    frozen: bool = False,
    logprobs: bool = False,
    wanted: Wanted | None = None,
    drafts: bool = False,
    progress: bool = False,
    stopping: Callable[[], bool] = lambda: False,
) -> VllmGenerator:
    """Generates with the model of `source` on `servers`; see `VllmGenerator`.

    With a `student`, it says nothing that the student's tokenizer does not know. `adapted`: with
    the adapter that the servers are given; `frozen`: without it.

    Raises:
        ConfigError: a generation_config.json that cannot be read.
    """
    from nemo_trd.generation.stop_strings import decoder
    from nemo_trd.generation.vllm import VllmGenerator
    from nemo_trd.models.vocabulary import read_vocabulary

    return VllmGenerator(
        servers.urls,
        read_vocabulary(source, student),
        client,
        api_key=servers.api_key,
        sync=sync,
        initial_version=initial_version,
        served_model=ADAPTER_NAME if adapted else None,
        frozen=frozen,
        logprobs=logprobs,
        wanted=wanted,
        drafts=drafts,
        progress=progress,
        stopping=stopping,
        decode=decoder(source.path, source.trust_remote_code),
    )


def local_generator(
    source: ModelSource,
    settings: LocalGeneration,
    *,
    student: ModelSource | None = None,
    progress: bool = False,
) -> LocalGenerator:
    """Generates with the model of `source` in this process; see `LocalGenerator`.

    With a `student`, it says nothing that the student's tokenizer does not know.

    Raises:
        ConfigError: the directory lacks weights, or has a generation_config.json that cannot be
            read.
    """
    from nemo_trd.generation.local import LocalGenerator
    from nemo_trd.models.vocabulary import read_vocabulary

    return LocalGenerator(
        source.path,
        settings,
        source.trust_remote_code,
        progress,
        read_vocabulary(source, student),
    )
