"""TRD in NeMo-RL's on-policy distillation: the student's generation, with the rewrite as output.

    generation = TRDGeneration(student_generation, teacher, config, tokenizer)
    distillation_train(student_policy, teacher_policy, generation, dataloader,
                       generation.bypassed(val_dataloader), ...)

`distillation_train` takes the output for the student's own and distils along it. Its teacher sees
prompt and output: `algorithm.teacher_context=prompt`. Written for the interface that is named in
docs/recipes.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import count
from typing import Any

import torch

from nemo_trd.adapters.needed import needed
from nemo_trd.algorithm.acceptance import (
    read_refinements,
    read_rollout,
    refinement_counts,
)
from nemo_trd.algorithm.refinement import refinement_prompts
from nemo_trd.algorithm.refinement_checks import check_templates
from nemo_trd.config.errors import rule_broken
from nemo_trd.config.schema import Config
from nemo_trd.data.types import Completion, GenerationRequest, Prompt, Refinement, TokenIds
from nemo_trd.generation.protocol import Generator, request_seed
from nemo_trd.verifiers.select import verifier


class TRDGeneration:
    """A `GenerationInterface` around the student's: everything but generating is handed through.

    `refinement_counts` of all batches so far are in `counts`.

    Args:
        student: what NeMo-RL made.
        teacher: rewrites; `nemo_trd.generation.vllm.VllmGenerator` on servers. The async method
            calls it from several threads at a time.
        tokenizer: of student and teacher.
        problem_of: the problem that refinement templates show, from the ids of a prompt. As it
            stands: what the ids decode to, special tokens left out.

    Raises:
        ImportError: without NeMo-RL.
        ConfigError: settings that NeMo-RL's trainer, or the chat template, cannot follow.
    """

    def __init__(
        self,
        student: Any,
        teacher: Generator,
        config: Config,
        tokenizer: Any,
        problem_of: Callable[[TokenIds], str] | None = None,
    ) -> None:
        with needed("nemo-rl 0.5 of github.com/NVIDIA-NeMo/RL", "install it from there: no extra"):
            from nemo_rl.models.generation.interfaces import GenerationInterface
        # Not by inheritance: what the interface defines would hide what the student's has.
        GenerationInterface.register(TRDGeneration)
        _check(config)
        check_templates(config, tokenizer)
        self._student = student
        self._teacher = teacher
        self._config = config
        self._tokenizer = tokenizer
        self._problem_of = problem_of or self._decode
        self._verify = verifier("none")
        self._numbers = count()
        self._bypass = False
        self.counts: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._student, name)

    def generate(self, data: Any, greedy: bool = False) -> Any:
        """Rewrites of what the student generates, as a `GenerationOutputSpec`."""
        output = self._student.generate(data, greedy)
        return output if self._bypass else self._rewritten(output)

    async def generate_async(
        self, data: Any, greedy: bool = False
    ) -> AsyncIterator[tuple[int, Any]]:
        """The same for one sample after the other, as they end."""
        async for index, output in self._student.generate_async(data, greedy):
            if not self._bypass:
                output = await asyncio.to_thread(self._rewritten, output)
            yield index, output

    def bypassed(self, dataloader: Any) -> _Bypassed:
        """A data loader of validation: while it is gone through, the student answers itself."""
        return _Bypassed(self, dataloader)

    def _decode(self, ids: TokenIds) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _rewritten(self, output: Any) -> Any:
        lengths, generated = output["unpadded_sequence_lengths"], output["generation_lengths"]
        truncated = output.get("truncated", torch.zeros(len(lengths), dtype=torch.bool))
        contexts: list[TokenIds] = []
        rollouts = []
        for row, length, new, cut in zip(
            output["output_ids"].tolist(),
            lengths.tolist(),
            generated.tolist(),
            truncated.tolist(),
            strict=True,
        ):
            context = tuple(row[: length - new])
            prompt = Prompt(next(self._numbers), self._problem_of(context), context)
            answer = Completion(tuple(row[length - new : length]), "length" if cut else "stop", 0)
            contexts.append(context)
            rollouts.append(read_rollout(prompt, 0, answer, self._tokenizer, self._verify))
        refinements = self._refine(rollouts)
        for name, value in refinement_counts(refinements, ()).items():
            self.counts[name] = self.counts.get(name, 0) + value
        answers = [_answer(refinement, self._config) for refinement in refinements]
        return self._output(type(output), contexts, answers)

    def _refine(self, rollouts: list[Any]) -> list[Refinement]:
        config = self._config
        prompts = refinement_prompts(rollouts, config, self._tokenizer)
        requests = [
            GenerationRequest(
                prompt.token_ids,
                request_seed(config.run.seed, "refinement", prompt.rollout.prompt.index),
            )
            for prompt in prompts
            if prompt.token_ids is not None
        ]
        answers = self._teacher.generate(requests, config.generation.refinement, "refinements")
        return read_refinements(prompts, answers, config, self._tokenizer, self._verify)

    def _output(self, kind: type, contexts: list[TokenIds], answers: list[Completion]) -> Any:
        """The student's log-probabilities are not in it: they would be those of other tokens."""
        rows = [
            torch.tensor(context + answer.token_ids)
            for context, answer in zip(contexts, answers, strict=True)
        ]
        return kind(
            {
                "output_ids": torch.nn.utils.rnn.pad_sequence(
                    rows, batch_first=True, padding_value=self._tokenizer.pad_token_id
                ),
                "generation_lengths": torch.tensor([len(answer.token_ids) for answer in answers]),
                "unpadded_sequence_lengths": torch.tensor([len(row) for row in rows]),
                "truncated": torch.tensor([a.finish_reason == "length" for a in answers]),
            }
        )


def _answer(refinement: Refinement, config: Config) -> Completion:
    """y: the rewrite, or as `refinement.on_failure` says."""
    if refinement.rejection is None:
        assert refinement.completion is not None
        return refinement.completion
    if config.refinement.on_failure == "error":
        raise RuntimeError(
            f"a rewrite is not usable ({refinement.rejection}) and refinement.on_failure = "
            "'error'. Fix: raise the limit that it met, or set refinement.on_failure=rollout."
        )
    return refinement.request.rollout.completion


def _check(config: Config) -> None:
    for field, value, wanted, rule in (
        ("algorithm.mode", config.algorithm.mode, "opd", "batches have no reference solution"),
        (
            "algorithm.teacher_context",
            config.algorithm.teacher_context,
            "prompt",
            "NeMo-RL's teacher sees the prompt and the output",
        ),
        ("refinement.subset", config.refinement.subset, "all", "nothing is verified here"),
        (
            "refinement.max_student_nll_gap",
            config.refinement.max_student_nll_gap,
            None,
            "nothing here asks the student for likelihoods before a step",
        ),
    ):
        if value != wanted:
            raise rule_broken(field, value, rule, f"set it to {wanted or 'null'}")
    if config.refinement.on_failure == "drop":
        raise rule_broken(
            "refinement.on_failure",
            "drop",
            "NeMo-RL trains on every sample of a batch",
            "set it to rollout or error",
        )


class _Bypassed:
    def __init__(self, generation: TRDGeneration, dataloader: Any) -> None:
        self._generation = generation
        self._dataloader = dataloader

    def __len__(self) -> int:
        return len(self._dataloader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataloader, name)

    def __iter__(self) -> Iterator[Any]:
        self._generation._bypass = True
        try:
            yield from self._dataloader
        finally:  # also when a loop over it ends before it does
            self._generation._bypass = False
