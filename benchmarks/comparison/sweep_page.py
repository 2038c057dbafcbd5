"""Tables, points and the plot of a sweep: what rewriting is worth, what each method reaches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from comparison.advantage import (
    MOMENTS,
    PAIRS,
    Contrast,
    Moment,
    Pair,
    advantage,
    advantages_table,
    chosen_table,
    further_table,
    level,
    levels_table,
    models_table,
    named_tests,
    tuning_table,
)
from comparison.figures import save, tests_table
from comparison.results import Interval, Point, as_csv, interval
from comparison.sweep import METHODS, Results
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def tables(results: Results, named: Contrast) -> str:
    """All tables in Markdown, a blank line between two of them."""
    found = [models_table(results)] if results.models else []  # there are none where it was quick
    found += [levels_table(results, moment) for moment in MOMENTS]
    found += [advantages_table(results, tuple(MOMENTS)), chosen_table(results)]
    if results.models:
        found += [tests_table(named_tests(results, named)), further_table(results, named)]
        found += [tuning_table(results)]
    return "\n\n".join(found) + "\n"


def points(results: Results) -> str:
    """The evaluations as CSV, the value of the sweep first."""
    values = [{results.quantity: value} for value, *_ in results.points]
    return as_csv([Point(*rest) for _, *rest in results.points], values)


def plot(
    results: Results,
    path: Path,
    *,
    title: str,
    quantity: str,
    moments: Sequence[tuple[Moment, str]],
    scale: str = "linear",
    last: Callable[[Results, Axes], None] | None = None,
) -> None:
    """Panels side by side: the advantage at each moment, what the methods reach, and one more.

    Args:
        title: the question, in words.
        quantity: label of the axis of values.
        moments: which, and how the panel says it.
        last: draws the last panel.
    """
    count = len(moments) + 1 + (last is not None)
    figure = Figure(figsize=(4.6 * count, 4.8), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, count, squeeze=False)[0]
    for panel, (moment, words) in zip(panels, moments, strict=False):
        _advantages(results, panel, PAIRS, moment)
        panel.set(title=f"TRD − OPD, {words}", ylabel=f"points of avg@{results.k}")
    panel = panels[len(moments)]
    for number, method in enumerate(results.methods):
        found = [[*level(results, v, method, moments[0][0]).values()] for v in results.values]
        _line(panel, results.values, [*map(interval, found)], number, METHODS[method]["title"])
    panel.set(title=f"avg@{results.k}, {moments[0][1]}", ylabel="percent")
    for panel in panels[: len(moments) + 1]:
        panel.set_xscale(scale)
        panel.set_xticks(results.values, [f"{value:g}" for value in results.values])
        panel.minorticks_off()
        panel.set_xlabel(quantity)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    if last is not None:
        last(results, panels[-1])
    save(figure, path)


def _advantages(results: Results, panel: Axes, pairs: Sequence[Pair], moment: Moment) -> None:
    panel.axhline(0, color="black", linewidth=0.8)
    for number, pair in enumerate(pairs):
        found = [[*advantage(results, v, pair, moment).values()] for v in results.values]
        _line(panel, results.values, [*map(interval, found)], number, pair.title)


def _line(
    panel: Axes, values: Sequence[float], found: Sequence[Interval], number: int, label: str
) -> None:
    """Means in percent, and their intervals as a shade."""
    low = [100 * (one.mean - (one.half_width or 0)) for one in found]
    high = [100 * (one.mean + (one.half_width or 0)) for one in found]
    means = [100 * one.mean for one in found]
    panel.fill_between(values, low, high, color=f"C{number}", alpha=0.12, linewidth=0)
    panel.plot(values, means, color=f"C{number}", marker="o", markersize=4, label=label)
