"""The page's section on prefix failure, from RUN_DIR/prefix_failure.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from nemo_trd.prefix_failure.words import NAMES, Table, choice_table, divergence_table, sentences
from nemo_trd.records.prefix_failure import Alignment, PrefixFailure, Source, Verdict
from nemo_trd.records.read import RunRecords
from nemo_trd.report.figures import Shown
from nemo_trd.report.plots import Band, bands, run_color, run_marker


class _Kind(NamedTuple):
    """Trajectories that share a curve."""

    label: str
    source: Source
    verdict: Verdict
    color: int
    dashed: bool


_KINDS = (
    _Kind("y_o, wrong", "rollout", "wrong", 1, False),
    _Kind("y_r of wrong y_o", "refinement", "wrong", 0, False),
    _Kind("y_o, right", "rollout", "right", 3, True),
    _Kind("y_r of right y_o", "refinement", "right", 2, True),
)
_CHOICES = {"go_on": ("goes on", 1), "turn_back": ("turns back", 2), "other": ("other", 7)}
_DISTANCE = "tokens from the place of error"


@dataclass(frozen=True)
class Section:
    student: str
    teacher: str
    sentences: list[str]
    legends: list[tuple[str, list[tuple[str, str, str]]]]  # title; colour, sign and label
    figures: list[Shown]
    tables: list[Table]


def section(position: int, run: RunRecords) -> Section | None:
    """The section on one run; None where nothing was measured."""
    measured = run.prefix_failure
    if measured is None:
        return None
    return Section(
        student=measured.student,
        teacher=measured.teacher,
        sentences=sentences(measured),
        legends=_legends(measured),
        figures=_figures(f"prefix{position}", measured),
        tables=[t for t in (divergence_table(measured), choice_table(measured)) if len(t) > 1],
    )


def _legends(measured: PrefixFailure) -> list[tuple[str, list[tuple[str, str, str]]]]:
    kinds = [
        (run_color(kind.color), run_marker(kind.color), kind.label)
        for kind in _KINDS
        if any((c.source, c.verdict) == (kind.source, kind.verdict) for c in measured.curves)
    ]
    legends = [("Curves", kinds)]
    if any(curve.figure == "turn_back" for curve in measured.curves):
        choices = [(run_color(c), run_marker(c), label) for label, c in _CHOICES.values()]
        legends.append(("The teacher", choices))
    return legends


def _figures(name: str, measured: PrefixFailure) -> list[Shown]:
    divergence = NAMES[measured.divergence]
    divergence = divergence[0].upper() + divergence[1:]
    plotted = [
        ("teacher_entropy", "Teacher entropy", "nats"),
        (measured.divergence, f"{divergence} between teacher and student", "nats"),
        (f"{measured.divergence}_gradient_ratio", "Share of the gradient", "times the mean token"),
    ]
    shown = [
        _against(name, measured, figure, title, unit, alignment)
        for alignment in ("distance", "relative")
        for figure, title, unit in plotted
    ]
    if measured.locator == "toy":
        shown.insert(3, _choices(name, measured))
    else:
        gap = ("top2_gap", "Teacher's first token over its second", "probability")
        shown.insert(3, _against(name, measured, *gap, "distance"))
    return [figure for figure in shown if figure.svg is not None]


def _against(
    name: str, measured: PrefixFailure, figure: str, title: str, unit: str, alignment: Alignment
) -> Shown:
    """One figure against positions, a curve for each kind of trajectory.

    y_o with the teacher's context of plain distillation, y_r with that of the run.
    """
    drawn = []
    for kind in _KINDS:
        context = "prompt" if kind.source == "rollout" else measured.teacher_context
        curve = measured.curve(kind.source, context, kind.verdict, alignment, figure)
        if curve is not None:
            parts = (curve.position, curve.mean, curve.low, curve.high)
            drawn.append(Band(kind.color, *parts, dashed=kind.dashed))
    near = alignment == "distance"
    axis = _DISTANCE if near else "position in the answer, 0 to 1"
    where = "around the place of error" if near else "along the answer"
    svg = bands(
        f"{name}-{alignment}-{figure}", f"{title} {where}", axis, unit, drawn, 0.0 if near else None
    )
    return Shown(f"{title}, {where}", "", svg)


def _choices(name: str, measured: PrefixFailure) -> Shown:
    drawn = []
    for figure, (_, color) in _CHOICES.items():
        curve = measured.curve("rollout", "prompt", "wrong", "distance", figure)
        if curve is not None:
            drawn.append(Band(color, curve.position, curve.mean, curve.low, curve.high))
    return Shown(
        "What the teacher does where y_o leaves a choice",
        "At 0 going on is the student's own wrong token.",
        bands(
            f"{name}-choices",
            "Probability of going on, turning back and anything else around the place of error",
            _DISTANCE,
            "probability",
            drawn,
            0.0,
        ),
    )
