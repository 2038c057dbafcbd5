"""Samples that the data hold already, in the place of those that a run draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter

from nemo_trd.algorithm.acceptance import read_refinement, read_rollout
from nemo_trd.algorithm.refinement import refinement_prompt
from nemo_trd.data.types import Prompt, Refinement
from nemo_trd.run.sampling import Drawn, Sampler, numbered_samples


class StoredSampler(Sampler):
    """Takes y_o and y_r of each prompt from its row; completes as `Sampler` for evaluation."""

    def sample(self, prompts: Sequence[Prompt], step: int) -> Drawn:
        """The stored pairs of the prompts, judged as those of any step.

        A prompt that a step holds several times gives the same pair each time.
        """
        begin = perf_counter()
        refinements = self.map_shares(self._stored, numbered_samples(prompts, 1))
        return Drawn(refinements, {"rollout": 0.0, "refinement": perf_counter() - begin})

    def _stored(self, sample: tuple[Prompt, int]) -> Refinement:
        prompt, number = sample
        assert prompt.stored is not None  # generation.stored: data.prompts has read it
        y_o, y_r = prompt.stored.rollout, prompt.stored.refinement
        rollout = read_rollout(prompt, number, y_o, self._student_tokenizer, self._verify)
        context = refinement_prompt(rollout, self._config, self._teacher_tokenizer)
        if context.token_ids is None:
            y_r = None
        elif y_r is None:
            context = replace(context, token_ids=None, rejection="not_stored")
        return read_refinement(context, y_r, self._teacher_tokenizer, self._verify)
