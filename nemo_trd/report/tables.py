"""Figures of the page in numbers: every plot has a table that says the same to a reader."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import nan
from typing import Any, get_args

from nemo_trd.config.dotted import dotted
from nemo_trd.data.types import Rejection
from nemo_trd.records.read import Record, RunRecords, number
from nemo_trd.report.marked import Nll, mean
from nemo_trd.report.plots import phase_color

_PHASES = (
    *("rollout", "refinement", "wait_for_samples", "teacher", "student", "weight_sync"),
    *("evaluation", "checkpoint"),
)
POOLS = ("student_pool", "teacher_pool")  # seconds in which they had work, beside each other
# The whole; time in which servers wait for training.
_NO_WORK = {"step", "wait_for_training", *POOLS}
SAMPLING = ("rollout", "refinement")  # phases: until the last rollout has ended, and from then on
_UNKNOWN = "–"


def at_a_glance(run: RunRecords) -> dict[str, str]:
    """The few figures that people ask for first."""
    first, last = (run.evaluations[0], run.evaluations[-1]) if run.evaluations else ({}, {})
    repaired, spoiled = (
        _of(run.total(f"{before}_to_{after}"), run.total(f"{before}_to_{before}"))
        for before, after in (("wrong", "right"), ("right", "wrong"))
    )
    loss, seconds = run.values("loss"), run.values("seconds/step")
    return {
        "steps": f"{run.steps[-1]['step'] if run.steps else 0:,}"
        + (f" of {run.setting('train.num_steps'):,}" if run.setting("train.num_steps") else ""),
        **{
            label: _UNKNOWN
            if not last
            else f"{_score(first, pattern)} → {_score(last, pattern)}"
            if len(run.evaluations) > 1
            else _score(last, pattern)
            for label, pattern in (("accuracy", r"avg@\d+"), ("pass", r"pass@\d+"))
        },
        "loss": f"{loss[0]:.4g} → {loss[-1]:.4g}" if loss else _UNKNOWN,
        "repaired": repaired,
        "spoiled": spoiled,
        "kept": _percent(mean(run.values("kept_share"))),
        "real tokens, student": _percent(mean(run.values("student_real_token_share"))),
        "teacher": _percent(mean(run.values("teacher_real_token_share"))),
        "s / step": f"{mean(seconds):.3g}" if seconds else _UNKNOWN,
    }


def _score(record: Record, pattern: str) -> str:
    name = next((name for name in record if re.fullmatch(pattern, name)), "")
    value = number(record.get(name))
    return f"{value:.3f}" if value == value else _UNKNOWN


def _of(changed: int, unchanged: int) -> str:
    whole = changed + unchanged
    return f"{changed / whole:.1%}" if whole else _UNKNOWN


def _percent(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.1%}"


@dataclass(frozen=True)
class Changes:
    """Rollouts of a whole run by what became of them."""

    counts: dict[tuple[str, str], int]  # (rollout, refinement) of accepted rewrites with verdicts
    undecided: int
    rejected: dict[str, int]
    shortened: dict[str, int]
    rollouts: int
    means: dict[str, str]  # over the steps

    def share(self, before: str, after: str) -> str:
        whole = sum(count for (row, _), count in self.counts.items() if row == before)
        return _percent(self.counts[before, after] / whole if whole else None)


def changes(run: RunRecords) -> Changes:
    states = ("wrong", "right")
    means = {
        "first difference, token": ("first_difference", "{:.1f}"),
        "first difference, share of y_o": ("first_difference_share", "{:.1%}"),
        "kept share of y_o": ("kept_share", "{:.1%}"),
        "length of y_o": ("rollout_tokens", "{:.1f}"),
        "length of y_r": ("refinement_tokens", "{:.1f}"),
        "rewrites equal to y_o": ("unchanged", "{:.1%}"),
    }
    drafts = {  # where the teacher's servers check some
        "drafted tokens accepted": ("draft_acceptance", "{:.1%}"),
        "tokens of y_r per decoding step": ("tokens_per_decode_step", "{:.2f}"),
    }
    means |= {label: row for label, row in drafts.items() if run.values(row[0])}
    averages = {label: (mean(run.values(name)), form) for label, (name, form) in means.items()}
    return Changes(
        counts={(a, b): run.total(f"{a}_to_{b}") for a in states for b in states},
        undecided=run.total("undecided"),
        rejected=_nonzero(run, "rejected_", get_args(Rejection)),
        shortened=_nonzero(run, "shortened_", ("rollout", "reference_solution")),
        rollouts=run.total("rollouts"),
        means={
            label: _UNKNOWN if value is None else form.format(value)
            for label, (value, form) in averages.items()
        },
    )


def _nonzero(run: RunRecords, prefix: str, names: Sequence[str]) -> dict[str, int]:
    counts = {name: run.total(prefix + name) for name in names}
    return {name: count for name, count in counts.items() if count}


def nll(run: RunRecords) -> dict[str, Nll]:
    """Mean NLL by what it is of; what is not known is None.

    Over the steps of the run, as far as training came by it, and where prefix failure was measured
    also of y_o and y_r alike under the student and teacher named there.
    """
    rows = {
        "trained on": Nll(mean(run.values("student_nll")), mean(run.values("teacher_nll"))),
        "rollouts y_o, as sampled": Nll(mean(run.values("rollout_nll")), None),
    }
    for group in run.prefix_failure.groups if run.prefix_failure else ():
        text = "y_o" if group.source == "rollout" else "y_r"
        seen = "x" if group.teacher_context == "prompt" else "x, y_o"
        means = {name: estimate.mean for name, estimate in group.parts["whole"].means.items()}
        rows[f"measured: {text} of {group.verdict} y_o, teacher sees {seen}"] = Nll(
            means.get("student_nll"), means.get("teacher_nll")
        )
    return rows


def phase_names(runs: Sequence[RunRecords]) -> list[str]:
    recorded = {
        name.removeprefix("seconds/")
        for run in runs
        for record in run.steps
        for name in record
        if name.startswith("seconds/")
    }
    extra = sorted(recorded - set(_PHASES) - _NO_WORK)
    return [name for name in _PHASES if name in recorded] + extra


def phase_seconds(run: RunRecords, name: str) -> list[float]:
    """Seconds of every step; 0 where the phase did not occur."""
    return [value if value == value else 0.0 for value in run.series(f"seconds/{name}")[1]]


def phases(runs: Sequence[RunRecords]) -> list[tuple[str, str, list[str]]]:
    """Rows of (phase, color, mean seconds per step of every run), and the whole step last."""
    rows = []
    for position, name in enumerate([*phase_names(runs), "step"]):
        means = [mean(phase_seconds(run, name)) for run in runs]
        cells = [_UNKNOWN if value is None else f"{value:.3f}" for value in means]
        rows.append((name, "" if name == "step" else phase_color(position), cells))
    return rows


def pool_shares(run: RunRecords, pool: str) -> list[float]:
    """Share of the sampling of every step in which a pool had work; NaN where it is not known."""
    whole = [sum(pair) for pair in zip(*map(partial(phase_seconds, run), SAMPLING), strict=True)]
    busy = run.series(f"seconds/{pool}")[1]
    return [part / all_of if all_of else nan for part, all_of in zip(busy, whole, strict=True)]


def pools(runs: Sequence[RunRecords]) -> list[tuple[str, list[str]]]:
    """Rows of (pool, mean share of every run); none where no run has recorded any."""
    rows = []
    for pool in POOLS:
        shares = [[share for share in pool_shares(run, pool) if share == share] for run in runs]
        rows.append((pool, [_percent(mean(values)) for values in shares]))
    return rows if any(cell != _UNKNOWN for _, cells in rows for cell in cells) else []


def staleness(run: RunRecords) -> str:
    values = run.values("staleness")
    if not values:
        return "not recorded"
    return f"mean {mean(values):.2f}, largest {max(values):.2f} updates"


def settings(runs: Sequence[RunRecords]) -> list[tuple[str, list[str]]]:
    """Main settings of one run; of several, every setting that differs, but the directory."""
    flat = [dotted(run.settings) for run in runs]
    if len(runs) == 1:
        shown = ("algorithm.", "loss.", "optimizer.lr", "train.", "model.", "generation.max_stale")
        names = [name for name in flat[0] if name.startswith(shown)]
    else:
        every = dict.fromkeys(name for values in flat for name in values)
        names = [n for n in every if len({repr(values.get(n)) for values in flat}) > 1]
    names = [name for name in names if name not in ("run.dir",)]
    return [(name, [_written(values.get(name)) for values in flat]) for name in names]


def _written(value: Any) -> str:
    return _UNKNOWN if value is None else str(value)
