"""The table and the plot of the comparison, and what other tables and plots share with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from comparison.results import Interval, Point, holm, interval
from matplotlib.axes import Axes
from matplotlib.figure import Figure

AXES = {
    "step": "steps",
    "generated_tokens": "thousands of generated tokens",
    "seconds": "seconds of wall time",
}


def table(rows: Sequence[Mapping[str, Any]], k: int) -> str:
    """In Markdown, a row for each method."""
    head = [
        "method",
        "lr",
        f"avg@{k}, equal steps",
        f"avg@{k}, equal tokens",
        f"pass@{k}, equal tokens",
        "tokens",
        "seconds",
        "TRD − method, equal steps",
        "adjusted p",
        "equal tokens",
        "adjusted p",
    ]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in rows:
        lines.append(
            [
                row["title"],
                f"{row['lr']:g}",
                *(percent(row[name]) for name in ("equal_steps", "equal_tokens", "passed")),
                f"{row['tokens'] / 1000:.0f}k",
                f"{row['seconds']:.0f}",
                *(
                    cell
                    for moment in ("equal_steps", "equal_tokens")
                    for cell in (
                        difference(row[f"trd_minus_{moment}"]),
                        _p(row.get(f"holm_p_{moment}")),
                    )
                ),
            ]
        )
    return markdown(lines)


def pairs_table(pairs: Mapping[str, Sequence[Interval]]) -> str:
    """In Markdown: one method minus another, at equal steps and at equal tokens."""
    lines = [["difference", "equal steps", "equal tokens"], ["---", "---:", "---:"]]
    lines += [[title, *map(difference, found)] for title, found in pairs.items()]
    return markdown(lines)


def seeds_table(runs: Mapping[str, Sequence[Point]], k: int) -> str:
    """In Markdown: avg@k in percent of each seed, and the mean.

    Args:
        runs: by what is shown, a point for each seed, in the same order.
    """
    seeds = [point.seed for point in next(iter(runs.values()))]
    lines = [[f"avg@{k}", *(f"seed {seed}" for seed in seeds), "mean"]]
    lines.append(["---", *["---:"] * (len(seeds) + 1)])
    for title, points in runs.items():
        values = [point.avg for point in points]
        lines.append([title, *(f"{100 * value:.1f}" for value in [*values, fmean(values)])])
    return markdown(lines)


def models_table(models: Mapping[str, Mapping[str, float | None]]) -> str:
    """In Markdown: what the models of each seed can do, and how the teacher takes errors."""
    lines = [["", *(f"seed {seed}" for seed in models)], ["---", *["---:"] * len(models)]]
    for name in next(iter(models.values())):
        values = [figures[name] for figures in models.values()]
        shown = ("" if value is None else f"{value:.3g}" for value in values)
        lines.append([name.replace("_", " "), *shown])
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(found: Interval) -> str:
    width = "" if found.half_width is None else f" ± {100 * found.half_width:.1f}"
    return f"{100 * found.mean:.1f}{width}"


def difference(found: Interval | None) -> str:
    if found is None:
        return ""
    width = "" if found.half_width is None else f" ± {100 * found.half_width:.1f}"
    sure = "" if found.p is None else f", p {found.p:.2g}"
    return f"{100 * found.mean:+.1f}{width}{sure}"


def tests_table(tests: Mapping[str, Interval | None]) -> str:
    """In Markdown: the tests that were named beforehand, p also adjusted for their number.

    Args:
        tests: by name; None where there is nothing to test, which counts in the number.
    """
    lines = [["test", "mean over seeds", "p", "adjusted p"], ["---", "---:", "---:", "---:"]]
    found = {name: one.p for name, one in tests.items() if one is not None}
    p_values = {name: p for name, p in found.items() if p is not None}
    others = [1.0] * (len(tests) - len(p_values))
    adjusted = dict(zip(p_values, holm([*p_values.values(), *others]), strict=False))
    for name, one in tests.items():
        mean = "" if one is None else f"{one.mean:+.2f}"
        if one is not None and one.half_width is not None:
            mean += f" ± {one.half_width:.2f}"
        lines.append([name, mean, _p(p_values.get(name)), _p(adjusted.get(name))])
    return markdown(lines)


def _p(p: float | None) -> str:
    return "" if p is None else f"{p:.2g}"


def _place(axis: str, group: Sequence[Point]) -> float:
    if axis == "seconds":
        return min(point.seconds for point in group)
    return group[0].step if axis == "step" else fmean(p.generated_tokens for p in group) / 1000


def plot(
    points: Sequence[Point],
    groups: Sequence[Mapping[str, str]],
    k: int,
    quantity: str,
    path: Path,
) -> None:
    """avg@k (`quantity` avg) or pass@k (passed) against steps, tokens and time: mean over seeds.

    Args:
        groups: title by method, a row of panels for each.
    """
    figure = Figure(figsize=(13, 5 * len(groups)), layout="constrained")
    for group, row in zip(groups, figure.subfigures(len(groups), squeeze=False)[:, 0], strict=True):
        panels = row.subplots(1, len(AXES), sharey=True)
        for (axis, label), panel in zip(AXES.items(), panels, strict=True):
            for number, (method, title) in enumerate(group.items()):
                its_points = [p for p in points if p.method == method]
                _curve(panel, its_points, axis, quantity, f"C{number}", title)
            panel.set(xlabel=label, ylim=(0, 1.02))
            panel.grid(alpha=0.3)
        panels[0].set_ylabel(f"{'avg' if quantity == 'avg' else 'pass'}@{k} on test problems")
        lines = panels[0].lines
        row.legend(handles=lines, loc="outside lower center", ncols=5, fontsize=9)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """SVG with text as text; the same figure gives the same file."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nemo_trd"}):
        figure.savefig(path, metadata={"Date": None})


def _curve(
    panel: Axes, points: Sequence[Point], axis: str, quantity: str, color: str, title: str
) -> None:
    """A line, and its interval as a shade."""
    groups = [[p for p in points if p.step == step] for step in sorted({p.step for p in points})]
    places = [_place(axis, group) for group in groups]
    found = [interval([getattr(point, quantity) for point in group]) for group in groups]
    low = [one.mean - (one.half_width or 0) for one in found]
    high = [one.mean + (one.half_width or 0) for one in found]
    panel.fill_between(places, low, high, color=color, alpha=0.12, linewidth=0)
    means = [one.mean for one in found]
    panel.plot(places, means, color=color, label=title, marker="o", markersize=3, linewidth=1.5)
