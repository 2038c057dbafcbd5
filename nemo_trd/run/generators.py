"""The generators of a run, student's and teacher's, and the servers that it starts for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch.distributed as dist
from torch import Tensor

from nemo_trd.config.schema import Config, Vllm
from nemo_trd.distributed.exchange import from_first_rank
from nemo_trd.generation.protocol import Generator
from nemo_trd.generation.sleep import SleepingServers
from nemo_trd.megatron.student import Student
from nemo_trd.models.peft import begins_from_directory
from nemo_trd.run.generated_scores import GeneratedScores
from nemo_trd.run.turns import Turns
from nemo_trd.serve.open import (
    ServedModel,
    Servers,
    generator_on_servers,
    local_generator,
    open_servers,
)

if TYPE_CHECKING:
    from nemo_trd.generation.api import Wanted


class Unasked:
    """Generator of a run that asks it for nothing: stored samples, and no evaluation."""

    weight_version = 0

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take note of the version, and leave the weights where they are."""
        self.weight_version = version

    def generate(self, *asked: Any) -> NoReturn:
        raise AssertionError("nothing is asked where evaluation.wanted is false")

    stream = generate


class Generators:
    """`student` and `teacher`, as `generation` says. Collective; `close` ends what was started.

    Where no rewrite is ever asked for, the teacher's is the student's: a second model would idle.
    Where nothing is, no model is loaded and no server started. Once `stopping`, none of them waits
    for servers that are out of service.

    `on_servers`: whether servers answer for the student. `compared_rollouts` is the number of
    rollouts a step whose log-probabilities on the servers are compared with the trainer's; 0
    without servers. `teacher_servers` are those of the teacher that run already; None without any.
    `turns`: with `generation.colocate`, after `take_turns`. `generated_scores` holds what the
    teacher's servers computed while they wrote, after `score_while_writing`.
    """

    def __init__(self, config: Config, stopping: Callable[[], bool]) -> None:
        self._config = config
        self._stopping = stopping
        self._stack = ExitStack()
        self._progress = config.logging.progress and dist.get_rank() == 0
        self.teacher_servers: Servers | None = None
        self.generated_scores: GeneratedScores | None = None
        self.turns: Turns | None = None
        self._sleeping: dict[str, SleepingServers] = {}  # on the first rank
        self.student: Generator
        self.teacher: Generator
        vllm = config.generation.vllm
        self.on_servers = vllm is not None and config.asks_student
        self.compared_rollouts = 0 if vllm is None else vllm.compared_rollouts
        self.student = self.teacher = Unasked()
        if vllm is None:
            self._open_local()
        else:
            self._open_on_servers(vllm)

    def close(self) -> None:
        self._stack.close()

    def take_turns(self, student: Student) -> None:
        """Put the servers to sleep; from now on `turns` says when they work. Collective."""
        self.turns = Turns(student, self._sleeping)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Turn of the servers, within which they may be asked. Collective."""
        with nullcontext() if self.turns is None else self.turns.generating():
            yield

    def load_student(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Bring the student's weights to its generator. Collective."""
        if self.turns is not None and self.on_servers:
            self.turns.make_room_for_new_weights()
        self.student.load_weights(tensors, version)

    def load_teacher(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Bring the weights of a teacher that follows the student to its generator. Collective."""
        self.teacher.load_weights(tensors, version)

    def score_while_writing(self, wanted: Wanted) -> None:
        """Have the teacher's servers give scores with each rewrite. Collective."""
        self.teacher = self.teacher_on_servers(wanted=wanted)
        self.generated_scores = GeneratedScores(self._config.generation.max_staleness)

    def _open_local(self) -> None:
        config = self._config
        make = partial(
            local_generator,
            settings=config.generation.local,
            student=config.model.student,
            progress=self._progress,
        )
        if config.asks_student:
            self.student = self.teacher = make(config.model.student)
        if config.draws_rewrites:
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
        if config.generation.colocate and dist.get_rank() == 0:
            limit = vllm.weight_sync.call_timeout_seconds
            for role, there in servers.items():
                self._sleeping[role] = SleepingServers(there.urls, there.api_key, limit)
                self._stack.callback(self._sleeping[role].close)
        if "student" in models:
            of_student = servers["student"]
            sync = WeightSync(of_student.urls, vllm.weight_sync, of_student.api_key)
            self._stack.callback(sync.close)
            adapter = config.student.adapter
            # A server that starts again has the base alone; a trained adapter makes it another.
            other = adapter is not None and begins_from_directory(adapter)
            self.student = make(
                student,
                of_student,
                sync=sync,
                initial_version=None if other else 0,
                adapted=config.served_adapter is not None,
                logprobs=True,
            )
            self.teacher = self.student
        if not config.asks_teacher:
            return
        shared = config.teacher_on_student_servers
        self.teacher_on_servers = partial(
            make,
            config.teacher_source,
            servers["student" if shared else "teacher"],
            frozen=shared,
            drafts=vllm.teacher.server.speculation is not None,
        )
        if vllm.teacher.urls:
            self.teacher_servers = servers["teacher"]
        if config.draws_rewrites:
            self.teacher = self.teacher_on_servers()

    def _served_models(self, vllm: Vllm) -> dict[str, ServedModel]:
        """The models whose servers have work, by role."""
        config, logs = self._config, self._config.run_dir / "servers"
        adapter = config.served_adapter
        models = {}
        if config.asks_student:
            models["student"] = ServedModel(
                config.model.student,
                vllm.student,
                "generation.vllm.student",
                logs / "student",
                vllm.weight_sync.backend,
                adapter_rank=adapter.rank if adapter else None,
                sleeps=config.generation.colocate,
            )
        if config.asks_teacher and not config.teacher_on_student_servers:
            models["teacher"] = ServedModel(
                config.teacher_source,
                vllm.teacher,
                "generation.vllm.teacher",
                logs / "teacher",
                sleeps=config.generation.colocate,
            )
        return models
