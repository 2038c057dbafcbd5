"""The table and the plot of the comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from comparison.results import Interval, Point, interval
from matplotlib.figure import Figure

AXES = {
    "step": "steps",
    "generated_tokens": "generated tokens",
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
        "equal tokens",
    ]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in rows:
        lines.append(
            [
                row["title"],
                f"{row['lr']:g}",
                *(_percent(row[name]) for name in ("equal_steps", "equal_tokens", "passed")),
                f"{row['tokens'] / 1000:.0f}k",
                f"{row['seconds']:.0f}",
                _difference(row["trd_minus_equal_steps"]),
                _difference(row["trd_minus_equal_tokens"]),
            ]
        )
    return _markdown(lines)


def models_table(models: Mapping[int, Mapping[str, float]]) -> str:
    """In Markdown: what the models of each seed can do, and how the teacher takes errors."""
    head = ["seed", *(name.replace("_", " ") for name in next(iter(models.values())))]
    lines = [head, ["---:"] * len(head)]
    lines += [
        [str(seed), *(f"{value:.3g}" for value in figures.values())]
        for seed, figures in models.items()
    ]
    return _markdown(lines)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(found: Interval) -> str:
    width = "" if found.half_width is None else f" ± {100 * found.half_width:.1f}"
    return f"{100 * found.mean:.1f}{width}"


def _difference(found: Interval | None) -> str:
    if found is None:
        return ""
    width = "" if found.half_width is None else f" ± {100 * found.half_width:.1f}"
    sure = "" if found.p is None else f", p {found.p:.2g}"
    return f"{100 * found.mean:+.1f}{width}{sure}"


def _place(axis: str, group: Sequence[Point]) -> float:
    values = [getattr(point, axis) for point in group]
    return min(values) if axis == "seconds" else fmean(values)


def plot(
    points: Sequence[Point], titles: Mapping[str, str], k: int, quantity: str, path: Path
) -> None:
    """avg@k (`quantity` avg) or pass@k (passed) against steps, tokens and time: mean over seeds."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels = figure.subplots(1, len(AXES), sharey=True)
    for (axis, label), panel in zip(AXES.items(), panels, strict=True):
        for number, (method, title) in enumerate(titles.items()):
            steps = sorted({p.step for p in points if p.method == method})
            groups = [[p for p in points if (p.method, p.step) == (method, s)] for s in steps]
            found = [interval([getattr(p, quantity) for p in group]) for group in groups]
            panel.errorbar(
                [_place(axis, group) for group in groups],
                [one.mean for one in found],
                [one.half_width or 0 for one in found],
                label=title,
                color=f"C{number % 10}",
                linestyle=("-", "--", ":")[number // 10],
                marker=("o", "s", "^")[number // 10],
                markersize=3,
                capsize=2,
                linewidth=1.2,
            )
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"{'avg' if quantity == 'avg' else 'pass'}@{k} on test problems")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8
    )
    figure.savefig(path)
