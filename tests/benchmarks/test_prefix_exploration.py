"""benchmarks/prefix_exploration.py: what is counted in samples, and what the tables make of it."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scripts import load_script

from nemo_trd.toy import task
from nemo_trd.toy.derivations import ORDERS, solution

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FACTORS = ((3, 5), (4, 2), (5, 6))


@pytest.fixture(scope="module")
def benchmark() -> Any:
    return load_script(BENCHMARKS / "prefix_exploration.py")


@pytest.fixture(scope="module")
def coverage(benchmark: Any) -> Any:
    from comparison import coverage

    return coverage


@pytest.fixture(scope="module")
def page(benchmark: Any) -> Any:
    from comparison import coverage_page

    return coverage_page


def test_expected_numbers_are_means_over_all_choices_of_samples(coverage: Any) -> None:
    kinds = "aaabb---"  # three of a, two of b, three of none
    counts, samples = (3, 2, 0), len(kinds)
    for k in range(1, samples + 1):
        chosen = [*itertools.combinations(kinds, k)]
        distinct = [len({*some} - {"-"}) for some in chosen]
        found = coverage.expected_distinct(counts, samples, k)
        assert found == pytest.approx(sum(distinct) / len(chosen))
    problem = coverage.Counts(samples, 6, counts)
    figures = coverage.figures([problem])
    passed = [any(kind != "-" for kind in some) for some in itertools.combinations(kinds, 2)]
    assert figures["pass@2"] == pytest.approx(sum(passed) / len(passed))
    assert figures["answer@1"] == pytest.approx(6 / samples)


def test_figures_are_means_over_problems_that_bear_them(coverage: Any) -> None:
    even, one_sided = (8, 8, 0, 0, 0, 0), (30, 0, 0, 2, 0, 0)
    problems = [
        coverage.Counts(32, 20, even),
        coverage.Counts(32, 32, one_sided),
        coverage.Counts(32, 3, (0, 1, 0, 0, 0, 0)),
        coverage.Counts(32, 0, (0,) * 6),
    ]
    found = coverage.figures(problems)
    assert found["pass@1"] == pytest.approx((16 + 32 + 1 + 0) / 4 / 32)
    assert found["answer@32"] == pytest.approx(3 / 4)
    assert found["distinct@32"] == pytest.approx((2 + 2 + 1 + 0) / 4)
    assert found["common"] == pytest.approx((1 / 2 + 30 / 32 + 0) / 3)
    p = 2 / 32
    one = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert found["entropy"] == pytest.approx((math.log(2) + one + 0) / 3)
    assert found["guessed"] == pytest.approx((4 / 20 + 0 + 2 / 3) / 3)
    # Two problems have 16 right samples. Of 16 of 32 the two rare ones are absent in 15/31 of 1/2.
    assert found["enough"] == 0.5
    assert found["distinct_of_right@16"] == pytest.approx((2 + 2 - 0.5 * 15 / 31) / 2)
    assert "distinct_of_right@32" not in found
    assert coverage.order_shares(problems) == pytest.approx([38 / 49, 9 / 49, 0, 2 / 49, 0, 0])
    nothing = coverage.figures(problems[3:])
    assert nothing["pass@32"] == nothing["enough"] == 0
    assert not {"entropy", "common", "guessed", "distinct_of_right@16"} & nothing.keys()
    assert coverage.order_shares(problems[3:]) == [0.0] * 6


def test_samples_are_counted_by_problem_and_order(coverage: Any, tmp_path: Path) -> None:
    other = ((1, 2), (3, 4), (5, 6))
    problems = tmp_path / "problems.jsonl"
    lines = [json.dumps({"problem": task.problem_text(one)}) + "\n" for one in (FACTORS, other)]
    problems.write_text("".join(lines))
    texts = {
        0: [solution(FACTORS, ORDERS[0]), solution(FACTORS, ORDERS[4]), "#### 4"],
        1: [solution(other, ORDERS[5]), solution(other, ORDERS[5]), solution(FACTORS, ORDERS[0])],
    }
    samples = [
        {"problem": index, "text": text, "correct": text.endswith(("#### 4", "#### 2"))}
        for index in (1, 0)
        for text in texts[index]
    ]
    text = "".join(json.dumps(sample) + "\n" for sample in samples)
    (tmp_path / "samples.jsonl").write_text(text)
    assert task.answer(other) == "2"
    assert coverage.read_samples(tmp_path, problems) == (
        coverage.Counts(3, 3, (1, 0, 0, 0, 1, 0)),
        coverage.Counts(3, 3, (0, 0, 0, 0, 0, 2)),
    )


def test_rewrites_are_judged_by_the_order_of_the_attempt(coverage: Any, tmp_path: Path) -> None:
    first, second = (solution(FACTORS, order) for order in ORDERS[:2])
    wrong = first.replace("= 4", "= 5")
    pairs = [(first, first), (second, second), (first, second), (second, wrong)]
    pairs += [(wrong, first), (wrong, wrong)]
    samples = [
        {
            "problem": task.problem_text(FACTORS),
            "rollout": {"text": attempt},
            "refinement": {"text": rewrite},
        }
        for attempt, rewrite in pairs
    ]
    samples += [{**samples[0], "refinement": None}]  # trained on the rollout
    (tmp_path / "samples").mkdir()
    text = "".join(json.dumps(sample) + "\n" for sample in samples)
    (tmp_path / "samples" / "step_1.jsonl").write_text(text)
    assert coverage.rewrites(tmp_path) == {"order_kept": 0.5, "repaired": 0.5}
    assert coverage.rewrites(tmp_path / "nothing") == {"order_kept": None, "repaired": None}


@pytest.fixture
def exploration(benchmark: Any, coverage: Any, page: Any) -> Any:
    """Two seeds; TRD is right twice as often as the student, with the free teacher in any order."""
    rng = random.Random(0)

    def problem(right: int, even: bool) -> Any:
        weights = [1] * 6 if even else benchmark.STUDENT_ORDERS
        drawn = rng.choices(range(6), weights, k=right)
        by_order = tuple(drawn.count(order) for order in range(6))
        return coverage.Counts(64, right + 1, by_order)

    def results(kept: float) -> Any:
        even = ("teacher",) if kept else ("teacher", "trd")
        sampled = [
            coverage.Sampled(
                name,
                seed,
                0 if name in ("student", "teacher") else 60,
                1000 * (seed + 1),
                4.0 - seed,
                tuple(problem(60 if name == "trd" else 30, name in even) for _ in range(200)),
            )
            for seed in (3, 1)
            for name in page.TITLES
        ]
        chosen = {method: {"lr": 0.003} for method in benchmark.NAMES}
        models = {"3": {"order_kept": kept}, "1": {"order_kept": None}}
        return coverage.Results(kept, [3, 1], 64, chosen, models, sampled)

    excluded = {"0": ["1: teacher solve"]}
    return coverage.Exploration([results(kept) for kept in benchmark.KEPT], excluded, 1.0, "none")


def test_tables_points_and_plot_are_made_of_the_kept_file_alone(
    benchmark: Any, coverage: Any, page: Any, exploration: Any, tmp_path: Path
) -> None:
    kept = tmp_path / "kept.json"
    exploration.write(kept)
    assert coverage.Exploration.read(kept) == exploration
    benchmark.main(["--from", str(kept), "--output", str(tmp_path / "out")])
    tables = (tmp_path / "out" / "tables.md").read_text()
    assert tables == page.tables(exploration, benchmark.tests(exploration))
    assert tables.count("| TRD | 93.8 ± 0.0 | 100.0 ± 0.0 |") == 2
    assert tables.count("| student, before training | +46.9 ± 0.0 |") == 2
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "points.csv").read_text())))
    assert [(row["name"], row["seed"]) for row in rows[:2]] == [("student", "3"), ("student", "1")]
    assert [row["kept"] for row in rows] == ["1.0"] * 14 + ["0.0"] * 14
    assert {row["pass@1"] for row in rows if row["name"] == "trd"} == {str(60 / 64)}
    assert "<svg" in (tmp_path / "out" / "exploration.svg").read_text()


def test_tests_tell_accuracy_from_more_derivations(
    benchmark: Any, page: Any, exploration: Any
) -> None:
    """Among 64 samples TRD has more of them in any case, among right ones with one teacher only."""
    keeping, free = (page.measured(results) for results in exploration.results)
    for found in (keeping, free):
        assert page.difference(found, "student", "distinct@64").mean > 0.5
    level, more = (page.difference(f, "student", "distinct_of_right@16") for f in (keeping, free))
    assert abs(level.mean) < 0.1 and more.mean > 1
    assert [*benchmark.tests(exploration).values()] == [
        level,
        page.difference(keeping, "trd_mixed", "distinct@64"),
        page.difference(keeping, "opd_tokens", "distinct@64"),
        more,
        page.difference(free, "trd_mixed", "distinct_of_right@16"),
    ]
    # Where a model bears no figure in one seed, nothing is compared, and the table has a gap.
    del keeping["student"][1]["entropy"]
    assert page.difference(keeping, "student", "entropy") is None
    assert page.column(keeping, "student", "entropy") is None


def test_every_method_is_sampled_after_as_many_steps_and_after_as_many_tokens(
    benchmark: Any, page: Any, tmp_path: Path
) -> None:
    condition = benchmark.condition(tmp_path, False)
    assert (condition.budget, condition.settings) == (60, ("checkpoint.save_interval=60",))
    names = {"student", "teacher"}
    for method in benchmark.NAMES:
        job = condition.job(method, benchmark.METHODS[method], 7, 1e-3)
        job.directory.mkdir(parents=True)
        lines = [{"step": step, "generated_tokens": 10} for step in range(1, job.steps + 1)]
        evaluations = [{"step": step, "avg@1": 0.5, "pass@1": 0.5} for step in (0, 60, job.steps)]
        for name, its_lines in (("metrics", lines), ("evaluation", evaluations)):
            text = "".join(json.dumps(line) + "\n" for line in its_lines)
            (job.directory / f"{name}.jsonl").write_text(text)
        models = benchmark.models_of_run(job, 60)
        steps = [60, 120] if method == "opd_forward_kl" else [60]
        assert [model.point.generated_tokens for model in models] == [10 * step for step in steps]
        assert [model.point.step for model in models] == steps
        assert [model.path.name for model in models] == [f"step_{step:08d}" for step in steps]
        assert len({model.samples for model in models}) == len(steps)
        names |= {model.name for model in models}
    assert names == page.TITLES.keys()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_quick_makes_everything_and_a_second_start_does_nothing_again(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "prefix_exploration.py"), "--quick"]
    command += ["--output", str(tmp_path)]
    written = tmp_path / "quick"
    subprocess.run(command, check=True, timeout=900)
    names = {"exploration.json", "tables.md", "points.csv", "exploration.svg"}
    assert {file.name for file in written.iterdir()} >= names
    kept = {file: file.stat().st_mtime_ns for file in written.rglob("samples.jsonl")}
    assert len(kept) == 14
    subprocess.run(command, check=True, timeout=900)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
