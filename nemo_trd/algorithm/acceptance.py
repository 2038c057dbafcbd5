"""Decides which rewrites can be trained on, and counts the outcomes of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

from nemo_trd.algorithm.trajectories import refinement_trajectory, rollout_trajectory
from nemo_trd.config.schema import Config
from nemo_trd.data.chat import text_to_judge
from nemo_trd.data.types import (
    Completion,
    Prompt,
    Refinement,
    RefinementPrompt,
    Rejection,
    Rollout,
    Trajectory,
)
from nemo_trd.verifiers.select import Verifier, judge_all


def read_rollout(
    prompt: Prompt, sample_index: int, completion: Completion, tokenizer: Any, verify: Verifier
) -> Rollout:
    """Rollout y_o of a completion, with its text and the verifier's verdict."""
    text = completion.text(tokenizer)
    judged_text = text_to_judge(text, prompt.token_ids, completion, tokenizer)
    return Rollout(prompt, sample_index, completion, text, _verdict(judged_text, prompt, verify))


def read_refinements(
    prompts: Sequence[RefinementPrompt],
    completions: Sequence[Completion],
    config: Config,
    tokenizer: Any,
    verify: Verifier,
) -> list[Refinement]:
    """Read the rewrite of each prompt; see `read_refinement`.

    Args:
        completions: one for each prompt that has token ids, in their order.
    """
    num_requests = sum(prompt.token_ids is not None for prompt in prompts)
    assert num_requests == len(completions), (num_requests, len(completions))
    remaining = iter(completions)
    pairs = [(p, None if p.token_ids is None else next(remaining)) for p in prompts]
    return judge_all(lambda pair: read_refinement(*pair, tokenizer, verify), pairs)


def read_refinement(
    request: RefinementPrompt, completion: Completion | None, tokenizer: Any, verify: Verifier
) -> Refinement:
    """Decide whether a rewrite can be trained on: it ended by itself and is not empty.

    Being right is no condition: the verdict is recorded. `refinement.on_failure` decides what
    happens to a rejected one, in `trajectories.pair`.

    Args:
        completion: None exactly when no rewrite was asked for.
    """
    if completion is None or request.token_ids is None:
        return Refinement(request, None, "", None, request.rejection)
    text = completion.text(tokenizer)
    rejection: Rejection | None = None
    if completion.finish_reason == "abort":
        rejection = "aborted"
    elif completion.finish_reason == "length":
        rejection = "truncated"
    elif not completion.token_ids or not text.strip():
        rejection = "empty"
    judged_text = text_to_judge(text, request.token_ids, completion, tokenizer)
    verdict = _verdict(judged_text, request.rollout.prompt, verify) if rejection is None else None
    return Refinement(request, completion, text, verdict, rejection)


def _verdict(text: str, prompt: Prompt, verify: Verifier) -> bool | None:
    return None if prompt.answer is None else verify(text, prompt.answer)


def refinement_counts(
    refinements: Sequence[Refinement], trajectories: Sequence[Trajectory]
) -> dict[str, int]:
    """Counts of the outcomes of a step's rollouts; every key is always there, so ranks can add.

    `rollouts` = `accepted` + all `rejected_*`; `accepted` = the four `*_to_*` + `undecided`.
    `shortened_*` count rollouts for which the teacher saw a shortened text, where it rewrote them
    or where it scored their trajectory.
    """
    scored = {(t.prompt_index, t.sample_index): t.shortened for t in trajectories}
    changes = [f"{a}_to_{b}" for a in ("wrong", "right") for b in ("wrong", "right")]
    counts = dict.fromkeys(
        [
            *("rollouts", "accepted", *(f"rejected_{reason}" for reason in get_args(Rejection))),
            *(*changes, "undecided", "shortened_rollout", "shortened_reference_solution"),
        ],
        0,
    )
    names = {True: "right", False: "wrong"}
    for refinement in refinements:
        counts["rollouts"] += 1
        rollout = refinement.request.rollout
        scored_texts = scored.get((rollout.prompt.index, rollout.sample_index), ())
        for name in {*refinement.request.shortened, *scored_texts}:
            counts[f"shortened_{name}"] += 1
        if refinement.rejection is not None:
            counts[f"rejected_{refinement.rejection}"] += 1
            continue
        counts["accepted"] += 1
        before, after = rollout.correct, refinement.correct
        if before is None or after is None:
            counts["undecided"] += 1
        else:
            counts[f"{names[before]}_to_{names[after]}"] += 1
    return counts


def reject_outside_support(
    refinements: Sequence[Refinement],
    student_nll: Callable[[Sequence[Trajectory]], dict[str, list[float]]],
    largest_gap: float,
) -> list[Refinement]:
    """Reject rewrites that are far less likely under the student than its own rollout ("nll_gap").

    The gap is mean NLL per token of y_r minus that of y_o, in nats, both given x
    (`refinement.max_student_nll_gap`).

    Args:
        student_nll: NLLs of the labels of trajectories, in nats, by `Trajectory.name`.
        largest_gap: in nats.
    """
    pairs = {
        position: (
            refinement_trajectory(refinement, refinement.request.rollout.prompt.token_ids),
            rollout_trajectory(
                refinement.request.rollout, refinement.request.rollout.prompt.token_ids
            ),
        )
        for position, refinement in enumerate(refinements)
        if refinement.rejection is None and refinement.request.rollout.completion.token_ids
    }
    by_token = student_nll([trajectory for pair in pairs.values() for trajectory in pair])
    nll = {name: sum(values) / len(values) for name, values in by_token.items()}
    results = list(refinements)
    for position, (rewrite, rollout) in pairs.items():
        if nll[rewrite.name] - nll[rollout.name] > largest_gap:
            results[position] = replace(results[position], rejection="nll_gap")
    return results
