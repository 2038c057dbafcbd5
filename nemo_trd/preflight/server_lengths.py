"""Rules on the longest sequences of a run and the lengths that its servers are started for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from nemo_trd.config.errors import ConfigError, rule_broken
from nemo_trd.config.schema import Config


class _LongestSequence(NamedTuple):
    """The longest sequence of one kind that the servers of a role see."""

    role: str
    field: str  # bounds the context
    context: int  # tokens
    answer: int  # tokens
    scored: bool  # the answer is part of the request, and vLLM generates one token more
    positions: int | None  # that the model is known to have, where nobody else checks them


def server_length_problems(
    config: Config, teacher_context: tuple[str, int], longest_answer: int, positions: int
) -> Iterator[ConfigError]:
    """Yield the settings that allow longer sequences than the servers of the run take.

    Servers at `urls` tell their length before the first request; that of others is a setting.

    Args:
        teacher_context: setting that bounds the teacher's context when it scores, and its tokens.
        longest_answer: number of tokens that the teacher scores, at most.
        positions: number that the teacher has.
    """
    vllm = config.generation.vllm
    if vllm is None:
        return
    for longest in _longest_sequences(config, teacher_context, longest_answer, positions):
        shared = config.teacher_on_student_servers
        pool = vllm.student if longest.role == "student" or shared else vllm.teacher
        started = pool.server.max_model_len if pool.replicas else None
        limit = min((n for n in (longest.positions, started) if n is not None), default=None)
        if limit is None or longest.context + longest.answer + longest.scored <= limit:
            continue
        scoring = ", and the one that a server generates when it scores them,"
        yield rule_broken(
            longest.field,
            longest.context,
            f"with up to {longest.answer} tokens after it{scoring if longest.scored else ''}"
            f" it exceeds the {limit} tokens of the {longest.role}'s servers",
            "lower it, or max_tokens of generation.rollout and generation.refinement, or raise "
            f"generation.vllm.{longest.role}.server.max_model_len",
        )


def _longest_sequences(
    config: Config, teacher_context: tuple[str, int], longest_answer: int, positions: int
) -> Iterator[_LongestSequence]:
    """Longest sequence of each kind of request: rollouts, refinements, scoring."""
    generation, evaluation = config.generation, config.evaluation
    answer = generation.rollout.max_tokens
    if evaluation.at_start or evaluation.at_end or evaluation.interval is not None:
        answer = max(answer, evaluation.sampling.max_tokens)
    prompt = config.data.max_prompt_tokens
    yield _LongestSequence("student", "data.max_prompt_tokens", prompt, answer, False, None)
    if config.algorithm.trajectory == "refinement":
        context, rewrite = config.refinement.max_context_tokens, generation.refinement.max_tokens
        yield _LongestSequence(
            "teacher", "refinement.max_context_tokens", context, rewrite, False, None
        )
    if config.scores_on_servers:
        yield _LongestSequence("teacher", *teacher_context, longest_answer, True, positions)
