"""Lengths of the longest sequences that settings allow, in tokens."""

from __future__ import annotations

from nemo_trd.config.schema import Config


def longest_trajectory(config: Config) -> int:
    """Length of the longest sequence, context and labels, that either model can meet."""
    return sum(tokens for _, tokens in parts_of_longest(config))


def parts_of_longest(config: Config) -> list[tuple[str, int]]:
    """Settings that limit the longest trajectory: (setting, tokens) of its context and answer."""
    longest = max(longest_contexts(config), key=lambda part: part[1])
    answers = [("generation.rollout.max_tokens", config.generation.rollout.max_tokens)]
    if config.algorithm.trajectory == "refinement":
        refinement = config.generation.refinement.max_tokens
        answers.append(("generation.refinement.max_tokens", refinement))
    return [longest, max(answers, key=lambda part: part[1])]


def longest_answer(config: Config) -> int:
    """Length of the longest rollout or refinement."""
    return parts_of_longest(config)[1][1]


def longest_contexts(config: Config) -> list[tuple[str, int]]:
    """Largest lengths of the student's and of the teacher's context: (setting, tokens) of each."""
    prompt = ("data.max_prompt_tokens", config.data.max_prompt_tokens)
    if config.algorithm.trajectory == "rollout" and config.algorithm.mode == "opd":
        return [prompt, prompt]
    return [prompt, ("refinement.max_context_tokens", config.refinement.max_context_tokens)]
