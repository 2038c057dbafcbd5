"""Results in sentences and as tables, for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Iterator
from math import log

from nemo_trd.loss.divergences import DIVERGENCES
from nemo_trd.records.prefix_failure import Estimate, Group, PartFigures, PrefixFailure

NAMES = {name: divergence.title for name, divergence in DIVERGENCES.items()}
TOKENS = {"rollout": "y_o", "refinement": "y_r"}
_UNKNOWN = "–"


def contexts(result: PrefixFailure) -> dict[str, str]:
    """Contexts of the teacher, before the labels."""
    privileged = ", y*" if result.mode == "opsd" else ""
    return {"prompt": f"x{privileged}", "refine": f"x{privileged}, y_o"}


def sentences(result: PrefixFailure) -> list[str]:
    """The findings for a reader who has not seen the tables."""
    return [
        *_counted(result),
        *_along_rollouts(result),
        *_choices(result),
        *_along_rewrites(result),
    ]


def _counted(result: PrefixFailure) -> Iterator[str]:
    n = result.counts
    yield (
        f"{n.right + n.wrong:,} rollouts: {n.right:,} right, {n.wrong:,} wrong; "
        f"{n.refinements:,} usable rewrites, {n.right_refinements:,} of them right."
    )
    known = f"{n.wrong_with_a_known_place:,} of {n.wrong:,} wrong rollouts"
    if result.locator == "toy":
        yield (
            f"For {known} it is known where they went wrong: the first word that the toy task's "
            "right solution does not have."
        )
    else:
        yield (
            f"For {known} there is a proxy for where they went wrong: the first token that their "
            "right rewrite does not share. It may be a change of wording before or after the "
            "mistake."
        )
    if n.right_with_a_wrong_step:
        yield (
            f"{n.right_with_a_wrong_step:,} right rollouts have a wrong step; they count as right."
        )
    if n.not_measured:
        yield f"{n.not_measured:,} older samples were not measured (--limit)."


def _along_rollouts(result: PrefixFailure) -> Iterator[str]:
    group = result.group("rollout", "prompt", "wrong")
    if group is None or "after" not in group.parts or "before" not in group.parts:
        return
    before, after = group.parts["before"], group.parts["after"]
    name = NAMES[result.divergence]
    yield (
        "Along wrong rollouts the teacher's entropy is "
        f"{_nats(before, 'teacher_entropy')} before the place of error and "
        f"{_nats(after, 'teacher_entropy')} after it; the {name} to the student "
        f"{_nats(before, result.divergence)} and {_nats(after, result.divergence)}."
    )
    if result.divergence in after.gradient_share:
        yield (
            f"Tokens after the place of error are {percent(after.token_share)} of these rollouts "
            f"and bring {percent(after.gradient_share[result.divergence])} of the norm of the "
            f"{name}'s gradient."
        )


def _choices(result: PrefixFailure) -> Iterator[str]:
    group = result.group("rollout", "prompt", "wrong")
    at, after = (group.parts.get("at"), group.parts.get("after")) if group else (None, None)
    right = "the right token" if result.locator == "toy" else "the token of the rewrite"
    if at is not None and "turn_back" in at.means:
        yield (
            f"At the place of error itself the teacher gives {right} "
            f"{percent(at.means['turn_back'])} and the one that the student wrote "
            f"{percent(at.means['go_on'])}."
        )
    if after is not None and "turn_back" in after.means:
        means = after.means
        yield (
            f"After it, at {choices_counted(after):,} tokens, going on with the wrong value and "
            f'turning back (to the right one, or with "no") differ: the teacher goes on with '
            f"probability {percent(means['go_on'])}, turns back with "
            f"{percent(means['turn_back'])}, and says "
            f"something else with {percent(means['other'])}. It is of two minds, at least 10% on "
            f"each, at {percent(means['two_peaked'])} of them."
        )


def _along_rewrites(result: PrefixFailure) -> Iterator[str]:
    group = result.group("refinement", result.teacher_context, "wrong")
    after = group.parts.get("after") if group else None
    if after is not None:
        yield (
            "Along the rewrites of wrong rollouts, after the same place, the teacher's entropy is "
            f"{_nats(after, 'teacher_entropy')} and the {NAMES[result.divergence]} "
            f"{_nats(after, result.divergence)}."
        )


def choices_counted(part: PartFigures) -> int:
    """Tokens of a part at which there was a choice."""
    return part.counts.get("turn_back", part.tokens)


def _nats(part: PartFigures, name: str) -> str:
    return f"{part.means[name].mean:.3g} nats"


def percent(share: Estimate) -> str:
    bounds = (
        ""
        if share.low is None or share.high is None
        else f" [{100 * share.low:.1f}, {100 * share.high:.1f}]"
    )
    return f"{100 * share.mean:.1f}%{bounds}"


Table = list[list[str]]  # the first row has the names of the columns


def divergence_table(result: PrefixFailure) -> Table:
    """Entropies, divergence and shares of every kind of trajectory and every part of it."""
    name = result.divergence
    head = ["tokens of", "teacher sees", "rollout", "part", "answers", "tokens"]
    head += ["teacher entropy", "student entropy", NAMES[name], "share of tokens"]
    rows = [[*head, "share of gradient"]]
    for group, part, figures in _parts(result):
        share = figures.gradient_share.get(name)
        cells = [_value(figures.means.get(n)) for n in ("teacher_entropy", "student_entropy", name)]
        rows.append(
            [TOKENS[group.source], contexts(result)[group.teacher_context], group.verdict, part]
            + [f"{figures.trajectories:,}", f"{figures.tokens:,}", *cells]
            + [percent(figures.token_share), percent(share) if share else _UNKNOWN]
        )
    return rows


def choice_table(result: PrefixFailure) -> Table:
    """The teacher's behaviour where the answer has a choice; the header alone where none has."""
    head = ["tokens of", "teacher sees", "part", "choices", "go on", "turn back", "other"]
    head += [
        "entropy of the split",
        "of the mean split",
        "two-peaked",
        "student goes on",
        "student turns back",
    ]
    rows = [head]
    for group, part, figures in _parts(result):
        if part in ("at", "after") and "turn_back" in figures.means:
            mean = figures.means
            shares = [percent(mean[n]) for n in ("go_on", "turn_back", "other")]
            student = [percent(mean[n]) for n in ("student_go_on", "student_turn_back")]
            rows.append(
                [TOKENS[group.source], contexts(result)[group.teacher_context], part]
                + [f"{choices_counted(figures):,}", *shares, _value(mean["split_entropy"])]
                + [f"{_entropy_of_the_mean(figures):.3g}", percent(mean["two_peaked"]), *student]
            )
    return rows


def _entropy_of_the_mean(part: PartFigures) -> float:
    """In nats. The entropy of each split is as large where every token is the same mixture, and
    less where some tokens say one thing and some the other."""
    shares = [part.means[name].mean for name in ("go_on", "turn_back", "other")]
    return -sum(share * log(share) for share in shares if share > 0)


def _parts(result: PrefixFailure) -> Iterator[tuple[Group, str, PartFigures]]:
    for group in result.groups:
        for part, figures in group.parts.items():
            yield group, part, figures


def _value(estimate: Estimate | None) -> str:
    if estimate is None:
        return _UNKNOWN
    if estimate.low is None or estimate.high is None:
        return f"{estimate.mean:.3g}"
    return f"{estimate.mean:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"


def for_terminal(table: Table) -> str:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)
