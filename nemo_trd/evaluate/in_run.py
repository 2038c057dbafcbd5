"""The evaluation of the student within a training run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nemo_trd.config.schema import Evaluation, Sampling
from nemo_trd.data.chat import text_to_judge
from nemo_trd.data.types import Completion, GenerationRequest, Prompt
from nemo_trd.evaluate.accuracy import Accuracy, Score, accuracy
from nemo_trd.generation.protocol import request_seed
from nemo_trd.verifiers.select import Verifier, judge_all

# Of a distributed run: collective, and every rank gets every completion.
Generate = Callable[[Sequence[GenerationRequest], Sampling, str], list[Completion]]
VerifyAll = Callable[[Callable[[Any], bool | None], Sequence[Any]], list[bool | None]]


def evaluate(
    generate: Generate,
    prompts: Sequence[Prompt],
    evaluation: Evaluation,
    seed: int,
    verify: Verifier,
    tokenizer: Any,
    verify_all: VerifyAll = judge_all,
) -> Accuracy:
    """Sample every prompt `evaluation.samples_per_problem` times and verify the answers.

    The seed of a sample depends on `seed`, the prompt's index and the sample's number only, so
    two evaluations with one seed differ by their weights alone. `verify_all` applies a function to
    every completion; in a distributed run it divides them among the ranks.

    Raises:
        ValueError: no prompt has an answer.
    """
    samples = [(p, sample) for p in prompts for sample in range(evaluation.samples_per_problem)]
    if not any(prompt.answer is not None for prompt in prompts):
        raise ValueError(f"none of the {len(prompts)} problems to evaluate on has an answer")
    requests = [
        GenerationRequest(
            p.token_ids, request_seed(seed, "evaluation", p.index, sample), affinity=p.index
        )
        for p, sample in samples
    ]
    completions = generate(requests, evaluation.sampling, "evaluation")
    verdicts = verify_all(
        lambda pair: _verdict(pair[0], pair[1], verify, tokenizer),
        list(zip([prompt for prompt, _ in samples], completions, strict=True)),
    )
    k = evaluation.samples_per_problem
    groups = [verdicts[start : start + k] for start in range(0, len(verdicts), k)]
    return accuracy(
        [
            Score(prompt.index, group.count(True), group.count(False), group.count(None))
            for prompt, group in zip(prompts, groups, strict=True)
        ],
        k,
    )


def _verdict(
    prompt: Prompt,
    completion: Completion,
    verify: Verifier,
    tokenizer: Any,
) -> bool | None:
    if prompt.answer is None or completion.finish_reason == "abort":
        return None
    text = completion.text(tokenizer)
    return verify(text_to_judge(text, prompt.token_ids, completion, tokenizer), prompt.answer)
