"""Rollouts and refinements: requests to the generators, and what becomes of the completions.

Every rank asks for its own share, decodes and verifies it; then all ranks hold all records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from nemo_trd.algorithm.acceptance import read_refinements, read_rollout
from nemo_trd.algorithm.refinement import refinement_prompts
from nemo_trd.config.schema import Config, Sampling
from nemo_trd.data.types import (
    Completion,
    GenerationRequest,
    Prompt,
    Refinement,
    RefinementPrompt,
    Rollout,
)
from nemo_trd.distributed.exchange import fail_together, merge_shares, own_share
from nemo_trd.generation.protocol import Generator, request_seed
from nemo_trd.verifiers.select import judge_all, verifier

Item = TypeVar("Item")
Result = TypeVar("Result")


class Sampler:
    """Draws y_o from the student and y_r from the teacher. All methods are collective."""

    def __init__(
        self,
        config: Config,
        student: Generator,
        teacher: Generator,
        student_tokenizer: Any,
        teacher_tokenizer: Any,
    ) -> None:
        self._config = config
        self._student = student
        self._teacher = teacher
        self._student_tokenizer = student_tokenizer
        self._teacher_tokenizer = teacher_tokenizer
        self._verify = verifier(config.data.verifier, config.sandbox)
        # Samples may be drawn while the main thread exchanges something else.
        self._group = dist.new_group(backend="gloo")

    def rollouts(self, prompts: Sequence[Prompt], step: int) -> list[Rollout]:
        """y_o ~ pi_theta(. | x): `train.rollouts_per_prompt` for each prompt."""
        config = self._config
        samples = own_share(numbered_samples(prompts, config.train.rollouts_per_prompt))
        requests = [
            GenerationRequest(
                prompt.token_ids,
                request_seed(config.run.seed, "rollout", step, prompt.index, sample),
                affinity=prompt.index,
            )
            for prompt, sample in samples
        ]

        def share() -> list[Rollout]:
            completions = self._student.generate(requests, config.generation.rollout, "rollouts")
            return judge_all(
                lambda drawn: read_rollout(*drawn, self._student_tokenizer, self._verify),
                [(*sample, drawn) for sample, drawn in zip(samples, completions, strict=True)],
            )

        return self._merge(share)

    def refinements(self, rollouts: Sequence[Rollout], step: int) -> list[Refinement]:
        """y_r ~ pi_T(. | x, y_o), in OPSD pi_T(. | x, y*, y_o); rejected ones say why."""
        config = self._config
        contexts = refinement_prompts(own_share(rollouts), config, self._teacher_tokenizer)
        requests = [
            GenerationRequest(
                prompt.token_ids,
                self._refinement_seed(prompt, step),
                affinity=prompt.rollout.prompt.index,
            )
            for prompt in contexts
            if prompt.token_ids is not None
        ]

        def share() -> list[Refinement]:
            sampling = config.generation.refinement
            completions = self._teacher.generate(requests, sampling, "refinements")
            return read_refinements(
                contexts, completions, config, self._teacher_tokenizer, self._verify
            )

        return self._merge(share)

    def _refinement_seed(self, request: RefinementPrompt, step: int) -> int:
        prompt, sample = request.rollout.prompt, request.rollout.sample_index
        return request_seed(self._config.run.seed, "refinement", step, prompt.index, sample)

    def complete(
        self, requests: Sequence[GenerationRequest], sampling: Sampling, description: str
    ) -> list[Completion]:
        """Continue any requests with the current student, as evaluation does."""
        share = own_share(requests)
        return self._merge(lambda: self._student.generate(share, sampling, description))

    def map_shares(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """`function` of each item, in their order; every rank works on its own share."""
        share = own_share(items)
        return self._merge(lambda: judge_all(function, share))

    def _merge(self, make_share: Callable[[], list[Item]]) -> list[Item]:
        """The shares of all ranks together, in order.

        Raises:
            GenerationFailed: on all ranks, when it is raised on some.
        """
        return merge_shares(fail_together(make_share, self._group), self._group)


def numbered_samples(prompts: Sequence[Prompt], per_prompt: int) -> list[tuple[Prompt, int]]:
    """Every sample of a step with its number, which is its own among those of its prompt.

    A prompt that a step holds several times goes on counting: seeds and names stay distinct.
    """
    drawn: Counter[int] = Counter()
    numbered = []
    for prompt in prompts:
        first = drawn[prompt.index]
        numbered += [(prompt, sample) for sample in range(first, first + per_prompt)]
        drawn[prompt.index] += per_prompt
    return numbered
