"""Whether the servers and the trainer agree on the student's log-probabilities.

A rollout is only a sample of pi_theta when the server that drew it computes what Megatron does:
the same weights, rotary embedding, normalisation, special tokens. Every run checks that before
its first step, and measures it in every step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_trd.algorithm.trajectories import rollout_trajectory
from nemo_trd.config.schema import Config, Sampling
from nemo_trd.data.types import Completion, GenerationRequest, Prompt, Rollout, Trajectory
from nemo_trd.generation.protocol import request_seed

log = logging.getLogger(__name__)

# Mean |difference| of a token's log-probability that rounding can explain, in nats. In fp32 it is
# some 1e-6. In bf16 single rare tokens differ by far more than the mean, of which 0.05 is the
# usual bound for a healthy pair of engines (NeMo-RL's token_mult_prob_error of 1.05).
TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}
SHOWN = 5

StudentNll = Callable[[Sequence[Trajectory]], dict[str, list[float]]]
Complete = Callable[[Sequence[GenerationRequest], Sampling, str], list[Completion]]


@dataclass(frozen=True)
class Difference:
    """One token on which they differ."""

    rollout: str
    position: int  # in y_o, from 0
    token_id: int
    server: float  # log-probability, in nats
    trainer: float

    @property
    def size(self) -> float:
        return abs(self.server - self.trainer)


class Disagreement(RuntimeError):
    """The servers do not serve the student that is trained."""


def check_student_servers(
    config: Config,
    prompts: Sequence[Prompt],
    complete: Complete,
    student_nll: StudentNll,
    tokenizer: Any,
) -> None:
    """Compare the log-probabilities of short answers to prompts. Collective.

    Raises:
        Disagreement: the servers' are not the trainer's.
    """
    seed, rollout = config.run.seed, config.generation.rollout
    sampling = rollout.model_copy(update={"max_tokens": min(64, rollout.max_tokens), "stop": []})
    completions = complete(
        [GenerationRequest(p.token_ids, request_seed(seed, "check", p.index)) for p in prompts],
        sampling,
        "log-probability check",
    )
    answers = zip(prompts, completions, strict=True)
    rollouts = [Rollout(prompt, 0, answer, "", None) for prompt, answer in answers]
    measured = differences(rollouts, student_nll)
    check(measured, config.precision.dtype, tokenizer)
    log.info("servers and trainer agree: %s", metrics(measured))


def differences(rollouts: Sequence[Rollout], student_nll: StudentNll) -> list[Difference]:
    """Differences on every token of the rollouts that carry log-probabilities, largest first.

    Collective.
    """
    measured = [rollout for rollout in rollouts if rollout.completion.logprobs]
    trajectories = [rollout_trajectory(r, r.prompt.token_ids) for r in measured]
    nll = student_nll(trajectories) if trajectories else {}
    unsorted = [
        Difference(trajectory.name, position, token_id, server, -own)
        for rollout, trajectory in zip(measured, trajectories, strict=True)
        for position, (token_id, server, own) in enumerate(
            zip(
                trajectory.labels,
                rollout.completion.logprobs or (),
                nll[trajectory.name],
                strict=True,
            )
        )
    ]
    return sorted(unsorted, key=lambda difference: difference.size, reverse=True)


def metrics(compared: Sequence[Difference]) -> dict[str, float]:
    """Metrics of a step: mean and largest difference, in nats."""
    if not compared:
        return {}
    return {
        "logprob_difference": sum(difference.size for difference in compared) / len(compared),
        "logprob_difference_max": compared[0].size,
    }


def check(compared: Sequence[Difference], dtype: str, tokenizer: Any) -> None:
    """Refuse servers that say something else than the trainer.

    Raises:
        Disagreement: the mean difference exceeds the tolerance of `dtype`; with the tokens.
    """
    mean, limit = metrics(compared).get("logprob_difference", 0.0), TOLERANCE[dtype]
    if mean <= limit:
        return
    lines = [
        f"  {d.rollout}, token {d.position} {tokenizer.decode([d.token_id])!r}: "
        f"server {d.server:.5f}, trainer {d.trainer:.5f}"
        for d in compared[:SHOWN]
    ]
    raise Disagreement(
        f"log-probabilities of the student's servers and of the trainer differ by {mean:.5f} nats "
        f"on average over {len(compared)} tokens; precision.dtype={dtype} explains {limit:g}. "
        "The largest:\n"
        + "\n".join(lines)
        + "\nFix: serve the model of model.student.path in the same precision "
        "(generation.vllm.server.dtype), without quantization."
    )
