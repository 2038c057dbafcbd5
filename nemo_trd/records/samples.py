"""Samples of a step: problem, rollout, refinement, and what was learnt from.

`samples_page` is Markdown for people, `sample_record` a line of JSON for `nemo_trd.report`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nemo_trd.data.types import Completion, LabelValues, Refinement, Rollout, Trajectory

Decode = Callable[[Sequence[int]], str]

_SHOWN_TOKENS = 5  # with the largest divergence
VERDICTS = {True: "right", False: "wrong", None: "no verdict"}


@dataclass(frozen=True)
class Sample:
    """One rollout, and its way through one step."""

    rollout: Rollout
    refinement: Refinement | None  # None without refinement: `algorithm.trajectory: rollout`
    trajectory: Trajectory | None  # None when nothing was trained on
    values: LabelValues | None  # at the trajectory's labels


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
        parts.append(f"**Reference answer**\n\n{fenced(str(prompt.answer))}")
    completion = rollout.completion
    facts = (
        f"{VERDICTS[rollout.correct]}, {len(completion.token_ids)} tokens, ended by "
        f"{completion.finish_reason}, weight version {completion.weight_version}"
    )
    if shortened := _shown_shortened(sample, "rollout"):
        facts += f", the teacher saw a shortened {' and '.join(shortened)}"
    parts.append(f"**Rollout** ({facts})\n\n{fenced(rollout.text)}")
    if sample.refinement is not None:
        parts.append(_refinement(sample.refinement, _shown_shortened(sample, "refinement")))
    if sample.trajectory is not None and sample.values is not None:
        parts.append(_divergence(sample.trajectory, sample.values.divergence, decode_token))
    return "\n\n".join(parts)


def _outcome(sample: Sample) -> str:
    words = f"rollout {VERDICTS[sample.rollout.correct]}"
    if sample.refinement is not None:
        rejection = sample.refinement.rejection
        words += f", refinement {rejection or VERDICTS[sample.refinement.correct]}"
    source = sample.trajectory.source if sample.trajectory else "nothing"
    return f"{words}, trained on {source}"


def _shown_shortened(sample: Sample, source: str) -> tuple[str, ...]:
    """Parts cut where the teacher rewrote a rollout, or judged the trajectory of `source`."""
    trajectory, refinement = sample.trajectory, sample.refinement
    shown = set(trajectory.shortened) if trajectory and trajectory.source == source else set()
    if source == "refinement" and refinement is not None:
        shown |= set(refinement.request.shortened)
    return tuple(sorted(shown, reverse=True))


def _refinement(refinement: Refinement, shortened: tuple[str, ...]) -> str:
    facts = []
    if refinement.rejection is not None:
        facts.append(f"rejected: {refinement.rejection}")
    if refinement.completion is not None:
        completion = refinement.completion
        facts.append(VERDICTS[refinement.correct])
        facts.append(f"{len(completion.token_ids)} tokens, ended by {completion.finish_reason}")
    if shortened:
        facts.append(f"the teacher saw a shortened {' and '.join(shortened)}")
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


def sample_record(step: int, sample: Sample, decode: Decode) -> dict[str, Any]:
    """One sample as JSON: token ids, their texts, verdicts, and what the loss knows of each label.

    `labels` belongs to the tokens of `trained_on`, which is the rollout, the refinement or null.
    """
    rollout, refinement, trajectory = sample.rollout, sample.refinement, sample.trajectory
    return {
        "step": step,
        "prompt_index": rollout.prompt.index,
        "sample_index": rollout.sample_index,
        "problem": rollout.prompt.problem,
        "answer": None if rollout.prompt.answer is None else str(rollout.prompt.answer),
        "rollout": {
            "correct": rollout.correct,
            "text": rollout.text,
            "shortened": _shown_shortened(sample, "rollout"),
            **_completion(rollout.completion, decode),
        },
        "refinement": None
        if refinement is None
        else {
            "correct": refinement.correct,
            "rejection": refinement.rejection,
            "shortened": _shown_shortened(sample, "refinement"),
            "text": refinement.text,
            **(_completion(refinement.completion, decode) if refinement.completion else {}),
        },
        "trained_on": None if trajectory is None else trajectory.source,
        "labels": None if sample.values is None else _rounded(asdict(sample.values)),
    }


def _completion(completion: Completion, decode: Decode) -> dict[str, Any]:
    return {
        "token_ids": completion.token_ids,
        "tokens": token_texts(completion.token_ids, decode),
        "finish_reason": completion.finish_reason,
        "weight_version": completion.weight_version,
        **({"versions": completion.versions} if completion.versions else {}),
        **(_rounded({"logprobs": completion.logprobs}) if completion.logprobs else {}),
    }


def _rounded(values: dict[str, Sequence[float]]) -> dict[str, list[float]]:
    return {name: [round(value, 6) for value in row] for name, row in values.items()}


def token_texts(token_ids: Sequence[int], decode: Decode) -> list[str]:
    """The text that each token adds to those before it; joined, they are the whole text.

    A token alone can decode to less: spaces go missing, and a character can take several tokens,
    of which the last one gets it. So each is decoded behind the token before it.
    """
    texts: list[str] = []
    start = known = 0  # [start, known) is context, [known, end) has no text yet
    for end in range(1, len(token_ids) + 1):
        before, whole = decode(token_ids[start:known]), decode(token_ids[start:end])
        if whole.endswith("\ufffd") and end < len(token_ids):
            texts.append("")
            continue
        texts.append(whole[len(before) :])
        start, known = known, end
    return texts
