"""Which sequences are measured, and where they went wrong: from a run's samples/*.jsonl."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_trd.algorithm.change import first_difference
from nemo_trd.algorithm.refinement import privileged_context, refinement_prompt
from nemo_trd.algorithm.trajectories import refinement_trajectory, rollout_trajectory
from nemo_trd.config.errors import rule_broken
from nemo_trd.config.schema import Config
from nemo_trd.data.types import (
    Completion,
    Prompt,
    Refinement,
    RefinementPrompt,
    Rollout,
    TokenIds,
    Trajectory,
)
from nemo_trd.records.prefix_failure import Locator, TeacherContext, Verdict
from nemo_trd.toy import errors
from nemo_trd.toy.task import MARKS, NUMBERS, Factors, read_problem
from nemo_trd.toy.tokenizer import END

Choices = dict[int, tuple[int, int]]  # position of a label -> ids of (go on, turn back)


@dataclass(frozen=True)
class Answer:
    """One sequence of labels, y_o or y_r, with one of the contexts that a teacher may have."""

    trajectory: Trajectory
    teacher_context: TeacherContext
    verdict: Verdict  # on the rollout
    error: int | None  # position of the label at which the rollout went wrong, where it is known
    choices: Choices = field(default_factory=dict)


@dataclass(frozen=True)
class Answers:
    answers: list[Answer]
    counts: Counter[str]  # by the names of `Counts`
    locator: Locator


def read_answers(
    samples: Sequence[Mapping[str, Any]],
    prompts: Sequence[Prompt],
    config: Config,
    tokenizer: Any,
) -> Answers:
    """Every sample in both contexts of the teacher: y_o, and y_r where it was accepted.

    The toy task says where a rollout went wrong. Elsewhere a proxy does: where it is wrong and its
    rewrite right, the first token in which they differ. A rollout that is right went wrong nowhere.

    Args:
        samples: lines of samples/*.jsonl; see `nemo_trd.records.samples.sample_record`.
        tokenizer: the teacher's, which has the student's ids.

    Raises:
        ConfigError: a sample's problem is not the one that the data have at its index.
    """
    by_index = {prompt.index: prompt for prompt in prompts}
    problems = [read_problem(sample["problem"]) for sample in samples]
    words = {*NUMBERS, *MARKS, END}
    is_toy = None not in problems and words <= tokenizer.get_vocab().keys()
    collected = Answers([], Counter(), "toy" if is_toy else "first_difference")
    for sample, factors in zip(samples, problems, strict=True):
        prompt = by_index.get(sample["prompt_index"])
        if prompt is None or prompt.problem != sample["problem"]:
            raise rule_broken(
                "data.train.path",
                config.data.train.path,
                f"row {sample['prompt_index']} is not the problem of {sample.get('file')}",
                "set data.train.path to the data that the run had",
            )
        _add(collected, sample, prompt, factors if is_toy else None, config, tokenizer)
    return collected


def _add(
    collected: Answers,
    sample: Mapping[str, Any],
    prompt: Prompt,
    factors: Factors | None,
    config: Config,
    tokenizer: Any,
) -> None:
    counts, record = collected.counts, sample["rollout"]
    counts["samples"] += 1
    if record["finish_reason"] == "abort" or not record["token_ids"]:
        counts["aborted"] += 1
        return
    if record["correct"] is None:
        counts["no_verdict"] += 1
        return
    verdict: Verdict = "right" if record["correct"] else "wrong"
    counts[verdict] += 1
    rollout = Rollout(
        prompt, sample["sample_index"], _completion(record), record["text"], record["correct"]
    )
    request = refinement_prompt(rollout, config, tokenizer)
    refinement = _refinement(sample["refinement"], request)
    y_o = rollout.completion.token_ids
    error, choices = _located(factors, rollout, refinement, tokenizer, counts)
    contexts: dict[TeacherContext, TokenIds] = {
        "prompt": privileged_context(prompt, config, tokenizer).token_ids
    }
    if request.scoring_context is not None:
        contexts["refine"] = request.scoring_context
    for name, context in contexts.items():
        own = rollout_trajectory(rollout, context)
        collected.answers.append(Answer(own, name, verdict, error, choices))
    if refinement is None:
        return
    assert refinement.completion is not None
    y_r = refinement.completion.token_ids
    counts["refinements"] += 1
    counts["right_refinements"] += refinement.correct is True
    parted = first_difference(y_o, y_r)
    if error is not None and parted is not None and parted < error:
        counts["refinements_that_part_before_the_error"] += 1
        error = None
    rewritten = {} if factors is None else _toy_choices(factors, y_r, tokenizer)
    for name, context in contexts.items():
        own = refinement_trajectory(refinement, context)
        collected.answers.append(Answer(own, name, verdict, error, rewritten))


def _completion(record: Mapping[str, Any]) -> Completion:
    ids = tuple(record["token_ids"])
    return Completion(ids, record["finish_reason"], record["weight_version"])


def _refinement(record: Mapping[str, Any] | None, request: RefinementPrompt) -> Refinement | None:
    """An accepted rewrite, or nothing."""
    if record is None or record["rejection"] is not None or not record.get("token_ids"):
        return None
    return Refinement(request, _completion(record), record["text"], record["correct"], None)


def _located(
    factors: Factors | None,
    rollout: Rollout,
    refinement: Refinement | None,
    tokenizer: Any,
    counts: Counter[str],
) -> tuple[int | None, Choices]:
    """Where a wrong rollout went wrong, and where it left the teacher a choice."""
    y_o = rollout.completion.token_ids
    error: int | None = None
    choices: Choices = {}
    if factors is not None:
        error = errors.first_error(factors, tokenizer.convert_ids_to_tokens(list(y_o)), END)
        if rollout.correct:
            counts["right_with_a_wrong_step"] += error is not None
            return None, {}
        choices = _toy_choices(factors, y_o, tokenizer)
    elif rollout.correct:
        return None, {}
    elif refinement is not None and refinement.correct and refinement.completion is not None:
        y_r = refinement.completion.token_ids
        parted = first_difference(y_o, y_r)
        if parted is not None and parted < min(len(y_o), len(y_r)):
            error, choices = parted, {parted: (y_o[parted], y_r[parted])}
    counts["wrong_with_a_known_place" if error is not None else "wrong_without_one"] += 1
    return error, choices


def _toy_choices(factors: Factors, ids: TokenIds, tokenizer: Any) -> Choices:
    words = tokenizer.convert_ids_to_tokens(list(ids))
    return {
        place: tuple(tokenizer.convert_tokens_to_ids(list(choice)))
        for place, choice in errors.choices(factors, words, END).items()
    }
