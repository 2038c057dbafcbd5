"""The generators of a run, student's and teacher's, and the servers that it starts for them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import torch.distributed as dist

from nemo_trd.config.schema import Config, Vllm
from nemo_trd.distributed.exchange import from_first_rank
from nemo_trd.generation.protocol import Generator
from nemo_trd.run.generated_scores import GeneratedScores
from nemo_trd.serve.open import (
    ServedModel,
    Servers,
    generator_on_servers,
    local_generator,
    open_servers,
)

if TYPE_CHECKING:
    from nemo_trd.generation.api import Wanted


class Generators:
    """`student` and `teacher`, as `generation` says. Collective; `close` ends what was started.

    With `algorithm.trajectory=rollout` no rewrite is ever asked for, and the teacher's is the
    student's: a second model would idle. Once `stopping`, none of them waits for servers that are
    out of service.

    `on_servers` is false where both generate in this process. `compared_rollouts` is the number of
    rollouts a step whose log-probabilities on the servers are compared with the trainer's; 0
    without servers. `teacher_servers` are those of the teacher that run already; None without any.
    `generated_scores` holds what the teacher's servers computed while they wrote, after
    `score_while_writing`.
    """

    def __init__(self, config: Config, stopping: Callable[[], bool]) -> None:
        self._config = config
        self._stopping = stopping
        self._stack = ExitStack()
        self._progress = config.logging.progress and dist.get_rank() == 0
        self.teacher_servers: Servers | None = None
        self.generated_scores: GeneratedScores | None = None
        self.student: Generator
        self.teacher: Generator
        vllm = config.generation.vllm
        self.on_servers = vllm is not None
        self.compared_rollouts = 0 if vllm is None else vllm.compared_rollouts
        if vllm is None:
            self._open_local()
        else:
            self._open_on_servers(vllm)

    def close(self) -> None:
        self._stack.close()

    def score_while_writing(self, wanted: Wanted) -> None:
        """Have the teacher's servers give scores with each rewrite. Collective."""
        self.teacher = self.teacher_on_servers(wanted=wanted)
        self.generated_scores = GeneratedScores()

    def _open_local(self) -> None:
        config = self._config
        make = partial(
            local_generator,
            settings=config.generation.local,
            student=config.model.student,
            progress=self._progress,
        )
        self.student = self.teacher = make(config.model.student)
        if config.algorithm.trajectory == "refinement":
            self.teacher = make(config.teacher_source)

    def _open_on_servers(self, vllm: Vllm) -> None:
        from nemo_trd.generation.weight_sync import WeightSync

        config, student = self._config, self._config.model.student
        models = self._served_models(vllm)
        # Rank 0 starts them; the others hear where they are, and their key.
        servers = from_first_rank(lambda: self._stack.enter_context(open_servers(models, vllm)))
        make = partial(
            generator_on_servers,
            client=vllm.client,
            student=student,
            progress=self._progress,
            stopping=self._stopping,
        )
        sync = WeightSync(servers["student"].urls, vllm.weight_sync, servers["student"].api_key)
        self._stack.callback(sync.close)
        self.student = self.teacher = make(student, servers["student"], sync=sync, logprobs=True)
        if "teacher" not in models:
            return
        drafts = vllm.teacher.server.speculation is not None
        self.teacher_on_servers = partial(
            make, config.teacher_source, servers["teacher"], drafts=drafts
        )
        if vllm.teacher.urls:
            self.teacher_servers = servers["teacher"]
        if config.algorithm.trajectory == "refinement":
            self.teacher = self.teacher_on_servers()

    def _served_models(self, vllm: Vllm) -> dict[str, ServedModel]:
        """The models whose servers have work, by role."""
        config, logs = self._config, self._config.run_dir / "servers"
        models = {
            "student": ServedModel(
                config.model.student,
                vllm.student,
                "generation.vllm.student",
                logs / "student",
                vllm.weight_sync.backend,
            )
        }
        if config.asks_teacher:
            models["teacher"] = ServedModel(
                config.teacher_source, vllm.teacher, "generation.vllm.teacher", logs / "teacher"
            )
        return models
