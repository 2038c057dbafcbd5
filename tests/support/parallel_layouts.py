"""Settings that split a step over ranks, and trajectories that a step trains on."""

from __future__ import annotations

import random
from typing import Any

PROMPTS, VOCABULARY = 7, 120


def student(**sizes: int | bool) -> list[str]:
    return [f"parallel.student.{key}={value}" for key, value in sizes.items()]


def teacher(**sizes: int | bool) -> list[str]:
    return [f"parallel.teacher.{key}={value}" for key, value in sizes.items()]


TP2 = student(tensor_model_parallel_size=2)
CP2 = student(context_parallel_size=2)
PP2 = student(pipeline_model_parallel_size=2)
SP = student(sequence_parallel=True)
VPP2 = student(virtual_pipeline_model_parallel_size=2)
TEACHER_TP2 = teacher(tensor_model_parallel_size=2)
TEACHER_CP2 = teacher(context_parallel_size=2)
TEACHER_PP2 = teacher(pipeline_model_parallel_size=2)
EP2 = student(expert_model_parallel_size=2)
ETP2 = student(expert_tensor_parallel_size=2)
TEACHER_SP = teacher(sequence_parallel=True)
TEACHER_EP2 = teacher(expert_model_parallel_size=2)
ONE_EACH = ["train.max_tokens_per_micro_batch=null", "train.micro_batch_size=1"]
ALL_IN_ONE = ["train.max_tokens_per_micro_batch=100000"]
DISTRIBUTED = ["optimizer.distributed=true", "optimizer.overlap_grad_reduce=true"]


def trajectories(config: Any, step: int) -> list[Any]:
    """What one step trains on, through the code that pairs contexts."""
    from nemo_trd.algorithm.trajectories import pair
    from nemo_trd.data.types import (
        Completion,
        FittedContext,
        Prompt,
        Refinement,
        RefinementPrompt,
        Rollout,
    )

    rng = random.Random(step)

    def tokens(longest: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, longest)))

    refinements = []
    for index in range(PROMPTS):
        prompt = Prompt(index, "", tokens(9))
        rollout = Rollout(prompt, 0, Completion(tokens(20), "stop", step), "", None)
        request = RefinementPrompt(rollout, prompt.token_ids + rollout.completion.token_ids)
        answer = Completion(tokens(25), "stop", 0)
        # One of seven trains on its rollout, and one is left out.
        rejection = {2: "subset", 5: "truncated"}.get(index)
        refinements.append(Refinement(request, answer, "", None, rejection))
    return pair(refinements, config, lambda prompt: FittedContext((7, *prompt.token_ids)))
