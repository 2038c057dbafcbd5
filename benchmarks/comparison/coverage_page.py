"""Tables, points and the plot of an exploration."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from comparison.coverage import (
    RIGHT,
    Exploration,
    Results,
    figures,
    order_shares,
    up_to,
)
from comparison.figures import markdown, save, tests_table
from comparison.results import Interval, interval
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from nemo_trd.toy.derivations import ORDERS

REFERENCE = "trd"
FACTS = ("name", "seed", "step", "generated_tokens", "seconds")  # of `Sampled`
TITLES = {
    "student": "student, before training",
    "teacher": "teacher",
    "opd_steps": "OPD, equal steps",
    "opd_tokens": "OPD, equal tokens",
    "trd": "TRD",
    "trd_mixed": "TRD, y_r of wrong, y_o of right",
    "trd_prompt": "TRD, teacher sees x",
}
Figures = dict[str, list[dict[str, float]]]  # by name of the model, one for each seed


def measured(results: Results) -> Figures:
    """The figures of each model."""
    return {name: [figures(one.problems) for one in results.of(name)] for name in TITLES}


def column(found: Figures, name: str, figure: str) -> list[float] | None:
    """The figure of one model by seed; None where a seed has none."""
    values = [one.get(figure) for one in found[name]]
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) > 0 else None


def difference(found: Figures, name: str, figure: str) -> Interval | None:
    """`REFERENCE` minus the other model, seed by seed, with a paired t-test."""
    ours, its = column(found, REFERENCE, figure), column(found, name, figure)
    if ours is None or its is None:
        return None
    return interval([a - b for a, b in zip(ours, its, strict=True)], of_difference=True)


def _columns(samples: int) -> dict[str, tuple[str, int]]:
    """What the tables have of a model, by figure: head, and 100 where it is in percent."""
    return {
        "pass@1": ("pass@1", 100),
        "pass@4": ("pass@4", 100),
        f"pass@{samples}": (f"pass@{samples}", 100),
        f"distinct@{samples}": (f"derivations in {samples} samples", 1),
        f"distinct_of_right@{RIGHT}": (f"derivations in {RIGHT} right samples", 1),
        "enough": (f"problems with {RIGHT} right samples", 100),
        "entropy": ("entropy", 1),
        "common": ("share of the common one", 100),
        "guessed": ("right answers without derivation", 100),
    }


def _cell(one: Interval | None, scale: int, sign: str = "") -> str:
    if one is None:
        return ""
    digits = 1 if scale == 100 else 2
    width = "" if one.half_width is None else f" ± {scale * one.half_width:.{digits}f}"
    sure = "" if one.p is None else f", p {one.p:.2g}"
    return f"{scale * one.mean:{sign}.{digits}f}{width}{sure}"


def levels_table(results: Results, found: Figures) -> str:
    """In Markdown, a row for each model."""
    columns = _columns(results.samples)
    lines = [["", *(head for head, _ in columns.values()), "steps", "tokens", "seconds"]]
    lines.append(["---", *["---:"] * (len(columns) + 3)])
    for name, title in TITLES.items():
        models = results.of(name)
        cells = []
        for figure, (_, scale) in columns.items():
            values = column(found, name, figure)
            cells.append(_cell(None if values is None else interval(values), scale))
        tokens = fmean(one.generated_tokens for one in models) / 1000
        seconds = min(one.seconds for one in models)  # a run may have been disturbed
        spent = [str(models[0].step), f"{tokens:.0f}k", f"{seconds:.0f}"]
        lines.append([title, *cells, *(spent if models[0].step else [""] * 3)])
    return markdown(lines)


def differences_table(results: Results, found: Figures) -> str:
    """In Markdown: TRD minus each other model, seed by seed, with p that there is no difference."""
    columns = _columns(results.samples)
    lines = [["TRD minus", *(head for head, _ in columns.values())]]
    lines.append(["---", *["---:"] * len(columns)])
    for name, title in TITLES.items():
        if name != REFERENCE:
            cells = [
                _cell(difference(found, name, figure), scale, "+")
                for figure, (_, scale) in columns.items()
            ]
            lines.append([title, *cells])
    return markdown(lines)


def curve_table(results: Results, found: Figures, kind: str, form: str) -> str:
    """In Markdown: means over seeds of pass@k, answer@k or distinct@k, a column for each k."""
    ks = up_to(results.samples)
    lines = [[kind, *(f"k = {k}" for k in ks)], ["---", *["---:"] * len(ks)]]
    for name, title in TITLES.items():
        values = [column(found, name, f"{kind}@{k}") for k in ks]
        lines.append([title, *("" if v is None else format(fmean(v), form) for v in values)])
    return markdown(lines)


def orders_table(results: Results) -> str:
    """In Markdown: share of each order in the right derivations, in percent, mean over seeds."""
    lines = [["", *(" ".join(order) for order in ORDERS)], ["---", *["---:"] * len(ORDERS)]]
    for name, title in TITLES.items():
        lines.append([title, *(f"{100 * share:.1f}" for share in _mean_shares(results, name))])
    return markdown(lines)


def _mean_shares(results: Results, name: str) -> list[float]:
    shares = [order_shares(one.problems) for one in results.of(name)]
    return [fmean(values) for values in zip(*shares, strict=True)]


def models_table(results: Results) -> str:
    """In Markdown: what the models of each seed can do."""
    names = [*next(iter(results.models.values()))]
    lines = [["seed", *(name.replace("_", " ") for name in names)], ["---:"] * (len(names) + 1)]
    for seed, one in results.models.items():
        values = [one[name] for name in names]
        lines.append([seed, *("" if value is None else f"{value:.3g}" for value in values)])
    return markdown(lines)


def chosen_table(results: Results) -> str:
    """In Markdown: the learning rate of each method."""
    lines = [["method", "learning rate"], ["---", "---:"]]
    lines += [[method, f"{one['lr']:g}"] for method, one in results.chosen.items()]
    return markdown(lines)


def tables(exploration: Exploration, tests: Mapping[str, Interval | None]) -> str:
    """All tables, a blank line between two of them."""
    parts = [tests_table(tests)]
    for results in exploration.results:
        found = measured(results)
        parts += [
            f"**{condition_title(results)}**",
            levels_table(results, found),
            differences_table(results, found),
            curve_table(results, found, "distinct", ".2f"),
            curve_table(results, found, "pass", ".1%"),
            curve_table(results, found, "answer", ".1%"),
            orders_table(results),
            models_table(results),
            chosen_table(results),
        ]
    return "\n\n".join(parts) + "\n"


def condition_title(results: Results) -> str:
    usual = {1.0: "keep the order of the attempt", 0.0: "take any order"}
    return f"Rewrites {usual.get(results.kept, f'keep the order at a rate of {results.kept:g}')}"


def as_csv(exploration: Exploration) -> str:
    """One line for each model, seed and kind of teacher; a figure that it has not is empty."""
    lines = []
    for results in exploration.results:
        for name, ones in measured(results).items():
            for model, its_figures in zip(results.of(name), ones, strict=True):
                facts = {field: getattr(model, field) for field in FACTS}
                lines.append({"kept": results.kept, **facts, **its_figures})
    fields = {field: None for line in lines for field in line}
    text = io.StringIO()
    writer = csv.DictWriter(text, [*fields], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def plot(exploration: Exploration, path: Path) -> None:
    """Right derivations and right samples against k, and the mix of the orders.

    A row of panels for each kind of teacher.
    """
    count = len(exploration.results)
    figure = Figure(figsize=(21, 5.2 * count + 0.8), layout="constrained")
    figure.suptitle(
        "Does trajectory refinement find more ways to solve a problem, or only solve it more often?"
        " Six right derivations a problem: the orders of its products. Mean and 95 % over seeds."
    )
    rows = figure.subfigures(count, squeeze=False)[:, 0]
    for results, row in zip(exploration.results, rows, strict=True):
        _row(results, row)
    save(figure, path)


def _row(results: Results, row: SubFigure) -> None:
    found = measured(results)
    row.suptitle(f"{condition_title(results)}, in the texts that the teacher has learnt from")
    samples, right, passed, mixes = row.subplots(1, 4)
    _curves(samples, found, "distinct", up_to(results.samples), 1)
    samples.set(title="Different right derivations among k samples", ylabel="derivations")
    _curves(right, found, "distinct_of_right", up_to(RIGHT), 1)
    right.set(
        title="Among k right samples: accuracy left out",
        ylabel="derivations",
        xlabel="k right samples",
    )
    _curves(passed, found, "pass", up_to(results.samples), 100)
    passed.set(title="pass@k: one right derivation at least", ylabel="percent of problems")
    passed.set_ylim(top=101)
    _mixes(results, mixes)
    row.legend(handles=samples.lines, loc="outside lower center", ncols=7, fontsize=9)


def _curves(panel: Axes, found: Figures, kind: str, ks: Sequence[int], scale: float) -> None:
    for number, (name, title) in enumerate(TITLES.items()):
        columns = {k: column(found, name, f"{kind}@{k}") for k in ks}
        known = {k: interval(values) for k, values in columns.items() if values is not None}
        low = [scale * (one.mean - (one.half_width or 0)) for one in known.values()]
        high = [scale * (one.mean + (one.half_width or 0)) for one in known.values()]
        means = [scale * one.mean for one in known.values()]
        style = "--" if name in ("student", "teacher") else "-"
        panel.fill_between([*known], low, high, color=f"C{number}", alpha=0.12, linewidth=0)
        panel.plot([*known], means, style, color=f"C{number}", marker="o", ms=3, label=title)
    panel.set_xscale("log", base=2)
    panel.set_xticks([*ks], [str(k) for k in ks])
    panel.minorticks_off()
    panel.set_xlim(0.9 * ks[0], 1.1 * ks[-1])  # also where there is no curve
    panel.set_xlabel("k samples")
    panel.grid(alpha=0.3)


def _mixes(results: Results, panel: Axes) -> None:
    """A bar for each model, the common order at the left."""
    names = [*TITLES][::-1]
    left = [0.0] * len(names)
    shares = [_mean_shares(results, name) for name in names]
    for number, order in enumerate(ORDERS):
        widths = [100 * one[number] for one in shares]
        label = "".join(order) + (", common" if number == 0 else "")
        panel.barh([TITLES[name] for name in names], widths, left=left, label=label)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    panel.set(title="Which derivation the right samples use", xlabel="percent of right samples")
    panel.legend(fontsize=7, ncols=6, loc="upper right", handlelength=0.8, columnspacing=0.8)
    panel.set_ylim(-0.6, len(names) + 0.1)  # room for the legend
