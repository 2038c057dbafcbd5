"""Lengths of the longest sequences that settings allow, in tokens."""

from __future__ import annotations

from nemo_trd.config.schema import Config


def longest_trajectory(config: Config) -> int:
    """Length of the longest sequence, context and labels, that either model can meet."""
    return max(context for _, context in longest_contexts(config)) + longest_answer(config)


def longest_answer(config: Config) -> int:
    """Length of the longest rollout or refinement."""
    longest = config.generation.rollout.max_tokens
    if config.algorithm.trajectory == "refinement":
        longest = max(longest, config.generation.refinement.max_tokens)
    return longest


def longest_contexts(config: Config) -> list[tuple[str, int]]:
    """Largest lengths of the student's and of the teacher's context: (setting, tokens) of each."""
    prompt = ("data.max_prompt_tokens", config.data.max_prompt_tokens)
    if config.algorithm.trajectory == "rollout" and config.algorithm.mode == "opd":
        return [prompt, prompt]
    return [prompt, ("refinement.max_context_tokens", config.refinement.max_context_tokens)]
