"""What rewriting is worth in a sweep: TRD minus on-policy distillation, seed by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np
from comparison.figures import difference, markdown, percent
from comparison.results import Interval, Point, interval
from comparison.sweep import METHODS, REFERENCE, Results
from scipy import stats

Moment = Literal["equal_steps", "equal_tokens", "equal_seconds"]
MOMENTS: Mapping[Moment, str] = {
    "equal_steps": "equal steps",
    "equal_tokens": "equal tokens",
    "equal_seconds": "equal seconds",
}


class Pair(NamedTuple):
    """Two methods; the advantage is that of the first."""

    refines: str
    plain: str
    title: str


class Contrast(NamedTuple):
    """What the tests of a sweep look at.

    name: in words.
    weights: of the advantages, by value.
    measure: what the advantage is correlated with, by its name in `Results.models`.
    """

    name: str
    weights: Mapping[float, float]
    measure: str


FORWARD_KL = Pair("trd", "opd_forward_kl", "forward KL")
JSD = Pair("trd_jsd", "opd_jsd", "JSD")
REVERSE_KL = Pair("trd", "opd_reverse_kl", "TRD forward KL − OPD reverse KL")
PAIRS = (FORWARD_KL, JSD, REVERSE_KL)


def level(results: Results, value: float, method: str, moment: Moment) -> dict[int, float]:
    """avg@k of a method by seed.

    equal_steps: after as many steps as a method that rewrites has. equal_tokens: at the end.
    equal_seconds: when TRD with forward KL ends, between two evaluations by interpolation, and at
    the end of a run that has ended before; a step takes as long as in the fastest of the seeds,
    since a run may have been disturbed.
    """
    curves = {seed: results.curve(value, method, seed) for seed in results.seeds}
    if moment == "equal_tokens":
        return {seed: curve[-1].avg for seed, curve in curves.items()}
    step = float(results.budget)
    if moment == "equal_seconds":
        longest = results.budget * seconds_per_step(results, value, REFERENCE)
        step = longest / seconds_per_step(results, value, method)
    return {seed: _at(curve, step) for seed, curve in curves.items()}


def seconds_per_step(results: Results, value: float, method: str) -> float:
    ends = [results.curve(value, method, seed)[-1] for seed in results.seeds]
    return min(end.seconds / end.step for end in ends)


def _at(curve: Sequence[Point], step: float) -> float:
    return float(np.interp(step, [p.step for p in curve], [p.avg for p in curve]))


def advantage(results: Results, value: float, pair: Pair, moment: Moment) -> dict[int, float]:
    """avg@k of the method that refines minus that of the other, by seed."""
    plain = level(results, value, pair.plain, moment)
    refines = level(results, value, pair.refines, moment)
    return {seed: refines[seed] - plain[seed] for seed in results.seeds}


def contrast(
    results: Results,
    weights: Mapping[float, float],
    pair: Pair,
    moment: Moment = "equal_steps",
) -> list[float]:
    """A weighted sum of the advantages over the values, by seed."""
    of_values = {v: advantage(results, v, pair, moment) for v in weights}
    return [sum(w * of_values[v][seed] for v, w in weights.items()) for seed in results.seeds]


def rank_correlations(results: Results, pair: Pair, measure: str) -> list[float]:
    """By seed: Spearman's, over the values, of the advantage with what was measured in the models.

    A seed is left out where fewer than three of its values have the measure, or all are equal.
    """
    found = []
    for seed in results.seeds:
        both = [
            (advantage(results, value, pair, "equal_steps")[seed], measured)
            for value in results.values
            if (measured := results.models[f"{value:g}"][str(seed)][measure]) is not None
        ]
        if len(both) >= 3 and all(len(set(column)) > 1 for column in zip(*both, strict=True)):
            found.append(float(stats.spearmanr(both).statistic))
    return found


def verdict(values: Sequence[float]) -> Interval:
    """The mean over seeds, and the two-sided t-test that it is 0."""
    return interval(values, of_difference=True)


def named_tests(results: Results, named: Contrast) -> dict[str, Interval | None]:
    """The tests of a sweep: a contrast of forward KL, of JSD, of one minus the other; and ranks.

    A correlation that not all seeds have says of how many it is; None: no seed has it.
    """
    forward, jsd = (
        [100 * value for value in contrast(results, named.weights, pair)]
        for pair in (FORWARD_KL, JSD)
    )
    found: dict[str, Interval | None] = {
        f"advantage {named.name}, forward KL, points": verdict(forward),
        "the same, JSD, points": verdict(jsd),
        "the same, forward KL minus JSD, points": verdict(
            [f - j for f, j in zip(forward, jsd, strict=True)]
        ),
    }
    for pair in (FORWARD_KL, JSD):
        correlations = rank_correlations(results, pair, named.measure)
        title = f"rank correlation with the {named.measure.replace('_', ' ')}, {pair.title}"
        if len(correlations) < len(results.seeds):
            title += f" ({len(correlations)} of {len(results.seeds)} seeds)"
        found[title] = verdict(correlations) if correlations else None
    return found


def further_table(results: Results, named: Contrast) -> str:
    """In Markdown, in points: what no test was named for, at equal steps and equal tokens.

    The mean of the advantages at all values, and the contrast.
    """
    moments: tuple[Moment, ...] = ("equal_steps", "equal_tokens")
    same = dict.fromkeys(results.values, 1 / len(results.values))
    lines = [["not named beforehand, points", *(MOMENTS[moment] for moment in moments)]]
    lines.append(["---", *["---:"] * len(moments)])
    for what, weighted in (("in the mean of all", same), (named.name, named.weights)):
        for pair in PAIRS:
            found = [verdict(contrast(results, weighted, pair, moment)) for moment in moments]
            lines.append([f"advantage {what}, {pair.title}", *map(difference, found)])
    return markdown(lines)


def tuning_table(results: Results) -> str:
    """In Markdown: avg@k in percent on the development problems, half way and at the end.

    Of the tuning seed that has all learning rates.
    """
    lines = [["tuning, half way / end", "lr", *(f"{v:g}" for v in results.values)]]
    lines.append(["---", "---:", *["---:"] * len(results.values)])
    for method in results.methods:
        of_values = [results.chosen[f"{v:g}"][method]["tried"] for v in results.values]
        for lr in of_values[0]:
            shown = [
                " / ".join(f"{100 * first:.1f}" for first, *_ in tried[lr].values())
                for tried in of_values
            ]
            lines.append([METHODS[method]["title"], lr, *shown])
    return markdown(lines)


def models_table(results: Results) -> str:
    """In Markdown: means over seeds of what was measured in the models."""
    names = [*next(iter(next(iter(results.models.values())).values()))]
    lines = [["", *(f"{value:g}" for value in results.values)]]
    lines.append(["---", *["---:"] * len(results.values)])
    for name in names:
        cells = []
        for value in results.values:
            known = [one[name] for one in results.models[f"{value:g}"].values()]
            numbers = [number for number in known if number is not None]
            cells.append(f"{fmean(numbers):.3g}" if numbers else "")
        lines.append([name.replace("_", " "), *cells])
    return markdown(lines)


def levels_table(results: Results, moment: Moment) -> str:
    """In Markdown: avg@k in percent, a row for each method."""
    lines = [[f"avg@{results.k}, {MOMENTS[moment]}", *(f"{v:g}" for v in results.values)]]
    lines.append(["---", *["---:"] * len(results.values)])
    starts = [
        interval([results.curve(v, results.methods[0], s)[0].avg for s in results.seeds])
        for v in results.values
    ]
    lines.append(["student at the start", *map(percent, starts)])
    for method in results.methods:
        found = [interval([*level(results, v, method, moment).values()]) for v in results.values]
        lines.append([METHODS[method]["title"], *map(percent, found)])
    return markdown(lines)


def advantages_table(results: Results, moments: Sequence[Moment]) -> str:
    """In Markdown: points of percent with 95 % intervals over seeds, and p that there is none."""
    lines = [["TRD − OPD", "at", *(f"{v:g}" for v in results.values)]]
    lines.append(["---", "---", *["---:"] * len(results.values)])
    for pair in PAIRS:
        for moment in moments:
            found = [
                verdict([*advantage(results, v, pair, moment).values()]) for v in results.values
            ]
            lines.append([pair.title, MOMENTS[moment], *map(difference, found)])
    return markdown(lines)


def chosen_table(results: Results) -> str:
    """In Markdown: the learning rate of each method."""
    lines = [["learning rate", *(f"{v:g}" for v in results.values)]]
    lines.append(["---", *["---:"] * len(results.values)])
    for method in results.methods:
        rates = [results.chosen[f"{v:g}"][method]["lr"] for v in results.values]
        lines.append([METHODS[method]["title"], *(f"{rate:g}" for rate in rates)])
    return markdown(lines)
