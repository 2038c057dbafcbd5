"""Figures as inline SVG. Colours are the page's CSS variables, so that dark mode changes them."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

RUN_COLORS = 8  # --run-0 ... in page.css
PHASE_COLORS = 10
_MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "<": "◀", ">": "▶", "p": "⬟"}
_MARKED = 12  # points of a curve, so that curves are told apart without their colours
_MAX_BARS = 60
_LINEAR = 64  # tokens from which on an axis of positions is logarithmic
# matplotlib wants colours that it knows: stand-ins for variables, and no colours of any plot.
_INK, _RULE = "#0b0001", "#0b0002"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "nemo_trd",  # equal records, equal page
    "text.parse_math": False,  # a run may be called $x
    "font.size": 11.5,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
}


@dataclass(frozen=True)
class Line:
    """One curve. Curves of one run share a color; what is dashed is named in the figure's text."""

    run: int  # position among the runs of the page
    steps: Sequence[int]
    values: Sequence[float]
    errors: Sequence[float] | None = None
    dashed: bool = False


@dataclass(frozen=True)
class Band:
    """One curve with its interval; colour and sign are those of the run of the same number."""

    color: int
    x: Sequence[float]
    values: Sequence[float]
    low: Sequence[float | None]
    high: Sequence[float | None]
    dashed: bool = False


def run_color(run: int) -> str:
    return f"var(--run-{run % RUN_COLORS})"


def run_marker(run: int) -> str:
    """The sign of a run's curves as a character."""
    return list(_MARKERS.values())[run % len(_MARKERS)]


def phase_color(phase: int) -> str:
    return f"var(--phase-{phase % PHASE_COLORS})"


def curves(name: str, alt: str, ylabel: str, lines: Sequence[Line]) -> Markup | None:
    """Values against steps. None where there is no finite value at all."""
    shown = [line for line in lines if any(isfinite(value) for value in line.values)]
    if not shown:
        return None
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure()
        for line in shown:
            color = _run_stand_in(line.run)
            axes.errorbar(
                line.steps,
                line.values,
                yerr=None
                if line.errors is None
                else [error if isfinite(error) else 0.0 for error in line.errors],
                color=color,
                ecolor=color,
                elinewidth=1,
                capsize=2,
                linestyle=(0, (4, 2)) if line.dashed else "-",
                marker=list(_MARKERS)[line.run % len(_MARKERS)],
                markevery=-(-len(line.steps) // _MARKED),
                markerfacecolor="none" if line.dashed else color,
            )
        axes.set_ylabel(ylabel)
        _steps_below(axes)
        finite = {value for line in shown for value in line.values if isfinite(value)}
        if len(finite) == 1:  # or the axis would magnify nothing
            (value,) = finite
            axes.set_ylim(min(0.0, 2 * value), max(1.0, 2 * value))
        return _svg(figure, name, alt)


def bands(
    name: str, alt: str, xlabel: str, ylabel: str, drawn: Sequence[Band], mark: float | None
) -> Markup | None:
    """Values with intervals against any axis, with a vertical rule at `mark`. None without any."""
    if not drawn:
        return None
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure()
        for band in drawn:
            color = _run_stand_in(band.color)
            x, values = np.asarray(band.x), np.asarray(band.values)
            # An interval that is not known has no width.
            low, high = (
                np.where([bound is None for bound in bounds], values, np.array(bounds, float))
                for bounds in (band.low, band.high)
            )
            axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
            axes.plot(
                x,
                values,
                color=color,
                linestyle=(0, (4, 2)) if band.dashed else "-",
                marker=list(_MARKERS)[band.color % len(_MARKERS)],
                markevery=-(-len(x) // _MARKED),
                markerfacecolor="none" if band.dashed else color,
            )
        if mark is not None:
            axes.axvline(mark, color=_INK, linewidth=1, linestyle=":")
        if max(abs(value) for band in drawn for value in band.x) > _LINEAR:
            axes.set_xscale("symlog", linthresh=_LINEAR)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.margins(y=0.08)
        return _svg(figure, name, alt)


def stacked(
    name: str, alt: str, steps: Sequence[int], parts: Sequence[tuple[int, Sequence[float]]]
) -> Markup | None:
    """Seconds of a step by phase, bars over steps; many steps share a bar, which is their mean.

    Args:
        parts: number of a phase's colour, and its seconds in each step.
    """
    if not steps or not parts:
        return None
    bins, left, width = _bars(steps)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure()
        bottom = np.zeros(len(bins))
        for color, seconds in parts:
            heights = np.array([np.mean(np.asarray(seconds)[part]) for part in bins])
            axes.bar(
                left - 0.5,
                heights,
                width * 0.9,
                bottom,
                align="edge",
                color=f"#0c00{color % PHASE_COLORS:02x}",
            )
            bottom += heights
        axes.grid(axis="x", visible=False)
        axes.set_ylabel("seconds per step")
        _steps_below(axes)
        return _svg(figure, name, alt)


def lanes(
    name: str, alt: str, steps: Sequence[int], shares: Mapping[str, Sequence[float]]
) -> Markup:
    """One lane above the other, each filled to its share in each step, as bars of `stacked`."""
    bins, left, width = _bars(steps)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure()
        for position, values in enumerate(shares.values()):
            filled = np.nan_to_num(np.asarray(values, dtype=float))
            axes.bar(
                left - 0.5,
                [float(np.mean(filled[part])) for part in bins],
                width * 0.9,
                -1.2 * position,
                align="edge",
                color=f"#0c00{position:02x}",
            )
            axes.axhline(1 - 1.2 * position, color=_RULE, linewidth=0.8, linestyle=":")
        axes.grid(visible=False)
        axes.set_yticks([0.5 - 1.2 * position for position in range(len(shares))], [*shares])
        _steps_below(axes)
        return _svg(figure, name, alt)


def _bars(steps: Sequence[int]) -> tuple[list[Any], Any, Any]:
    """Positions of the steps that share a bar; steps at which bars begin; their widths."""
    bins = np.array_split(np.arange(len(steps)), min(len(steps), _MAX_BARS))
    left = np.array([steps[part[0]] for part in bins], dtype=float)
    width = np.array([steps[part[-1]] - steps[part[0]] + 1 for part in bins], dtype=float)
    return bins, left, width


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 3.0), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    return figure, axes


def _steps_below(axes: Axes) -> None:
    axes.set_xlabel("steps")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(y=0.08)


def _run_stand_in(run: int) -> str:
    return f"#0a00{run % RUN_COLORS:02x}"


def _svg(figure: Figure, name: str, alt: str) -> Markup:
    """The figure as an element of a page that holds several: its ids begin with `name`."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"#0a00([0-9a-f]{2})", lambda m: run_color(int(m[1], 16)), text)
    text = re.sub(r"#0c00([0-9a-f]{2})", lambda m: phase_color(int(m[1], 16)), text)
    text = text.replace(_INK, "var(--soft)").replace(_RULE, "var(--rule)")
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", text)
    label = Markup('<svg role="img" aria-label="{}" ').format(alt)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    return label + Markup(text.removeprefix("<svg "))
