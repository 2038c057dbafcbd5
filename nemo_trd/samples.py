"""A page of samples that a person can read: what was asked, tried, rewritten, and learnt from."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nemo_trd.types import Refinement, Rollout, Trajectory

_SHOWN_TOKENS = 5  # with the largest divergence
_VERDICTS = {True: "right", False: "wrong", None: "no verdict"}


@dataclass(frozen=True)
class Sample:
    """What became of one rollout in one step."""

    rollout: Rollout
    refinement: Refinement | None  # None without refinement: `algorithm.trajectory: rollout`
    trajectory: Trajectory | None  # None when nothing was trained on
    divergence: Sequence[float] | None  # per label of the trajectory, in nats


def samples_page(step: int, samples: Sequence[Sample], decode_token: Callable[[int], str]) -> str:
    """Markdown of the samples of one step."""
    parts = [f"# Samples of step {step}"]
    parts += [_section(sample, decode_token) for sample in samples]
    return "\n\n".join(parts) + "\n"


def _section(sample: Sample, decode_token: Callable[[int], str]) -> str:
    rollout, prompt = sample.rollout, sample.rollout.prompt
    parts = [f"## Prompt {prompt.index}, sample {rollout.sample_index}: {_outcome(sample)}"]
    parts.append(f"**Problem**\n\n{fenced(prompt.problem)}")
    if prompt.answer is not None:
        parts.append(f"**Reference answer**\n\n{fenced(prompt.answer)}")
    completion = rollout.completion
    facts = (
        f"{_VERDICTS[rollout.correct]}, {len(completion.token_ids)} tokens, ended by "
        f"{completion.finish_reason}, weight version {completion.weight_version}"
    )
    parts.append(f"**Rollout** ({facts})\n\n{fenced(rollout.text)}")
    if sample.refinement is not None:
        parts.append(_refinement(sample.refinement))
    if sample.trajectory is not None and sample.divergence:
        parts.append(_divergence(sample.trajectory, sample.divergence, decode_token))
    return "\n\n".join(parts)


def _outcome(sample: Sample) -> str:
    words = f"rollout {_VERDICTS[sample.rollout.correct]}"
    if sample.refinement is not None:
        rejection = sample.refinement.rejection
        words += f", refinement {rejection or _VERDICTS[sample.refinement.correct]}"
    source = sample.trajectory.source if sample.trajectory else "nothing"
    return f"{words}, trained on {source}"


def _refinement(refinement: Refinement) -> str:
    facts = []
    if refinement.rejection is not None:
        facts.append(f"rejected: {refinement.rejection}")
    if refinement.completion is not None:
        completion = refinement.completion
        facts.append(_VERDICTS[refinement.correct])
        facts.append(f"{len(completion.token_ids)} tokens, ended by {completion.finish_reason}")
    if refinement.request.shortened:
        facts.append(f"the teacher saw a shortened {' and '.join(refinement.request.shortened)}")
    text = f"**Refinement** ({', '.join(facts)})"
    return text if refinement.completion is None else f"{text}\n\n{fenced(refinement.text)}"


def _divergence(
    trajectory: Trajectory, divergence: Sequence[float], decode_token: Callable[[int], str]
) -> str:
    assert len(divergence) == len(trajectory.labels), trajectory.name
    largest = sorted(range(len(divergence)), key=lambda i: divergence[i], reverse=True)
    mean = sum(divergence) / len(divergence)
    lines = [
        f"**Divergence** over {len(divergence)} label tokens: mean {mean:.4f}, "
        f"max {divergence[largest[0]]:.4f} (nats)",
        "",
        "| position | token | divergence |",
        "|---:|---|---:|",
    ]
    for i in largest[:_SHOWN_TOKENS]:
        token = _cell(decode_token(trajectory.labels[i]))
        lines.append(f"| {i + 1} | {token} | {divergence[i]:.4f} |")
    return "\n".join(lines)


def fenced(text: str) -> str:
    """A code block that no text can end early."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _cell(token: str) -> str:
    """One token in a table cell, white space visible."""
    visible = repr(token)[1:-1].replace("|", "\\|").replace("`", "'")
    return f"`{visible}`"
