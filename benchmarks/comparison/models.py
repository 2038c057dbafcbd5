"""Students, teachers and problems of the comparison, one pair of models for each seed.

They are the toy task's (nemo_trd/toy), but for a student that also follows a solution it is shown,
so that it can be its own teacher in OPSD.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from nemo_trd.toy import task, warm_start
from nemo_trd.toy.warm_start import STUDENT, TEACHER, Recipe

FOLLOWING_STUDENT = replace(
    STUDENT,
    shares={"solve": 24, "recover": 8, "follow": 2, "follow_attempt": 6},
    gates={"solve": 0.4, "follow": 0.9, "follow_attempt": 0.9},
    before=replace(
        STUDENT,
        shares={"follow": 8, "follow_attempt": 16},
        gates={"follow": 0.95, "follow_attempt": 0.95},
        check_interval=10,
    ),
)
PROBLEMS = {"development": 200, "test": 200}


def untrained(recipe: Recipe) -> Recipe:
    """For a look at the machinery: two steps, and no gates."""
    before = recipe.before and untrained(recipe.before)
    return replace(recipe, max_steps=2, gates={}, held_out=2, check_interval=1, before=before)


def make_models(out: Path, seed: int, quick: bool) -> None:
    """Write `out`/student, `out`/teacher and `out`/train.jsonl, unless they are there.

    Raises:
        RuntimeError: a model did not pass its gates.
    """
    torch.set_num_threads(1)
    student, teacher = FOLLOWING_STUDENT, TEACHER
    if quick:
        student, teacher = untrained(student), untrained(teacher)
    warm_start.make(out, seed, student, teacher)


def write_problems(out: Path) -> None:
    """`out`/development.jsonl and `out`/test.jsonl: different problems, neither in training."""
    problems = task.examples("validation", sum(PROBLEMS.values()), seed=1)
    for name, count in PROBLEMS.items():
        lines = [json.dumps(problem) + "\n" for problem in problems[:count]]
        (out / f"{name}.jsonl").write_text("".join(lines))
        problems = problems[count:]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("seed", type=int)
    parser.add_argument("--quick", action="store_true", help="models that can do little")
    given = parser.parse_args()
    make_models(given.directory, given.seed, quick=given.quick)
