"""Opening what a run works with beside its student: the teacher and the generators."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch.distributed as dist

from nemo_trd.config.schema import Config
from nemo_trd.megatron.student import Student
from nemo_trd.megatron.teacher import Teacher
from nemo_trd.run.generators import Generators
from nemo_trd.run.server_teacher import ServerTeacher, wanted_scores

FrozenTeacher = Teacher | ServerTeacher


def open_teacher_and_generators(
    config: Config, student: Student, stopping: Callable[[], bool]
) -> tuple[FrozenTeacher, Generators]:
    """The teacher that `teacher.scoring` names, and the generators. Collective.

    A teacher in Megatron is loaded first: servers are started when it is known to be whole. Where
    it is the student's own modules nothing is loaded.

    Raises:
        ConfigError: on all ranks.
        ServerError: on rank 0, a server did not start.
        GenerationFailed: the teacher's servers do not score.
    """
    if config.teacher.scoring == "megatron":
        own = student.models if config.teacher_is_student else None
        in_megatron = Teacher(config, student.groups, own, student.average)
        return in_megatron, _open_generators(config, student, stopping)
    generators = _open_generators(config, student, stopping)
    scorer = generators.teacher_on_servers()  # does not wait for what `teacher` generates
    top_k = config.loss.top_k or 1  # without: the label's own log-probability comes with any
    wanted = wanted_scores(top_k, student.vocab_size, scorer.vocabulary)
    if config.teacher.scoring == "generation":
        generators.score_while_writing(wanted)
    generated = generators.generated_scores
    teacher = ServerTeacher(scorer, wanted, student.groups, generated, generators.turn)
    return teacher, generators


def _open_generators(config: Config, student: Student, stopping: Callable[[], bool]) -> Generators:
    """The generators; servers that share the ranks' GPUs start while the student gives way."""
    with student.offloaded() if config.generation.colocate else nullcontext():
        dist.barrier()
        generators = Generators(config, stopping)
        if config.generation.colocate:
            generators.take_turns(student)
    return generators
