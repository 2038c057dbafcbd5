"""prefix_failure.json: what is in it. Imports no torch; every number is finite.

A trajectory is "right" or "wrong" by the verdict on its *rollout*, also where it is the rewrite.
"""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

from nemo_trd.config.schema import FullDivergenceName

FILE = "prefix_failure.json"
Source = Literal["rollout", "refinement"]
TeacherContext = Literal["prompt", "refine"]
Verdict = Literal["right", "wrong"]
Locator = Literal["toy", "first_difference"]  # what says where a rollout went wrong
# relative: share of the answer, in bins. absolute: tokens from its beginning. distance: tokens
# from the place where the rollout went wrong, negative before it.
Alignment = Literal["relative", "absolute", "distance"]
Part = Literal["whole", "before", "at", "after"]  # of a trajectory, by that place
DIVERGENCES: tuple[FullDivergenceName, ...] = get_args(FullDivergenceName)


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Estimate(Record):
    """A mean, and the bounds of its bootstrap interval; none where one problem alone bears it."""

    mean: float
    low: float | None
    high: float | None


class Counts(Record):
    """Counts over the samples; `samples` = `right` + `wrong` + `no_verdict` + `aborted`."""

    samples: int = 0
    not_measured: int = 0  # older ones, beyond the limit
    right: int = 0  # rollouts
    wrong: int = 0
    no_verdict: int = 0
    aborted: int = 0  # or empty
    wrong_with_a_known_place: int = 0
    wrong_without_one: int = 0
    right_with_a_wrong_step: int = 0  # toy task only: errors that cancel
    refinements: int = 0  # accepted ones
    right_refinements: int = 0
    refinements_that_part_before_the_error: int = 0  # these have no place to be aligned by


class PartFigures(Record):
    trajectories: int
    tokens: int
    token_share: Estimate  # of the tokens of the same trajectories
    gradient_share: dict[FullDivergenceName, Estimate]  # of the sum of norms of d loss / d logits
    hidden_gradient_share: dict[FullDivergenceName, Estimate]  # of d loss / d hidden
    means: dict[str, Estimate]  # over tokens
    counts: dict[str, int]  # tokens for which a figure of `means` is defined, where not all


class Group(Record):
    source: Source
    teacher_context: TeacherContext
    verdict: Verdict
    parts: dict[Part, PartFigures]


class Curve(Record):
    """One figure against positions; lists of equal length."""

    source: Source
    teacher_context: TeacherContext
    verdict: Verdict
    alignment: Alignment
    figure: str
    position: list[float]
    trajectories: list[int]
    mean: list[float]
    low: list[float | None]
    high: list[float | None]


class PrefixFailure(Record):
    version: Literal[1] = 1
    student: str
    teacher: str
    mode: Literal["opd", "opsd"]
    teacher_context: TeacherContext  # of the run, for rewrites
    divergence: FullDivergenceName  # that the run trains with, or by an estimate of it
    beta: float
    temperature: float
    locator: Locator
    confidence: float
    resamples: int
    counts: Counts
    groups: list[Group]
    curves: list[Curve]

    def group(self, source: Source, context: TeacherContext, verdict: Verdict) -> Group | None:
        key = (source, context, verdict)
        groups = (g for g in self.groups if (g.source, g.teacher_context, g.verdict) == key)
        return next(groups, None)

    def curve(
        self,
        source: Source,
        context: TeacherContext,
        verdict: Verdict,
        alignment: Alignment,
        figure: str,
    ) -> Curve | None:
        key = (source, context, verdict, alignment, figure)
        for c in self.curves:
            if (c.source, c.teacher_context, c.verdict, c.alignment, c.figure) == key:
                return c
        return None
