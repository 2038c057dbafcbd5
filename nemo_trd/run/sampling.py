"""Rollouts and refinements: requests to the generators, and what becomes of the completions.

Every rank asks for its own share, decodes and verifies it; then all ranks hold all records.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

import torch.distributed as dist

from nemo_trd.algorithm.acceptance import read_refinement, read_rollout
from nemo_trd.algorithm.refinement import refinement_prompt
from nemo_trd.config.schema import Config, Sampling
from nemo_trd.data.types import (
    Completion,
    GenerationRequest,
    Prompt,
    Refinement,
    TokenIds,
)
from nemo_trd.distributed.exchange import fail_together, merge_shares, own_share
from nemo_trd.distributed.process import new_group
from nemo_trd.generation.pending import run_loop
from nemo_trd.generation.protocol import Generator, request_seed
from nemo_trd.records.under_way import UnderWay
from nemo_trd.run.generated_scores import GeneratedScores
from nemo_trd.run.pool_times import Asked, Span, sampling_seconds
from nemo_trd.run.turns import Turn
from nemo_trd.verifiers.judgement import Answer
from nemo_trd.verifiers.select import THREADS, judge_all, verifier

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Drawn:
    """The samples of a step, and the seconds that they took: see `sampling_seconds`."""

    refinements: list[Refinement]
    seconds: dict[str, float]


@dataclass(frozen=True)
class _Sample:
    refinement: Refinement
    rollout: Span  # when y_o was under way
    rewrite: Span | None  # when y_r was, if it was asked for


class Sampler:
    """Draws y_o from the student and y_r from the teacher. All methods are collective."""

    def __init__(
        self,
        config: Config,
        student: Generator,
        teacher: Generator,
        student_tokenizer: Any,
        teacher_tokenizer: Any,
        under_way: UnderWay | None = None,
        generated_scores: GeneratedScores | None = None,
        turn: Turn = nullcontext,
    ) -> None:
        """Collective.

        Args:
            under_way: keeps the completions of the steps that have yet to train.
            generated_scores: keeps the scores that come with the rewrites.
            turn: within which generators are asked.
        """
        self._config = config
        self._student = student
        self._teacher = teacher
        self._student_tokenizer = student_tokenizer
        self._teacher_tokenizer = teacher_tokenizer
        self._under_way = under_way
        self._generated_scores = generated_scores
        self._turn = turn
        self._oldest_version: int | None = None
        self._verify = verifier(config.data.verifier, config.sandbox)
        # Samples may be drawn while the main thread exchanges something else, and evaluates.
        self._group = new_group(backend="gloo")
        self._group_of_others = new_group(backend="gloo")
        if under_way is not None and dist.get_rank() == 0:  # all ranks have read what there was
            under_way.take_over(dist.get_world_size())

    def sample(self, prompts: Sequence[Prompt], step: int) -> Drawn:
        """Draw y_o ~ pi_theta(. | x), `train.rollouts_per_prompt` for each prompt, and rewrites.

        They are y_r ~ pi_T(. | x, y_o), in OPSD pi_T(. | x, y*, y_o); rejected ones say why. On
        servers each y_o is judged and rewritten as soon as it has ended, whatever else is
        under way; in this process all rollouts come first. The samples are the same.
        """
        if self._under_way is not None:
            self._under_way.begin(step, self._student.weight_version)
        if self._generated_scores is not None:
            self._generated_scores.begin(step)
        if self._config.generation.max_staleness > 1:  # weights may change until all is drawn
            self._oldest_version = self._student.weight_version
        own = own_share(numbered_samples(prompts, self._config.train.rollouts_per_prompt))
        begin = perf_counter()
        with self._turn():
            samples = self._merge(lambda: run_loop(self._draw(own, step, begin)), self._group)
        seconds = sampling_seconds(
            [sample.rollout for sample in samples],
            [sample.rewrite for sample in samples if sample.rewrite],
            perf_counter() - begin,
        )
        return Drawn([sample.refinement for sample in samples], seconds)

    async def _draw(
        self, samples: Sequence[tuple[Prompt, int]], step: int, begin: float
    ) -> list[_Sample]:
        """Draw this rank's share of `sample`."""
        generation = self._config.generation
        student, teacher = (
            Asked(generator, len(samples), begin, self._under_way)
            for generator in (self._student, self._teacher)
        )
        with ThreadPoolExecutor(THREADS, thread_name_prefix="verdicts") as threads:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(
                        self._refined(number, sample, step, student, teacher, threads)
                    )
                    for number, sample in enumerate(samples)
                ]
                group.create_task(
                    self._student.stream(
                        student.requests, generation.rollout, "rollouts", student.done
                    )
                )
                group.create_task(
                    self._teacher.stream(
                        teacher.requests, generation.refinement, "refinements", teacher.done
                    )
                )
        return [task.result() for task in tasks]

    async def _refined(
        self,
        number: int,
        sample: tuple[Prompt, int],
        step: int,
        student: Asked,
        teacher: Asked,
        threads: Executor,
    ) -> _Sample:
        """Take one sample its whole way: y_o, the verdict on it, c_T, y_r, the verdict on that."""
        config, tokenizer = self._config, self._teacher_tokenizer
        judging = partial(asyncio.get_running_loop().run_in_executor, threads)
        y_o, rollout_span = await student.ask(number, self._request("rollout", *sample, step))
        drawn = (*sample, y_o, self._student_tokenizer)
        judged = judging(read_rollout, *drawn, self._verify)
        # The teacher waits for the verdict only where that decides whether it rewrites.
        if config.refinement.subset == "all":
            rollout = await asyncio.to_thread(read_rollout, *drawn, _no_verdict)
        else:
            rollout = await judged
        context = await asyncio.to_thread(refinement_prompt, rollout, config, tokenizer)
        y_r, rewrite_span = None, None
        if context.token_ids is None:
            teacher.leave_out(number)
        else:
            request = self._request("refinement", *sample, step, context.token_ids)
            y_r, rewrite_span = await teacher.ask(number, request)
            if self._generated_scores is not None:
                y_r = self._generated_scores.keep(step, context.token_ids, y_r)
        context = replace(context, rollout=await judged)
        refinement = await judging(read_refinement, context, y_r, tokenizer, self._verify)
        return _Sample(refinement, rollout_span, rewrite_span)

    def _request(
        self, kind: str, prompt: Prompt, sample: int, step: int, context: TokenIds | None = None
    ) -> GenerationRequest:
        """Request for a sample, after x unless there is another context."""
        seed = request_seed(self._config.run.seed, kind, step, prompt.index, sample)
        oldest = self._oldest_version if kind == "rollout" else None
        ids = context or prompt.token_ids
        return GenerationRequest(ids, seed, affinity=prompt.index, oldest_version=oldest)

    def complete(
        self, requests: Sequence[GenerationRequest], sampling: Sampling, description: str
    ) -> list[Completion]:
        """Continue any requests with the current student, as evaluation does."""
        share = own_share(requests)
        with self._turn():
            return self._merge(
                lambda: self._student.generate(share, sampling, description), self._group_of_others
            )

    def map_shares(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """`function` of each item, in their order; every rank works on its own share."""
        share = own_share(items)
        return self._merge(lambda: judge_all(function, share), self._group_of_others)

    def _merge(self, make_share: Callable[[], list[Item]], group: dist.ProcessGroup) -> list[Item]:
        """The shares of all ranks together, in order.

        Raises:
            GenerationFailed: on all ranks, when it is raised on some.
        """
        return merge_shares(fail_together(make_share, group), group)


def _no_verdict(text: str, answer: Answer) -> None:
    """Stand in for a verifier where the verdict is still to come."""


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
