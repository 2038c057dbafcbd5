"""Samples for the page: tokens of y_o and y_r coloured by divergence, marked where they differ.

Source of the figures: samples/step_*.jsonl (`nemo_trd.records.samples.sample_record`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from nemo_trd.algorithm.change import Change, change, kept_tokens
from nemo_trd.records.read import Record
from nemo_trd.records.samples import VERDICTS

LEVELS = (0.05, 0.2, 0.7, 2.0)  # nats at which a darker colour begins
SHOWN_TOKENS = 1500  # of one text; the file has them all
_LARGEST = 5


@dataclass(frozen=True)
class Token:
    text: str
    kept: bool  # stands in the other text, too
    level: int | None  # 0 .. len(LEVELS); None without a divergence
    title: str  # the divergence in words


@dataclass(frozen=True)
class Text:
    """One of the two texts of a sample."""

    verdict: str
    facts: str
    tokens: list[Token]
    left_out: int  # tokens that the page does not show


@dataclass(frozen=True)
class Nll:
    """Means over the tokens of one text, in nats; None where the run did not record them."""

    student: float | None
    teacher: float | None

    @property
    def gap(self) -> float | None:
        known = self.student is not None and self.teacher is not None
        return self.student - self.teacher if known else None  # type: ignore[operator]


@dataclass(frozen=True)
class ShownSample:
    run: int
    file: str
    heading: str
    problem: str
    answer: str | None
    outcome: str
    rollout: Text
    refinement: Text | None
    change: Change | None
    trained_on: str
    nll: dict[str, Nll]  # of "rollout" and "refinement"
    largest: list[tuple[int, str, float]]  # position from 1, token, divergence


def choose(runs: Sequence[Sequence[Record]], count: int) -> list[tuple[int, Record]]:
    """Samples in turn of every run and every outcome, newest first."""
    piles: dict[tuple[int, Any, Any], list[tuple[int, Record]]] = {}
    for run, records in enumerate(runs):
        for record in records:
            refined = (record["refinement"] or {}).get("correct")
            pile = (run, record["rollout"].get("correct"), refined)
            piles.setdefault(pile, []).append((run, record))
    order = sorted(piles, key=lambda pile: (_interest(*pile[1:]), pile[0]))
    rounds = zip_longest(*(piles[pile] for pile in order))
    return [sample for turn in rounds for sample in turn if sample is not None][:count]


def _interest(before: Any, after: Any) -> int:
    ranked = [(False, True), (True, False), (False, False), (True, True)]
    return ranked.index((before, after)) if (before, after) in ranked else len(ranked)


def show(run: int, record: Record) -> ShownSample:
    """A line of samples/step_*.jsonl as the page shows it."""
    parts = {"rollout": record["rollout"]}
    refinement = record["refinement"]
    if refinement is not None and "token_ids" in refinement:
        parts["refinement"] = refinement
    kept: dict[str, list[bool]] = {name: [True] * len(p["token_ids"]) for name, p in parts.items()}
    changed = None
    if len(parts) == 2:
        ids = parts["rollout"]["token_ids"], parts["refinement"]["token_ids"]
        changed = change(*ids)
        kept = dict(zip(("rollout", "refinement"), kept_tokens(*ids), strict=True))
    trained: str = record["trained_on"] or ""
    labels = record["labels"]
    divergence: dict[str, list[float]] = {trained: labels["divergence"]} if labels else {}
    texts = {name: _text(part, kept[name], divergence.get(name)) for name, part in parts.items()}
    return ShownSample(
        run=run,
        file=record["file"],
        heading=f"Step {record['step']}, prompt {record['prompt_index']}, "
        f"sample {record['sample_index']}",
        problem=record["problem"],
        answer=record.get("answer"),
        outcome=_outcome(record),
        rollout=texts["rollout"],
        refinement=texts.get("refinement"),
        change=changed,
        trained_on=trained or "nothing",
        nll={name: _nll(part, labels if name == trained else None) for name, part in parts.items()},
        largest=[
            entry
            for name, values in divergence.items()
            for entry in _largest(parts[name]["tokens"], values)
        ],
    )


def _outcome(record: Record) -> str:
    before, refinement = VERDICTS[record["rollout"].get("correct")], record["refinement"]
    if refinement is None:
        return f"{before}, not rewritten"
    after = refinement.get("rejection") or VERDICTS[refinement.get("correct")]
    return f"{before} → {after}"


def _text(part: Record, kept: Sequence[bool], divergence: Sequence[float] | None) -> Text:
    ended = part.get("finish_reason", "unknown")
    facts = [f"{len(part['token_ids']):,} tokens", f"ended by {ended}"]
    facts.append(f"weight version {part.get('weight_version', 'unknown')}")
    if part.get("rejection"):
        facts.append(f"rejected: {part['rejection']}")
    if part.get("shortened"):
        facts.append(f"the teacher saw a shortened {' and '.join(part['shortened'])}")
    tokens = [
        Token(_visible(text), kept[i], *_coloured(divergence[i] if divergence else None))
        for i, text in enumerate(part["tokens"][:SHOWN_TOKENS])
    ]
    left_out = len(part["token_ids"]) - len(tokens)
    return Text(VERDICTS[part.get("correct")], ", ".join(facts), tokens, left_out)


def _visible(text: str) -> str:
    """White space that a colour could not be seen on gets a sign of its own."""
    return text.replace("\n", "↵\n") if text.isspace() else text


def _coloured(divergence: float | None) -> tuple[int | None, str]:
    if divergence is None:
        return None, ""
    return sum(divergence >= level for level in LEVELS), f"{divergence:.3f} nats"


def _largest(tokens: Sequence[str], divergence: Sequence[float]) -> list[tuple[int, str, float]]:
    order = sorted(range(len(divergence)), key=lambda i: divergence[i], reverse=True)
    return [(i + 1, repr(tokens[i])[1:-1], divergence[i]) for i in order[:_LARGEST]]


def _nll(part: Record, labels: Record | None) -> Nll:
    if labels:
        return Nll(mean(labels["student_nll"]), mean(labels["teacher_nll"]))
    logprobs = part.get("logprobs")  # of the model that sampled it
    sampled = -mean(logprobs) if logprobs else None  # type: ignore[operator]
    return Nll(sampled, None)


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
