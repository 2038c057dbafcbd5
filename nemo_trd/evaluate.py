"""Accuracy of a generator on problems with answers: avg@k and pass@k."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb, fsum, sqrt

from nemo_trd.config import Evaluation, Sampling
from nemo_trd.generation import request_seed
from nemo_trd.types import Completion, GenerationRequest, Prompt, TokenIds
from nemo_trd.verifiers import Verifier

# Of a distributed run: collective, and every rank gets every completion.
Generate = Callable[[Sequence[GenerationRequest], Sampling, str], list[Completion]]


def pass_at_k(decided: int, correct: int, k: int) -> float:
    """Probability that k of the `decided` samples, drawn without replacement, hold a right one.

    The unbiased estimate of Chen et al. (arXiv 2107.03374), in exact integers.

    Raises:
        ValueError: fewer samples than k.
    """
    if not 0 <= correct <= decided or not 1 <= k <= decided:
        raise ValueError(f"pass@{k} of {decided} samples, {correct} of them right, is not defined")
    return 1 - comb(decided - correct, k) / comb(decided, k)


@dataclass(frozen=True)
class Score:
    """What the samples of one problem were worth."""

    prompt_index: int
    correct: int
    wrong: int
    undecided: int  # the verifier had no verdict, or the generator aborted

    @property
    def decided(self) -> int:
        return self.correct + self.wrong


@dataclass(frozen=True)
class Accuracy:
    """avg@k and pass@k over `problems`.

    Samples without a verdict are neither right nor wrong: a problem is judged by its other
    samples (pass@k by as many of them as there are), one without any is left out of `problems`.
    Both are counted.
    """

    avg_at_k: float
    pass_at_k: float
    k: int
    problems: int
    stderr: float  # of avg_at_k, from the spread over problems; NaN with fewer than two
    undecided_samples: int
    undecided_problems: int
    scores: tuple[Score, ...]  # of every problem, in the order of the prompts

    def summary(self) -> dict[str, float]:
        """The figures under the names that they have in reports and `summary.json`."""
        return {
            f"avg@{self.k}": self.avg_at_k,
            f"pass@{self.k}": self.pass_at_k,
            "problems": self.problems,
            "stderr": self.stderr,
            "undecided_samples": self.undecided_samples,
            "undecided_problems": self.undecided_problems,
        }

    def __str__(self) -> str:
        text = (
            f"avg@{self.k} {self.avg_at_k:.3f} ± {self.stderr:.3f}, "
            f"pass@{self.k} {self.pass_at_k:.3f} ({self.problems} problems)"
        )
        if self.undecided_samples:
            text += (
                f"; no verdict on {self.undecided_samples} samples, "
                f"{self.undecided_problems} problems left out"
            )
        return text


def evaluate(
    generate: Generate,
    prompts: Sequence[Prompt],
    evaluation: Evaluation,
    seed: int,
    verify: Verifier,
    decode: Callable[[TokenIds], str],
) -> Accuracy:
    """Sample every prompt `evaluation.samples_per_problem` times and verify the answers.

    The seed of a sample depends on `seed`, the prompt's index and the sample's number only, so
    two evaluations with one seed differ by their weights alone. `decode` leaves special tokens
    out.

    Raises:
        ValueError: no prompt has an answer.
    """
    wanted = [(p, sample) for p in prompts for sample in range(evaluation.samples_per_problem)]
    if not any(prompt.answer is not None for prompt in prompts):
        raise ValueError(f"none of the {len(prompts)} problems to evaluate on has an answer")
    requests = [
        GenerationRequest(
            p.token_ids, request_seed(seed, "evaluation", p.index, sample), affinity=p.index
        )
        for p, sample in wanted
    ]
    completions = generate(requests, evaluation.sampling, "evaluation")
    verdicts = [
        _verdict(prompt, completion, verify, decode)
        for (prompt, _), completion in zip(wanted, completions, strict=True)
    ]
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
    decode: Callable[[TokenIds], str],
) -> bool | None:
    if prompt.answer is None or completion.finish_reason == "abort":
        return None
    return verify(decode(completion.token_ids), prompt.answer)


def accuracy(scores: Sequence[Score], k: int) -> Accuracy:
    """Averages over problems; NaN where nothing was decided."""
    judged = [score for score in scores if score.decided]
    rates = [score.correct / score.decided for score in judged]
    passes = [pass_at_k(s.decided, s.correct, min(k, s.decided)) for s in judged]
    mean = _mean(rates)
    spread = fsum((rate - mean) ** 2 for rate in rates)
    number = len(judged)
    return Accuracy(
        avg_at_k=mean,
        pass_at_k=_mean(passes),
        k=k,
        problems=number,
        stderr=sqrt(spread / (number - 1) / number) if number > 1 else float("nan"),
        undecided_samples=sum(score.undecided for score in scores),
        undecided_problems=len(scores) - number,
        scores=tuple(scores),
    )


def _mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values) if values else float("nan")
