"""Length: does the advantage of trajectory refinement grow with the text after an error?

    python benchmarks/prefix_length.py           # 5 seeds, hours on two cores
    python benchmarks/prefix_length.py --quick   # untrained models, 1 seed, few steps: does it run?
    python benchmarks/prefix_length.py --from FILE    # tables and plots of kept results

Problems have 3, 6, 12 or 24 products; their solutions 38, 80, 164 and 332 tokens. A seed has one
teacher, which learns all lengths and serves them all. A student has the teacher's shape, since one
of two layers does not learn 24 products, and never sees a rewrite. Its training is the same for all
lengths too, but for where it stops: when a sample is exactly right with probability 0.4 at its own
length. So the share of wrong rollouts is comparable, and the error rate per step falls with the
length, as 1 - 0.4^(1/steps). A training step has 64, 32, 16 or 8 prompts: as many tokens at every
length. A method that rewrites has 24 steps, one that does not 48; everything else is as in
prefix_dose.py.

Written before the first run:

    prediction    The advantage of TRD over OPD under forward KL grows with the number of tokens
                  after an error, at equal steps and at equal tokens. Under JSD, and against OPD
                  with reverse KL, it does not.
    first test    advantage at 24 products minus that at 3, forward KL, equal steps; one number a
                  seed, two-sided t-test that its mean is 0
    second test   that number of forward KL minus the one of JSD
    third test    Spearman's correlation of the advantage (forward KL, equal steps) with the
                  measured number of tokens after an error, over the lengths of a seed; two-sided
                  t-test over seeds that its mean is 0
    adjusted p    by Holm, for these tests and for the first and the third of JSD
    exclusions    a seed of which a model misses its gates at any length is left out at all of them,
                  and the next number takes its place; nothing else is left out

Everything is written to `--output`: models, runs, length.json (of which tables and plots are made),
points.csv, tables.md and length.svg. What is there is kept, so an interrupted command goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:  # where this file is imported and not run
    sys.path.insert(0, str(HERE))

from comparison.advantage import Contrast  # noqa: E402
from comparison.command import command  # noqa: E402
from comparison.jobs import Condition, in_process, make_models  # noqa: E402
from comparison.models import Texts, World, make_model  # noqa: E402
from comparison.sweep import Results, Sweep, carry_out  # noqa: E402
from comparison.sweep_page import plot, points, tables  # noqa: E402

from nemo_trd.toy.warm_start import TEACHER  # noqa: E402

PRODUCTS = (3, 6, 12, 24)
TOKENS_PER_STEP = 2560  # about; 7 (2 n - 1) + 3 in a solution of n products
METHODS = ("opd_forward_kl", "opd_reverse_kl", "opd_jsd", "trd", "trd_jsd")
CONTRAST = Contrast("at 24 products minus at 3", {24: 1.0, 3: -1.0}, "tokens_after_error")
SEEDS = 5


def rows(kind: str, counts: Sequence[int]) -> dict[str, int]:
    """Rows of a kind in a batch, for each number of products."""
    return {f"{kind}@{products}": n for products, n in zip(PRODUCTS, counts, strict=True)}


TEACHER_OF_ALL = replace(
    TEACHER,
    shares={
        **rows("solve", (4, 3, 2, 2)),
        **rows("recover", (6, 4, 2, 2)),
        **rows("rewrite", (4, 3, 2, 2)),
    },
    gates={
        f"{kind}@{products}": gate
        for products in reversed(PRODUCTS)  # the longest are learnt last
        for kind, gate in {"solve": 0.95, "rewrite": 0.95, "notice": 0.4}.items()
    },
    held_out=64,
    max_steps=1500,
    cooling_from=0.5,
    before=replace(
        TEACHER,
        shares={"solve@3": 12, "recover@3": 16, "rewrite@3": 12},
        gates={"solve@3": 0.9, "rewrite@3": 0.9},
    ),
)


def world(products: int) -> World:
    """Models of a length; the teacher is that of all."""
    student = replace(
        TEACHER_OF_ALL,
        shares={**rows("solve", (8, 4, 3, 2)), **rows("recover", (4, 2, 1, 1))},
        gates={f"solve@{products}": 0.4},
        check_interval=5,
        before=replace(
            TEACHER,
            shares={"solve@3": 24, "recover@3": 8},
            gates={"solve@3": 0.3},
            check_interval=5,
        ),
    )
    return World(student, TEACHER_OF_ALL, Texts(labels=max(PRODUCTS)), products)


def condition(root: Path, products: int) -> Condition:
    """Runs of a length: a quarter more room than a solution needs, for what is taken back."""
    solution = 7 * (2 * products - 1) + 3
    tokens = 5 * solution // 4
    return Condition(
        root / f"products_{products}",
        budget=24,
        evaluations=2,
        k=4,
        tuning_k=4,
        settings=(
            f"train.prompts_per_step={8 * round(TOKENS_PER_STEP / solution / 8)}",
            *(f"generation.{what}.max_tokens={tokens}" for what in ("rollout", "refinement")),
            f"data.max_prompt_tokens={5 * products + 20}",
            f"refinement.max_context_tokens={tokens + 5 * products + 40}",
            "logging.samples_interval=5",
        ),
    )


def run(root: Path, seeds: int, quick: bool) -> Results:
    conditions = {products: condition(root, products) for products in PRODUCTS}
    problems = {"development": 64, "test": 64}
    sweep = Sweep("products", METHODS, conditions, {n: n for n in PRODUCTS}, problems)

    def prepare(products: int, seed: int) -> None:
        one = world(products).untrained() if quick else world(products)
        models = conditions[products].models(seed)
        teacher = root / "teachers" / str(seed)
        arguments = (teacher, "teacher", seed, one.teacher, one.texts)
        in_process(make_model, arguments, teacher.with_name(f"{seed}.log"))
        models.mkdir(parents=True, exist_ok=True)
        if not (models / "teacher").is_symlink():
            (models / "teacher").symlink_to(teacher)
        make_models(one, seed, models)

    return carry_out(sweep.quick() if quick else sweep, prepare, seeds, quick=quick)


def draw(results: Results, path: Path) -> None:
    plot(
        results,
        path,
        title="Does rewriting help more where more text follows an error?",
        quantity="products in a problem",
        moments=[
            ("equal_steps", "equal steps"),
            ("equal_tokens", "equal tokens"),
            ("equal_seconds", "equal seconds"),
        ],
        scale="log",
    )


def write(results: Results, out: Path) -> None:
    """`out`/tables.md, points.csv and length.svg."""
    (out / "tables.md").write_text(tables(results, CONTRAST))
    (out / "points.csv").write_text(points(results))
    draw(results, out / "length.svg")


def main(arguments: Sequence[str] | None = None) -> None:
    command(arguments, __doc__, "length", SEEDS, run, Results.read, write)


if __name__ == "__main__":
    main()
