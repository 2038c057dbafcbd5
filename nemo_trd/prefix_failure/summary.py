"""From figures of single labels to means with intervals: pure functions of arrays.

A mean is a ratio of sums, over tokens. Its interval is the percentile bootstrap over problems:
problems are drawn with replacement, with all tokens of all their rollouts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, get_args

import numpy as np

from nemo_trd.algorithm.bootstrap import resampled
from nemo_trd.prefix_failure.answers import Answer
from nemo_trd.prefix_failure.positions import FIGURES
from nemo_trd.records.prefix_failure import (
    DIVERGENCES,
    Alignment,
    Curve,
    Estimate,
    Group,
    Part,
    PartFigures,
)

RELATIVE_BINS = 20
EXACT = 32  # from this distance on, positions share a point, twice as many with each doubling
RATIOS = tuple(f"{name}_gradient_ratio" for name in DIVERGENCES)
CURVES = (
    *("teacher_entropy", "student_entropy", "top2_gap", *DIVERGENCES, *RATIOS),
    *("go_on", "turn_back", "other", "split_entropy"),
)
_COLUMN = {name: column for column, name in enumerate(FIGURES)}


class Measured(NamedTuple):
    """An answer, and its figures [labels, len(FIGURES)], not a number where undefined."""

    answer: Answer
    figures: np.ndarray


class Bootstrap:
    """Resamples of `problems` (dataset indices, one for each trajectory)."""

    def __init__(
        self, problems: Sequence[int], resamples: int, confidence: float, seed: int
    ) -> None:
        self.row = {problem: row for row, problem in enumerate(sorted(set(problems)))}
        self.counts = np.concatenate([*resampled(len(self.row), resamples, seed)])
        self.tail = (1 - confidence) / 2

    def ratios(self, above: np.ndarray, below: np.ndarray) -> list[Estimate]:
        """Ratios of sums over problems of [problems, figures]; no sum of `below` is zero."""
        mean = above.sum(0) / below.sum(0)
        drawn_above, drawn_below = self.counts @ above, self.counts @ below
        # A resample can lack all problems that have a figure: it says nothing about it.
        some = drawn_below > 0
        drawn = np.where(some, drawn_above / np.where(some, drawn_below, 1), np.nan)
        low, high = np.nanquantile(drawn, [self.tail, 1 - self.tail], axis=0)
        bounded = (below > 0).sum(0) > 1
        return [
            Estimate(mean=m, low=a if bound else None, high=b if bound else None)
            for m, a, b, bound in zip(
                mean.tolist(), low.tolist(), high.tolist(), bounded.tolist(), strict=True
            )
        ]


def groups(
    measured: Sequence[Measured], resamples: int, confidence: float, seed: int
) -> list[Group]:
    """Figures of whole trajectories, and of what lies before, at and after the place of error."""
    results = []
    for key, members in _by_kind(measured):
        parts: dict[Part, PartFigures] = {}
        for part in get_args(Part):
            concerned = [m for m in members if part == "whole" or m.answer.error is not None]
            chosen = [(m, _within(m.answer, part)) for m in concerned]
            if any(mask.any() for _, mask in chosen):
                parts[part] = _part(chosen, resamples, confidence, seed)
        source, context, verdict = key
        results.append(Group(source=source, teacher_context=context, verdict=verdict, parts=parts))
    return results


def _by_kind(measured: Sequence[Measured]) -> Iterator[tuple[tuple, list[Measured]]]:
    kinds: dict[tuple, list[Measured]] = {}
    for one in measured:
        answer = one.answer
        key = (answer.trajectory.source, answer.teacher_context, answer.verdict)
        kinds.setdefault(key, []).append(one)
    yield from sorted(kinds.items(), key=lambda kind: kind[0], reverse=True)


def _within(answer: Answer, part: Part) -> np.ndarray:
    """Which labels belong to a part."""
    place = np.arange(len(answer.trajectory.labels))
    if part == "whole":
        return np.ones(len(place), dtype=bool)
    assert answer.error is not None
    masks = {"before": place < answer.error, "at": place == answer.error}
    return masks.get(part, place > answer.error)


def _part(
    chosen: Sequence[tuple[Measured, np.ndarray]], resamples: int, confidence: float, seed: int
) -> PartFigures:
    bootstrap = Bootstrap(
        [m.answer.trajectory.prompt_index for m, _ in chosen], resamples, confidence, seed
    )
    gradients = [_COLUMN[f"{n}{kind}_gradient"] for kind in ("", "_hidden") for n in DIVERGENCES]
    shape = (len(bootstrap.row), len(FIGURES))
    sums, counts, whole = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    tokens = np.zeros((len(bootstrap.row), 2))
    for (answer, figures), mask in chosen:
        row = bootstrap.row[answer.trajectory.prompt_index]
        defined = np.isfinite(figures[mask])
        sums[row] += np.where(defined, figures[mask], 0).sum(0)
        counts[row] += defined.sum(0)
        whole[row] += np.nansum(figures, 0)
        tokens[row] += mask.sum(), len(mask)
    known = [i for i in range(len(FIGURES)) if counts[:, i].any()]
    moving = [i for i in gradients if whole[:, i].any()]
    means = bootstrap.ratios(sums[:, known], counts[:, known])
    shares = dict(zip(moving, bootstrap.ratios(sums[:, moving], whole[:, moving]), strict=True))
    total = int(tokens[:, 0].sum())
    return PartFigures(
        trajectories=sum(bool(mask.any()) for _, mask in chosen),
        tokens=total,
        token_share=bootstrap.ratios(tokens[:, :1], tokens[:, 1:])[0],
        gradient_share={
            n: shares[i] for n in DIVERGENCES if (i := _COLUMN[f"{n}_gradient"]) in shares
        },
        hidden_gradient_share={
            n: shares[i] for n in DIVERGENCES if (i := _COLUMN[f"{n}_hidden_gradient"]) in shares
        },
        means={FIGURES[i]: mean for i, mean in zip(known, means, strict=True)},
        counts={FIGURES[i]: int(n) for i in known if (n := counts[:, i].sum()) < total},
    )


def curves(
    measured: Sequence[Measured], resamples: int, confidence: float, seed: int
) -> list[Curve]:
    """`CURVES` against positions, aligned in every way that a group has."""
    results: list[Curve] = []
    for key, members in _by_kind(measured):
        for alignment in get_args(Alignment):
            placed = [
                (m, positions)
                for m in members
                if (positions := aligned(m.answer, alignment)) is not None
            ]
            if placed:
                results += _curves(key, alignment, placed, resamples, confidence, seed)
    return results


def aligned(answer: Answer, alignment: Alignment) -> np.ndarray | None:
    """[labels] where each label lies; None where the answer has no place to be aligned by."""
    place = np.arange(len(answer.trajectory.labels))
    if alignment == "relative":
        return ((place * RELATIVE_BINS) // len(place) + 0.5) / RELATIVE_BINS
    if alignment == "absolute":
        return coarse(place)
    return None if answer.error is None else coarse(place - answer.error)


def coarse(distance: np.ndarray) -> np.ndarray:
    """Distances below `EXACT` as they are, others rounded towards 0 to steps of 1/16 and less."""
    size = np.maximum(np.abs(distance), 1)
    step = 2 ** np.maximum(np.floor(np.log2(size)) - np.log2(EXACT) + 1, 0)
    return np.sign(distance) * (np.abs(distance) // step) * step


def _curves(
    key: tuple,
    alignment: Alignment,
    placed: Sequence[tuple[Measured, np.ndarray]],
    resamples: int,
    confidence: float,
    seed: int,
) -> Iterator[Curve]:
    bootstrap = Bootstrap(
        [m.answer.trajectory.prompt_index for m, _ in placed], resamples, confidence, seed
    )
    points = np.unique(np.concatenate([positions for _, positions in placed]))
    shape = (len(bootstrap.row), len(points), len(CURVES))
    sums, counts, bearers = np.zeros(shape), np.zeros(shape), np.zeros(shape[1:])
    for (answer, figures), positions in placed:
        row, values = bootstrap.row[answer.trajectory.prompt_index], _plotted(figures)
        defined, point = np.isfinite(values), np.searchsorted(points, positions)
        np.add.at(sums[row], point, np.where(defined, values, 0))
        own = np.zeros(shape[1:])
        np.add.at(own, point, defined)
        counts[row] += own
        bearers += own > 0
    source, context, verdict = key
    for column, name in enumerate(CURVES):
        known = bearers[:, column] > 0
        if not known.any():
            continue
        means = bootstrap.ratios(sums[:, known, column], counts[:, known, column])
        yield Curve(
            source=source,
            teacher_context=context,
            verdict=verdict,
            alignment=alignment,
            figure=name,
            position=points[known].tolist(),
            trajectories=bearers[known, column].astype(int).tolist(),
            mean=[m.mean for m in means],
            low=[m.low for m in means],
            high=[m.high for m in means],
        )


def _plotted(figures: np.ndarray) -> np.ndarray:
    """[labels, len(CURVES)]; a gradient's ratio is to the mean of its trajectory."""
    columns = []
    for name in CURVES:
        column = figures[:, _COLUMN[name.removesuffix("_ratio")]]
        if name in RATIOS:
            column = column / (column.mean() or np.nan)
        columns.append(column)
    return np.stack(columns, -1)
