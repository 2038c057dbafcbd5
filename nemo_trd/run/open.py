"""Opening what a run works with beside its student: the frozen teacher and the generators."""

from __future__ import annotations

from collections.abc import Callable

from nemo_trd.config.schema import Config
from nemo_trd.megatron.student import Student
from nemo_trd.megatron.teacher import Teacher
from nemo_trd.run.generators import Generators
from nemo_trd.run.server_teacher import ServerTeacher

FrozenTeacher = Teacher | ServerTeacher


def open_teacher_and_generators(
    config: Config, student: Student, stopping: Callable[[], bool]
) -> tuple[FrozenTeacher, Generators]:
    """The teacher that `teacher.scoring` names, and the generators. Collective.

    A teacher in Megatron is loaded first: servers are started when it is known to be whole. Where
    it is the student without its adapter nothing is loaded.

    Raises:
        ConfigError: on all ranks.
        ServerError: on rank 0, a server did not start.
        GenerationFailed: the teacher's servers do not score.
    """
    if config.teacher.scoring == "megatron":
        base = student.models[0] if config.teacher_is_base else None
        return Teacher(config, student.groups, base), Generators(config, stopping)
    generators = Generators(config, stopping)
    scorer = generators.teacher_on_servers()  # does not wait for what `teacher` generates
    return ServerTeacher(config, scorer, student.groups, student.vocab_size), generators
