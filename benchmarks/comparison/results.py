"""What the runs of the comparison recorded, and how sure it is. Pure functions of their files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from comparison.models import read_made
from scipy import stats

from nemo_trd.records.prefix_failure import FILE as PREFIX_FAILURE
from nemo_trd.records.prefix_failure import PrefixFailure
from nemo_trd.toy import task

# What steps are for. Evaluation and records are left out of wall time.
VERDICTS = ("wrong_to_right", "wrong_to_wrong", "right_to_right", "right_to_wrong")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
PHASES = ("rollout", "refinement", "teacher", "student", "weight_sync")


@dataclass(frozen=True)
class Point:
    """A student after some steps of one run."""

    method: str
    seed: int
    step: int
    avg: float  # avg@k over the problems
    passed: float  # pass@k
    generated_tokens: int  # by student and teacher since the run began
    seconds: float  # of the steps so far


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % interval by Student's t; p: of no difference, where asked."""

    mean: float
    half_width: float | None  # None: one seed alone
    p: float | None = None


def read_run(run_dir: Path, method: str, seed: int, k: int) -> list[Point]:
    """All evaluations of a run."""
    tokens, seconds = {0: 0}, {0: 0.0}
    for line in _lines(run_dir / "metrics.jsonl"):
        step = line["step"]
        tokens[step] = tokens[step - 1] + line["generated_tokens"]
        spent = sum(line.get(f"seconds/{phase}") or 0.0 for phase in PHASES)
        seconds[step] = seconds[step - 1] + spent
    return [
        Point(
            method,
            seed,
            line["step"],
            line[f"avg@{k}"],
            line[f"pass@{k}"],
            tokens[line["step"]],
            seconds[line["step"]],
        )
        for line in _lines(run_dir / "evaluation.jsonl")
    ]


def write_fields(fields: Mapping[str, Any], file: Path) -> None:
    """As JSON, with one line for each of the `points`."""
    lines = ",\n".join(json.dumps(point) for point in fields["points"])
    others = {name: value for name, value in fields.items() if name != "points"}
    text = json.dumps(others, indent=1).removesuffix("\n}")
    file.write_text(f'{text},\n "points": [\n{lines}\n]\n}}\n')


def read_models(models: Path, run_dir: Path, products: int = task.USUAL) -> dict[str, float | None]:
    """What student and teacher can do, and what the teacher says of the student's rollouts.

    A figure is None where no rollout bears it: a strong student may have none that is wrong.

    Args:
        models: the directory of both; what they can do was measured on held-out problems.
        run_dir: a run that refines, measured by nemo_trd.prefix_failure; the teacher sees x.
        products: of a problem of the run. A model may have been measured on several lengths.
    """
    made = {role: read_made(models / role) for role in ("student", "teacher")}

    def reached(role: str, kind: str) -> float:
        accuracy = made[role]["accuracy"]
        at_length = f"{kind}@{products}"
        return accuracy[at_length if at_length in accuracy else kind]

    lines = _lines(run_dir / "metrics.jsonl")
    counts = {name: sum(line[name] for line in lines) for name in VERDICTS}
    found = PrefixFailure.model_validate_json((run_dir / PREFIX_FAILURE).read_text())
    parts = {
        (group.source, part): {
            **{name: one.mean for name, one in figures.means.items()},
            **{f"gradient_{name}": one.mean for name, one in figures.gradient_share.items()},
            "tokens": figures.token_share.mean,
            "length": figures.tokens / figures.trajectories if figures.trajectories else None,
        }
        for group in found.groups
        if (group.teacher_context, group.verdict) == ("prompt", "wrong")
        for part, figures in group.parts.items()
    }
    before, after, rewrite = (
        parts.get(key, {})
        for key in (("rollout", "before"), ("rollout", "after"), ("refinement", "after"))
    )
    wrong = counts["wrong_to_right"] + counts["wrong_to_wrong"]
    right = counts["right_to_right"] + counts["right_to_wrong"]
    shares = {
        f"share_of_{what}_after_error_in_{source}": part.get(what)
        for what in ("tokens", *(f"gradient_{name}" for name in DIVERGENCES))
        for source, part in (("rollout", after), ("rewrite", rewrite))
    }
    return {
        "student_solves": reached("student", "solve"),
        "teacher_solves": reached("teacher", "solve"),
        "teacher_rewrites": reached("teacher", "rewrite"),
        "notices": reached("teacher", "notice"),
        "repaired": counts["wrong_to_right"] / wrong if wrong else None,
        "spoiled": counts["right_to_wrong"] / right if right else None,
        "entropy_before_error": before.get("teacher_entropy"),
        "entropy_after_error": after.get("teacher_entropy"),
        "tokens_after_error": after.get("length"),
        "entropy_of_rewrite": rewrite.get("teacher_entropy"),
        "turns_back": after.get("turn_back"),
        "two_peaked": after.get("two_peaked"),
        **shares,
        "warm_start_seconds": sum(one["seconds"] for one in made.values()),
    }


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def interval(values: Sequence[float], of_difference: bool = False) -> Interval:
    """Of one value a seed. The test is the paired t-test, where `values` are differences."""
    n = len(values)
    if n < 2:
        return Interval(fmean(values), None)
    half_width = float(stats.t.ppf(0.975, n - 1)) * stdev(values) / sqrt(n)
    p = None
    if of_difference and stdev(values) > 0:
        p = float(stats.ttest_1samp(values, 0.0).pvalue)
    return Interval(fmean(values), half_width, p)


def differences(a: Iterable[Point], b: Iterable[Point]) -> list[float]:
    """avg@k of `a` minus that of `b`, seed by seed; each has one point for a seed.

    Raises:
        ValueError: they do not have the same seeds.
    """
    left, right = ({point.seed: point.avg for point in points} for points in (a, b))
    if left.keys() != right.keys():
        raise ValueError(f"seeds {sorted(left)} cannot be paired with seeds {sorted(right)}")
    return [left[seed] - right[seed] for seed in sorted(left)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for their number (Holm 1979): the chance of any false alarm stays at the level."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def as_csv(points: Sequence[Point], more: Sequence[Mapping[str, object]] = ()) -> str:
    """One line for each point. more: further columns, a mapping for each point."""
    lines = [
        {**further, **asdict(p)}
        for further, p in zip(more or [{}] * len(points), points, strict=True)
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*lines[0]], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
