"""Dose and response: is the teacher's doubt after an error what trajectory refinement repairs?

    python benchmarks/prefix_dose.py             # 8 seeds, hours on two cores
    python benchmarks/prefix_dose.py --quick     # untrained models, 1 seed, few steps: does it run?
    python benchmarks/prefix_dose.py --from FILE    # tables and plots of kept results

The dose is how often a wrong number is taken back in the texts that student and teacher learn from
(DOSES). At 0.5 the teacher is of two minds about every error of the student; at 0.05 and 0.95 it
nearly knows how the text goes on. Each dose and seed has a student and a teacher of its own, each
seed prompts of its own, all made before any method runs. A method that rewrites has 32 steps, one
that does not 64, and both are evaluated half way and at the end. Each has the learning rate that
is best for it at that dose, on other problems and seeds (comparison/jobs.py `tune`).

Written before the first run:

    prediction    The advantage of TRD over OPD under forward KL follows the teacher's entropy after
                  an error: it is largest at 0.5, and there is none at 0.05 and 0.95. Under JSD, and
                  against OPD with reverse KL, it is flat.
    first test    advantage at 0.5 minus the mean of those at 0.05 and 0.95, forward KL, equal
                  steps; one number a seed, two-sided t-test that its mean is 0
    second test   that number of forward KL minus the one of JSD
    third test    Spearman's correlation of the advantage (forward KL, equal steps) with the
                  teacher's measured entropy after an error, over the doses of a seed; two-sided
                  t-test over seeds that its mean is 0
    adjusted p    by Holm, for these tests and for the first and the third of JSD
    exclusions    a seed of which a model misses its gates at any dose is left out at all of them,
                  and the next number takes its place; nothing else is left out

Everything is written to `--output`: models, runs, dose.json (of which tables and plots are made),
points.csv, tables.md and dose.svg. What is there is kept, so an interrupted command goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:  # where this file is imported and not run
    sys.path.insert(0, str(HERE))

from comparison.advantage import FORWARD_KL, Contrast, advantage  # noqa: E402
from comparison.command import command  # noqa: E402
from comparison.jobs import Condition, make_models  # noqa: E402
from comparison.models import Texts, World  # noqa: E402
from comparison.sweep import Results, Sweep, carry_out  # noqa: E402
from comparison.sweep_page import plot, points, tables  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from nemo_trd.toy import task  # noqa: E402
from nemo_trd.toy.warm_start import STUDENT, TEACHER  # noqa: E402

DOSES = (0.05, 0.25, 0.5, 0.75, 0.95)
METHODS = ("opd_forward_kl", "opd_reverse_kl", "opd_jsd", "trd", "trd_jsd")
ENTROPY = "entropy_after_error"
CONTRAST = Contrast("in the middle minus at the ends", {0.5: 1.0, 0.05: -0.5, 0.95: -0.5}, ENTROPY)
SEEDS = 8


def world(dose: float) -> World:
    """Models of a dose. The teacher notices errors nearly as often as its texts do.

    It has more steps than the toy's teacher, since what is rare in its texts is learnt late.
    """
    gates = {**TEACHER.gates, "notice": round(0.8 * dose, 3)}
    teacher = replace(TEACHER, gates=gates, max_steps=3000)
    return World(STUDENT, teacher, Texts(noticed=dose))


def run(root: Path, seeds: int, quick: bool) -> Results:
    conditions = {
        dose: Condition(
            root / f"noticed_{dose:g}",
            budget=32,
            evaluations=2,
            k=8,
            settings=("logging.samples_interval=5",),  # for more wrong rollouts to measure
        )
        for dose in DOSES
    }
    problems = {"development": 200, "test": 200}
    products = dict.fromkeys(DOSES, task.USUAL)
    sweep = Sweep("noticed", METHODS, conditions, products, problems)

    def prepare(dose: float, seed: int) -> None:
        one = world(dose).untrained() if quick else world(dose)
        make_models(one, seed, conditions[dose].models(seed))

    return carry_out(sweep.quick() if quick else sweep, prepare, seeds, quick=quick)


def against_entropy(results: Results, panel: Axes) -> None:
    """One dot for each dose and seed."""
    for number, value in enumerate(results.values):
        of_seeds = advantage(results, value, FORWARD_KL, "equal_steps")
        models = results.models.get(f"{value:g}", {})
        dots = [
            (entropy, 100 * of_seeds[int(seed)])
            for seed, one in models.items()
            if (entropy := one[ENTROPY]) is not None
        ]
        panel.scatter(*zip(*dots, strict=True) if dots else ([], []), color=f"C{number}", s=18)
        panel.scatter([], [], color=f"C{number}", s=18, label=f"noticed {value:g}")
    panel.axhline(0, color="black", linewidth=0.8)
    panel.set(
        title="forward KL, equal steps: each seed",
        xlabel="teacher's entropy after an error, nats per token",
        ylabel="TRD − OPD",
    )
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)


def draw(results: Results, path: Path) -> None:
    plot(
        results,
        path,
        title="Does rewriting help most where the teacher is of two minds after an error?",
        quantity="how often an error is taken back in the teacher's texts",
        moments=[("equal_steps", "equal steps"), ("equal_tokens", "equal tokens")],
        last=against_entropy,
    )


def write(results: Results, out: Path) -> None:
    """`out`/tables.md, points.csv and dose.svg."""
    (out / "tables.md").write_text(tables(results, CONTRAST))
    (out / "points.csv").write_text(points(results))
    draw(results, out / "dose.svg")


def main(arguments: Sequence[str] | None = None) -> None:
    command(arguments, __doc__, "dose", SEEDS, run, Results.read, write)


if __name__ == "__main__":
    main()
