"""Figures of the page: learning, rewriting, likelihood, time, staleness."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from nemo_trd.records.read import RunRecords, number
from nemo_trd.report.plots import Line, curves, lanes, stacked
from nemo_trd.report.tables import POOLS, phase_names, phase_seconds, pool_shares

Runs = Sequence[RunRecords]


@dataclass(frozen=True)
class Shown:
    title: str
    note: str
    svg: Markup | None  # None: no run has recorded it


def learning(runs: Runs) -> list[Shown]:
    k = accuracy_names(runs)
    scored = [
        Line(
            position,
            [record["step"] for record in run.evaluations],
            [number(record.get(accuracy_name(record))) for record in run.evaluations],
            [number(record.get("stderr")) for record in run.evaluations],
        )
        for position, run in enumerate(runs)
    ]
    return [
        Shown(
            "Held-out accuracy",
            f"{k or 'avg@k'}; bars are one standard error over problems.",
            curves("accuracy", "Held-out accuracy against steps", "accuracy", scored),
        ),
        _metric(runs, "loss", "Loss", "divergence per label", "Mean over label tokens, in nats."),
    ]


def accuracy_name(record: dict[str, object]) -> str:
    return next((name for name in record if re.fullmatch(r"avg@\d+", name)), "")


def accuracy_names(runs: Runs) -> str:
    names = {accuracy_name(record) for run in runs for record in run.evaluations}
    return ", ".join(sorted(name for name in names if name))


def rewriting(runs: Runs) -> list[Shown]:
    return [
        _computed(runs, "repaired", "Wrong rollouts made right", "share", _share("wrong", "right")),
        _computed(runs, "spoiled", "Right rollouts made wrong", "share", _share("right", "wrong")),
        _metric(
            runs,
            "kept_share",
            "Share of the rollout that was kept",
            "share of tokens",
            "Longest common subsequence of y_o and y_r over the length of y_o.",
        ),
        _metric(
            runs,
            "first_difference_share",
            "First difference",
            "position / length of y_o",
            "Of the rewrites that change something. 1: y_r goes on where y_o ended.",
        ),
        _metric(runs, "first_difference", "First difference, in tokens", "position in y_o", ""),
        _computed(
            runs,
            "length_change",
            "Length change",
            "tokens, y_r − y_o",
            lambda record: (
                number(record.get("refinement_tokens")) - number(record.get("rollout_tokens"))
            ),
        ),
    ]


def likelihood(runs: Runs) -> list[Shown]:
    lines = [
        Line(position, *run.series(name), dashed=name == "teacher_nll")
        for position, run in enumerate(runs)
        for name in ("student_nll", "teacher_nll")
    ]
    return [
        Shown(
            "NLL of what was trained on",
            "Per token, in nats. Solid: student, dashed: teacher.",
            curves("nll", "Student and teacher NLL against steps", "nats per token", lines),
        ),
        _computed(
            runs,
            "nll_gap",
            "Gap, student over teacher",
            "nats per token",
            lambda record: number(record.get("student_nll")) - number(record.get("teacher_nll")),
        ),
        _metric(
            runs,
            "rollout_nll",
            "NLL of rollouts under the student",
            "nats per token",
            "A by-product of sampling on vLLM servers, at temperature 1.",
        ),
    ]


_POOLS = "Share of sampling in which student and teacher had work. Together over 100%: streaming."


def time(runs: Runs) -> list[Shown]:
    names = phase_names(runs)
    shown = []
    for position, run in enumerate(runs):
        parts = [(color, phase_seconds(run, name)) for color, name in enumerate(names)]
        parts = [(color, seconds) for color, seconds in parts if any(seconds)]
        ahead = (run.setting("generation.max_staleness") or 0) > 0
        note = "Phases of sampling overlap with training." if ahead else ""
        alt = f"Seconds per step by phase, run {run.name}"
        steps = [record["step"] for record in run.steps]
        shown.append(Shown(run.name, note, stacked(f"time{position}", alt, steps, parts)))
        shares = {pool.removesuffix("_pool"): pool_shares(run, pool) for pool in POOLS}
        if any(share == share for lane in shares.values() for share in lane):
            alt = f"Busy share of the two pools against steps, run {run.name}"
            drawn = lanes(f"pools{position}", alt, steps, shares)
            shown.append(Shown(f"Pools of {run.name}", _POOLS, drawn))
    return shown


def staleness(runs: Runs) -> list[Shown]:
    return [
        _metric(
            runs, "staleness", "Age of the rollouts", "updates", "Updates since y_o was sampled."
        )
    ]


def _metric(runs: Runs, name: str, title: str, ylabel: str, note: str) -> Shown:
    lines = [Line(position, *run.series(name)) for position, run in enumerate(runs)]
    return Shown(title, note, curves(name, f"{title} against steps", ylabel, lines))


def _computed(
    runs: Runs,
    name: str,
    title: str,
    ylabel: str,
    compute: Callable[[dict[str, object]], float],
) -> Shown:
    lines = [
        Line(
            position,
            [record["step"] for record in run.steps],
            [compute(record) for record in run.steps],
        )
        for position, run in enumerate(runs)
    ]
    return Shown(title, "", curves(name, f"{title} against steps", ylabel, lines))


def _share(before: str, after: str) -> Callable[[dict[str, object]], float]:
    def compute(record: dict[str, object]) -> float:
        whole = sum(number(record.get(f"{before}_to_{end}")) for end in ("wrong", "right"))
        return number(record.get(f"{before}_to_{after}")) / whole if whole else float("nan")

    return compute
