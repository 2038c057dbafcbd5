"""Dose and response: is the teacher's doubt after an error what trajectory refinement repairs?

    python benchmarks/prefix_dose.py             # 8 seeds, some 3 hours on two cores
    python benchmarks/prefix_dose.py --quick     # untrained models, 1 seed, few steps: does it run?
    python benchmarks/prefix_dose.py --from docs/comparison/dose.json --output DIR

The dose is how often a wrong number is taken back in the texts that student and teacher learn from:
DOSES. At 0.5 the teacher is of two minds about every error of the student; at 0.05 and 0.95 it
nearly knows how the text goes on. Each dose and seed has a student, a teacher and prompts of its
own, made before any method runs. METHODS are trained with the same budget, and each has the learning
rate that is best for it at that dose on other problems and seeds (comparison/jobs.py `tune`).

Written before the first run:

    prediction    The advantage of TRD over OPD under forward KL follows the teacher's entropy after
                  an error: it is largest at 0.5 and vanishes at 0.05 and 0.95. Under JSD, and against
                  OPD with reverse KL, it is flat.
    first test    advantage at 0.5 minus the mean of those at 0.05 and 0.95, forward KL, equal steps;
                  one number a seed, two-sided t-test that its mean is 0
    second test   the same number of forward KL minus that of JSD
    third test    Spearman's correlation of the advantage (forward KL, equal steps) with the
                  teacher's measured entropy after an error, over the doses of a seed; two-sided
                  t-test over seeds that its mean is 0
    exclusions    a seed of which a model misses its gates at any dose is left out at all of them,
                  and the next number takes its place; nothing else is left out

Everything is written to `--output`: models, runs, dose.json (which the tables and plots are made
of), points.csv, tables.md and dose.svg. What is there is kept, so an interrupted command goes on.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:  # where this file is imported and not run
    sys.path.insert(0, str(HERE))

from comparison.models import Texts, World  # noqa: E402

from nemo_trd.toy.warm_start import STUDENT, TEACHER  # noqa: E402

DOSES = (0.05, 0.25, 0.5, 0.75, 0.95)
METHODS = ("opd_forward_kl", "opd_reverse_kl", "opd_jsd", "trd", "trd_jsd")


def world(dose: float) -> World:
    """Models of a dose. The teacher notices errors nearly as often as its texts do."""
    teacher = replace(TEACHER, gates={**TEACHER.gates, "notice": round(0.8 * dose, 3)})
    return World(STUDENT, teacher, Texts(noticed=dose))
