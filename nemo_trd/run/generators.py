"""The generators of a run, student's and teacher's, and the servers that it starts for them."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import torch.distributed as dist
from pydantic import SecretStr

from nemo_trd.config.schema import Config, ModelSource, Vllm, VllmPool
from nemo_trd.distributed.exchange import from_first_rank
from nemo_trd.generation.protocol import Generator
from nemo_trd.models.vocabulary import read_vocabulary

if TYPE_CHECKING:
    from nemo_trd.generation.vllm import VllmGenerator


class Generators:
    """`student` and `teacher`, as `generation` says. Collective; `close` ends what was started.

    With `algorithm.trajectory=rollout` no rewrite is ever asked for, and the teacher's is the
    student's: a second model would idle. With `teacher.scoring=server` there is a `scorer` on the
    teacher's servers, beside the teacher's generator: the one does not wait for the other. Once
    `stopping`, none of them waits for servers that are out of service.
    """

    def __init__(self, config: Config, stopping: Callable[[], bool]) -> None:
        self._config = config
        self._stopping = stopping
        self._stack = ExitStack()
        self._progress = config.logging.progress and dist.get_rank() == 0
        self.scorer: VllmGenerator | None = None
        # Running servers of the teacher that are asked, and their key; none of the run's own.
        self.teacher_urls: list[str] = []
        self.api_key: SecretStr | None = None
        make: Callable[[ModelSource, str], Generator] = self._local
        if config.generation.vllm is not None:
            make = on_servers = self._on_servers()
            if config.teacher.scoring == "server":
                self.scorer = on_servers(config.teacher_source, "teacher")
        self.student = make(config.model.student, "student")
        self.teacher = self.student
        if config.algorithm.trajectory == "refinement":
            self.teacher = make(config.teacher_source, "teacher")

    def close(self) -> None:
        self._stack.close()

    def _local(self, source: ModelSource, role: str) -> Generator:
        from nemo_trd.generation.local import LocalGenerator

        return LocalGenerator(
            source.path,
            self._config.generation.local,
            source.trust_remote_code,
            self._progress,
            read_vocabulary(source, self._config.model.student),
        )

    def _on_servers(self) -> Callable[[ModelSource, str], VllmGenerator]:
        from nemo_trd.serve.api_key import read_api_key

        vllm = self._config.generation.vllm
        assert vllm is not None
        given = from_first_rank(lambda: read_api_key(vllm.api_key_env, vllm.api_key_file))
        # Servers of our own never stand open, whether or not anybody thought of a key.
        self.api_key = given
        if self._config.asks_teacher:
            self.teacher_urls = vllm.teacher.urls
        key = given or from_first_rank(lambda: SecretStr(secrets.token_urlsafe(32)))
        servers = from_first_rank(lambda: self._start(vllm, key))
        return partial(self._vllm, vllm, given, key, servers)

    def _vllm(
        self,
        vllm: Vllm,
        given: SecretStr | None,
        key: SecretStr,
        started: dict[str, list[str]],
        source: ModelSource,
        role: str,
    ) -> VllmGenerator:
        from nemo_trd.generation.stop_strings import decoder
        from nemo_trd.generation.vllm import VllmGenerator
        from nemo_trd.generation.weight_sync import WeightSync

        pool: VllmPool = getattr(vllm, role)
        urls = pool.urls or started[role]
        api_key = given if pool.urls else key
        sync = None
        if role == "student":
            sync = WeightSync(urls, vllm.weight_sync, api_key)
            self._stack.callback(sync.close)
        return VllmGenerator(
            urls,
            read_vocabulary(source, self._config.model.student),
            vllm.client,
            api_key=api_key,
            sync=sync,
            logprobs=role == "student",
            progress=self._progress,
            stopping=self._stopping,
            decode=decoder(source.path, source.trust_remote_code),
        )

    def _start(self, vllm: Vllm, key: SecretStr) -> dict[str, list[str]]:
        """Start the servers that are not given by URL, all together; their URLs by role."""
        from nemo_trd.serve.server import servers_of, start_all, stop_all

        models = {"student": self._config.model.student}
        if self._config.asks_teacher:
            models["teacher"] = self._config.teacher_source
        backends = {"student": vllm.weight_sync.backend, "teacher": None}
        logs = self._config.run_dir / "servers"
        servers = {
            role: servers_of(
                source,
                getattr(vllm, role),
                vllm,
                logs / role,
                key,
                backends[role],
                field=f"generation.vllm.{role}",
            )
            for role, source in models.items()
        }
        together = list(chain(*servers.values()))
        start_all(together)
        self._stack.callback(stop_all, together)
        return {role: [server.url for server in started] for role, started in servers.items()}
