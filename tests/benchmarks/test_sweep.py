"""Sweeps over one quantity of the toy task: what is made of the results of their runs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from scipy import stats
from scripts import load_script

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ENTROPY = {0.05: 0.01, 0.25: 0.03, 0.5: 0.05, 0.75: 0.03, 0.95: 0.01}


@pytest.fixture(scope="module")
def dose() -> Any:
    return load_script(BENCHMARKS / "prefix_dose.py")


@pytest.fixture
def results(dose: Any) -> Any:
    """Forward KL gains 4 points for each hundredth of entropy beyond the first, JSD always 2."""
    from comparison.sweep import Results

    rng = random.Random(0)
    points, models = [], {}
    for value, entropy in ENTROPY.items():
        for seed in range(4):
            models.setdefault(f"{value:g}", {})[str(seed)] = {"entropy_after_error": entropy}
            gain = {"trd": 4 * (entropy - 0.01), "trd_jsd": 0.02}
            for method in dose.METHODS:
                longer = 1 if method.startswith("trd") else 2
                for part in (0, 1, 2, 3, 4):
                    step = 15 * longer * part
                    avg = 0.5 + 0.001 * step + gain.get(method, 0) * bool(part)
                    avg += 0.001 * rng.random() * bool(part)
                    seconds = step * (2.0 + seed if longer == 1 else 1.0 + seed)
                    points.append([value, method, seed, step, avg, 0.9, 100 * step, seconds])
    tried = {"0.003": {"30": [0.7], "60": [0.8, 0.9]}, "0.01": {"30": [0.6], "60": [0.75]}}
    one = {"lr": 0.003, "steps": 60, "tried": tried}
    chosen = {f"{v:g}": dict.fromkeys(dose.METHODS, one) for v in ENTROPY}
    return Results(
        **{"quantity": "noticed", "methods": [*dose.METHODS], "values": [*ENTROPY]},
        **{"seeds": [0, 1, 2, 3], "excluded": {}, "budget": 60, "k": 16, "chosen": chosen},
        **{"models": models, "points": points, "minutes": 1.0, "machine": "a test"},
    )


def test_advantages_are_at_equal_steps_tokens_and_seconds(dose: Any, results: Any) -> None:
    from comparison.advantage import FORWARD_KL, REVERSE_KL, advantage

    # TRD has 60 steps: 0.16 for the entropy. OPD goes on to 120, and in TRD's time too.
    for moment, lost in (("equal_steps", 0.0), ("equal_tokens", 0.06), ("equal_seconds", 0.06)):
        found = advantage(results, 0.5, FORWARD_KL, moment)
        assert [*found] == [0, 1, 2, 3]
        assert [*found.values()] == pytest.approx([0.16 - lost] * 4, abs=0.0021)
    assert advantage(results, 0.05, REVERSE_KL, "equal_steps")[0] == pytest.approx(0, abs=0.0021)


def test_the_named_tests_find_what_was_put_in(dose: Any, results: Any) -> None:
    from comparison import advantage, figures

    found = [*advantage.named_tests(results, dose.CONTRAST).values()]
    middle, jsd, both, correlation, _ = found
    assert middle.mean == pytest.approx(16, abs=0.2) and middle.p < 0.001
    assert jsd.mean == pytest.approx(0, abs=0.2)
    assert both.mean == pytest.approx(16, abs=0.3)
    assert correlation.mean > 0.9
    for one in results.models.values():
        one["3"] = {"entropy_after_error": None}  # no wrong rollout among its samples, say
    assert "3 of 4 seeds" in [*advantage.named_tests(results, dose.CONTRAST)][3]
    results.models.update(
        {value: dict.fromkeys("0123", {"entropy_after_error": None}) for value in results.models}
    )
    without = advantage.named_tests(results, dose.CONTRAST)
    lost = "rank correlation with the entropy after error, forward KL (0 of 4 seeds)"
    assert without[lost] is None
    adjusted = 5 * without["advantage in the middle minus at the ends, forward KL, points"].p
    lines = figures.tests_table(without).splitlines()
    assert f"| {lost} |  |  |  |" in lines and lines[2].endswith(f" | {adjusted:.2g} |")
    contrast = advantage.contrast(results, dose.CONTRAST.weights, advantage.FORWARD_KL)
    assert middle.p == pytest.approx(stats.ttest_1samp(contrast, 0).pvalue)


def test_kept_results_give_the_same_tables_and_a_plot(
    dose: Any, results: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from comparison.sweep_page import tables

    results.write(tmp_path / "kept.json")
    assert json.loads((tmp_path / "kept.json").read_text())["points"] == results.points
    dose.main(["--from", str(tmp_path / "kept.json"), "--output", str(tmp_path / "out")])
    text = (tmp_path / "out" / "tables.md").read_text()
    assert text == tables(results, dose.CONTRAST) and text in capsys.readouterr().out
    assert "| forward KL | equal steps | +0." in text
    assert "| TRD | 0.01 | 60.0 / 75.0 |" in text
    assert "| advantage in the mean of all, forward KL | +6.4 ± 0." in text  # points
    assert "<svg" in (tmp_path / "out" / "dose.svg").read_text()
    lines = (tmp_path / "out" / "points.csv").read_text().splitlines()
    assert lines[0].startswith("noticed,method,seed,step") and len(lines) == 501


def test_a_seed_that_misses_a_gate_is_replaced_everywhere_and_told(
    dose: Any, tmp_path: Path
) -> None:
    from comparison.jobs import Condition
    from comparison.sweep import Sweep, complete_seeds

    conditions = {value: Condition(tmp_path / f"{value:g}") for value in (1.0, 2.0, 3.0)}
    sweep = Sweep("x", (), conditions, {}, {})

    def prepare(value: float, seed: int) -> None:
        for role in ("student", "teacher"):
            directory = conditions[value].models(seed) / role
            directory.mkdir(parents=True)
            bad = (value, role) == (2.0, "teacher") and (seed == 1 or seed > 9)
            made = {"missed": ["notice"] if bad else []}
            (directory / "made.json").write_text(json.dumps(made))

    assert complete_seeds(sweep, prepare, 0, 3) == ([0, 2, 3], {"1": ["2: teacher notice"]})
    assert conditions[1.0].models(1).exists() and not conditions[3.0].models(1).exists()
    with pytest.raises(RuntimeError, match="too many seeds .*'12': .*teacher notice"):
        complete_seeds(sweep, prepare, 10, 2)  # and not for ever


def test_models_of_all_lengths_are_measured_at_each_of_them() -> None:
    length = load_script(BENCHMARKS / "prefix_length.py")
    for products in length.PRODUCTS:
        world = length.world(products)
        of_student, of_teacher = (
            {*recipe.shares, *recipe.gates} for recipe in (world.student, world.teacher)
        )
        assert f"solve@{products}" in of_student
        assert {f"{kind}@{products}" for kind in ("solve", "rewrite", "notice")} <= of_teacher
