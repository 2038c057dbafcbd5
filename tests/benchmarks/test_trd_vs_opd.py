"""benchmarks/trd_vs_opd.py: what it runs, and what it makes of the records of its runs."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from scipy import stats
from scripts import load_script
from transformers import AutoModelForCausalLM

from nemo_trd.config.load import compose
from nemo_trd.toy import task

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> Any:
    return load_script(BENCHMARKS / "trd_vs_opd.py")


@pytest.fixture(scope="module")
def results(benchmark: Any) -> Any:
    from comparison import results

    return results


@pytest.fixture(scope="module")
def methods(benchmark: Any) -> dict[str, Any]:
    return yaml.safe_load(benchmark.METHODS.read_text())


@pytest.fixture
def job(benchmark: Any, methods: dict[str, Any], tmp_path: Path) -> Callable[..., Any]:
    def make(method: str, budget: int = 60) -> Any:
        condition = benchmark.Condition(tmp_path, budget=budget)
        return condition.job(method, methods[method], 3, 1e-3)

    return make


def test_methods_differ_in_what_they_say_they_do_and_in_nothing_else(
    job: Callable[..., Any], methods: dict[str, Any]
) -> None:
    reference = compose(job("trd").overrides()).model_dump()
    for method, described in methods.items():
        if method == "trd":
            continue
        settings = compose(job(method).overrides()).model_dump()
        named = {setting.split("=")[0] for setting in described["settings"]}
        expected = {"run.dir", *named}
        if not described.get("refines"):  # twice the steps, so that as much is generated
            expected |= {"train.num_steps", "evaluation.interval", "logging.samples_interval"}
            expected |= {"optimizer.warmup_fraction"}
        # model.teacher.path=null leaves no teacher at all
        expected = {name.replace("teacher.path", "teacher") for name in expected}
        assert differing(reference, settings) == expected, method


def differing(a: Any, b: Any, name: str = "") -> set[str]:
    """Dotted names of what two trees of settings do not share."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return set() if a == b else {name.removeprefix(".")}
    return set().union(*(differing(a[key], b[key], f"{name}.{key}") for key in a))


def test_all_are_evaluated_at_equal_steps_and_at_equal_tokens(
    job: Callable[..., Any], methods: dict[str, Any]
) -> None:
    for method, described in methods.items():
        one = job(method, budget=60)
        answers = 2 if described.get("refines") else 1
        assert one.steps * answers == 120
        assert 60 % one.interval == 0 and one.steps % one.interval == 0
        warm_up = compose(one.overrides()).optimizer.warmup_fraction * one.steps
        assert warm_up == pytest.approx(6)


def test_settings_were_chosen_for_every_method_among_those_that_are_tried(
    benchmark: Any, methods: dict[str, Any]
) -> None:
    from comparison.jobs import LEARNING_RATES, Condition

    chosen = yaml.safe_load(benchmark.CHOSEN.read_text())
    assert chosen.keys() == methods.keys()
    for method, setting in chosen.items():
        longest = Condition.budget * (1 if methods[method].get("refines") else 2)
        assert setting["lr"] in LEARNING_RATES
        assert 0 < setting["steps"] <= longest


def test_no_problem_serves_two_ends(benchmark: Any, tmp_path: Path) -> None:
    from comparison.models import write_problems, write_prompts

    write_problems(tmp_path, benchmark.PROBLEMS)
    drawn = {
        name: [json.loads(line)["problem"] for line in (tmp_path / f"{name}.jsonl").open()]
        for name in benchmark.PROBLEMS
    }
    assert {name: len(set(problems)) for name, problems in drawn.items()} == benchmark.PROBLEMS
    write_prompts(tmp_path, seed=3)
    prompts = [json.loads(line)["problem"] for line in (tmp_path / "train.jsonl").open()]
    assert {task.split_of(task.read_problem(problem)) for problem in prompts} == {"train"}
    assert not set(drawn["development"]) & set(drawn["test"])
    for problem in drawn["development"] + drawn["test"]:
        factors = task.read_problem(problem)
        assert factors is not None and task.split_of(factors) == "validation"


def test_tokens_and_seconds_are_those_of_all_steps_so_far(results: Any, tmp_path: Path) -> None:
    steps = [
        {"step": 1, "generated_tokens": 10, "seconds/rollout": 1.0, "seconds/step": 9.0},
        {"step": 2, "generated_tokens": 20, "seconds/student": 2.0, "seconds/evaluation": 50.0},
        {"step": 3, "generated_tokens": 40, "seconds/weight_sync": 4.0, "seconds/teacher": 8.0},
    ]
    evaluations = [{"step": n, "avg@4": n / 10, "pass@4": n / 5} for n in (0, 2, 3)]
    for name, lines in (("metrics", steps), ("evaluation", evaluations)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    points = results.read_run(tmp_path, "trd", 7, 4)
    assert [(p.step, p.avg, p.passed) for p in points] == [(0, 0, 0), (2, 0.2, 0.4), (3, 0.3, 0.6)]
    assert [p.generated_tokens for p in points] == [0, 30, 70]
    assert [p.seconds for p in points] == [0, 3.0, 15.0]
    assert {(p.method, p.seed) for p in points} == {("trd", 7)}
    rows = list(csv.DictReader(io.StringIO(results.as_csv(points))))
    assert [row["generated_tokens"] for row in rows] == ["0", "30", "70"]


def test_intervals_and_p_are_those_of_students_t_over_pairs(results: Any) -> None:
    a, b = [0.81, 0.75, 0.90, 0.84, 0.79], [0.70, 0.74, 0.81, 0.80, 0.77]
    reference = stats.ttest_rel(a, b)
    bounds = reference.confidence_interval(0.95)
    points = [
        [results.Point("m", seed, 1, avg, 1.0, 0, 0.0) for seed, avg in enumerate(values)]
        for values in (a, b)
    ]
    found = results.interval(results.differences(points[0], reversed(points[1])), True)
    assert found.mean - found.half_width == pytest.approx(bounds.low)
    assert found.mean + found.half_width == pytest.approx(bounds.high)
    assert found.p == pytest.approx(reference.pvalue)
    assert results.interval([0.5]).half_width is None
    assert results.interval([0.1, 0.1], of_difference=True).p is None
    with pytest.raises(ValueError, match=r"\[0, 1, 2, 3, 4\] cannot be paired with .*\[0, 1\]"):
        results.differences(points[0], points[1][:2])


def test_what_the_models_can_do_is_read_from_warm_start_run_and_prefix_failure(
    results: Any, tmp_path: Path
) -> None:
    accuracy = {
        "student": {"solve": 0.4},
        "teacher": {"solve": 0.98, "rewrite": 0.97, "notice": 0.5},
    }
    for role, reached in accuracy.items():
        made = {"accuracy": reached, "seconds": 10.0}
        (tmp_path / role).mkdir()
        (tmp_path / role / "made.json").write_text(json.dumps(made))
    verdicts = [(3, 1, 5, 0), (5, 1, 4, 1)]  # of two steps, in the order of VERDICTS
    lines = [dict(zip(results.VERDICTS, counts, strict=True)) for counts in verdicts]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    estimate = {"mean": 0.0, "low": None, "high": None}

    def part(token_share: float, **means: float) -> dict[str, Any]:
        shares = {name: {**estimate, "mean": token_share + 0.2} for name in ("forward_kl", "jsd")}
        return {
            **{"trajectories": 2, "tokens": 9, "token_share": {**estimate, "mean": token_share}},
            **{"counts": {}, "gradient_share": shares, "hidden_gradient_share": {}},
            "means": {name: {**estimate, "mean": mean} for name, mean in means.items()},
        }

    def group(source: str, context: str, verdict: str, entropy: float) -> dict[str, Any]:
        parts = {
            "before": part(0.6, teacher_entropy=entropy),
            "after": part(0.4, teacher_entropy=10 * entropy, turn_back=0.2, two_peaked=0.3),
        }
        names = {"source": source, "teacher_context": context, "verdict": verdict}
        return {**names, "parts": parts}

    measured = {
        **{"student": "s", "teacher": "t", "mode": "opd", "teacher_context": "refine"},
        **{"divergence": "forward_kl", "beta": 0.5, "temperature": 1.0, "locator": "toy"},
        **{"confidence": 0.95, "resamples": 1, "counts": {}, "curves": []},
        "groups": [
            group("rollout", "prompt", "wrong", 0.01),
            group("rollout", "refine", "wrong", 7.0),
            group("rollout", "prompt", "right", 8.0),
            group("refinement", "prompt", "wrong", 0.002),
        ],
    }
    (tmp_path / "prefix_failure.json").write_text(json.dumps(measured))
    found = results.read_models(tmp_path, tmp_path)
    assert (found["student_solves"], found["teacher_solves"]) == (0.4, 0.98)
    assert (found["teacher_rewrites"], found["notices"]) == (0.97, 0.5)
    assert (found["repaired"], found["spoiled"]) == (0.8, 0.1)
    assert (found["entropy_before_error"], found["entropy_after_error"]) == (0.01, 0.1)
    assert found["entropy_of_rewrite"] == pytest.approx(0.02)
    assert (found["turns_back"], found["two_peaked"]) == (0.2, 0.3)
    assert found["tokens_after_error"] == 4.5
    for source in ("rollout", "rewrite"):
        assert found[f"share_of_tokens_after_error_in_{source}"] == 0.4
        assert found[f"share_of_gradient_jsd_after_error_in_{source}"] == pytest.approx(0.6)
        assert found[f"share_of_gradient_reverse_kl_after_error_in_{source}"] is None
    assert found["warm_start_seconds"] == 20.0
    # A student without a wrong rollout leaves gaps, and no error at the end of the comparison.
    (tmp_path / "prefix_failure.json").write_text(json.dumps({**measured, "groups": []}))
    right = dict(zip(results.VERDICTS, (0, 0, 5, 0), strict=True))
    (tmp_path / "metrics.jsonl").write_text(json.dumps(right) + "\n")
    found = results.read_models(tmp_path, tmp_path)
    assert (found["repaired"], found["spoiled"], found["turns_back"]) == (None, 0.0, None)
    # Models of several lengths were measured on each.
    for role, reached in accuracy.items():
        several = {f"{kind}@{n}": value / n for kind, value in reached.items() for n in (1, 2)}
        (tmp_path / role / "made.json").write_text(json.dumps({"accuracy": several, "seconds": 1}))
    found = results.read_models(tmp_path, tmp_path, products=2)
    assert (found["student_solves"], found["teacher_solves"]) == (0.2, 0.49)
    assert (found["teacher_rewrites"], found["notices"]) == (0.485, 0.25)


def test_holm_adjusts_as_in_a_worked_example(results: Any) -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04: times 4, 3, 2, 1, and no smaller than the one before.
    assert results.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert results.holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_row_compares_at_equal_steps_and_at_equal_tokens(
    benchmark: Any, methods: dict[str, Any], results: Any, tmp_path: Path
) -> None:
    """OPD is ahead after as many steps, and behind after as many tokens."""
    curves = {"opd_reverse_kl": {0: 0.4, 4: 0.7, 8: 0.72}, "trd": {0: 0.4, 2: 0.6, 4: 0.8}}
    points = [
        results.Point(method, seed, step, avg + seed * 0.01, 0.9, 100 * step, 2.0 * step)
        for method, curve in curves.items()
        for seed in (0, 1)
        for step, avg in curve.items()
    ]
    chosen = {"opd_reverse_kl": {"lr": 0.1, "steps": 4}, "trd": {"lr": 0.2, "steps": 2}}
    opd, trd = benchmark.rows_of(points, {m: methods[m] for m in curves}, chosen, budget=4)
    assert opd["trd_minus_equal_steps"].mean == pytest.approx(0.1)
    assert opd["trd_minus_equal_tokens"].mean == pytest.approx(0.08)
    assert opd["trd_minus_chosen_steps"].mean == pytest.approx(-0.1)
    assert opd["equal_steps"].mean == pytest.approx(0.705)
    assert opd["equal_tokens"].mean == pytest.approx(0.725)
    assert (opd["tokens"], opd["seconds"], trd["tokens"]) == (800, 16.0, 400)
    assert trd["trd_minus_equal_steps"] is None
    shown = benchmark.table([opd, trd], 16)
    assert "| OPD, reverse KL | 0.1 | 70.5 ± 6.4 | 72.5 ± 6.4 |" in shown
    assert "| +10.0 ± 0.0" in shown and len(shown.splitlines()) == 4
    benchmark.plot(
        points, [{"trd": "TRD"}, {m: m for m in curves}], 16, "avg", tmp_path / "avg.svg"
    )
    assert "<svg" in (tmp_path / "avg.svg").read_text()


def test_pairs_are_compared_at_equal_steps_and_at_equal_tokens(
    benchmark: Any, methods: dict[str, Any], results: Any
) -> None:
    curves = {"opd_jsd": {0: 0.4, 4: 0.7, 8: 0.75}, "trd_jsd": {0: 0.4, 2: 0.6, 4: 0.8}}
    points = [
        results.Point(method, seed, step, avg, 0.9, 100 * step, 2.0 * step)
        for method, curve in curves.items()
        for seed in (0, 1)
        for step, avg in curve.items()
    ]
    found = benchmark.pairs_of(points, {m: methods[m] for m in curves}, 4)
    assert [*found] == ["TRD − OPD, JSD"]
    assert [one.mean for one in found["TRD − OPD, JSD"]] == pytest.approx([0.1, 0.05])
    ends = [results.Point("m", seed, 8, avg, 1.0, 0, 0.0) for seed, avg in enumerate((0.75, 0.8))]
    assert "| end | 75.0 | 80.0 | 77.5 |" in benchmark.seeds_table({"end": ends}, 16)
    known = {name for pair in benchmark.PAIRS.values() for name in pair}
    assert known <= {*methods}


def test_a_run_is_kept_while_its_settings_and_models_stay(
    benchmark: Any, job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from comparison import jobs

    one, started = job("trd"), []

    def run(work: Any, arguments: Any, log: Path) -> None:
        started.append(arguments)
        one.directory.mkdir(parents=True)
        for name in ("metrics", "evaluation"):
            (one.directory / f"{name}.jsonl").write_text("")

    monkeypatch.setattr(jobs, "in_process", run)
    for weights, job_of_turn in (("a", one), ("a", one), ("a", replace(one, k=8)), ("b", one)):
        for role in ("student", "teacher"):
            (one.models / role).mkdir(parents=True, exist_ok=True)
            (one.models / role / "made.json").write_text(json.dumps({"weights": weights}))
        assert jobs.run_job(job_of_turn) == []
    assert [arguments[0] for arguments in started] == [
        j.overrides() for j in (one, replace(one, k=8), one)
    ]


def test_a_failed_run_is_reported_with_the_end_of_its_log(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from comparison import jobs
    from comparison.jobs import in_process

    monkeypatch.setattr(jobs, "_IMPORTED", ())
    log = tmp_path / "run.log"
    with pytest.raises(RuntimeError, match=r"exit code 1, .*run.log:\s+.*no such student"):
        in_process(sys.exit, ("no such student",), log)


def test_processes_that_end_while_others_start_are_not_taken_for_failed(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The exit code of a process can be read once; here who comes second reads it first."""
    from multiprocessing import forkserver

    from comparison import jobs

    read_signed = forkserver.read_signed  # type: ignore[attr-defined]
    reads, delays = Counter[int](), [4.0, 1.0]

    def first_is_slow(descriptor: int) -> int:
        reads[descriptor] += 1
        if reads[descriptor] == 2 and delays:  # the first is for the id of the process
            time.sleep(delays.pop())  # of two that have ended one is slower: a third starts
        return read_signed(descriptor)  # type: ignore[no-any-return]

    monkeypatch.setattr(forkserver, "read_signed", first_is_slow)
    monkeypatch.setattr(jobs, "_IMPORTED", ())
    ended = jobs.at_once(
        lambda n: jobs.in_process(sys.exit, (0,), tmp_path / f"{n}.log"), range(3), "processes"
    )
    assert ended == [None] * 3


def test_fine_tuning_minimises_the_cross_entropy_that_transformers_computes(
    benchmark: Any, job: Callable[..., Any], tmp_path: Path
) -> None:
    from comparison.models import World, make_model, write_problems, write_prompts
    from comparison.sft import fine_tune

    world, models = World().untrained(), tmp_path / "models"
    for role, recipe in (("student", world.student), ("teacher", world.teacher)):
        make_model(models / "3" / role, role, 3, recipe, world.texts)
    write_prompts(models / "3", 3)
    write_problems(models, benchmark.PROBLEMS)
    changes = {"steps": 2, "interval": 2, "k": 1}
    overrides = replace(job("sft"), **changes).overrides()
    quick = ["train.prompts_per_step=3", "data.validation.limit=4", "optimizer.clip_grad=0.01"]
    config = compose([*overrides, *quick])
    fine_tune(config)
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["loss"] == pytest.approx(first_loss(config), abs=1e-5)
    evaluated = [json.loads(line) for line in (config.run_dir / "evaluation.jsonl").open()]
    assert [line["step"] for line in evaluated] == [0, 2]
    assert lines[0]["generated_tokens"] == lines[0]["label_tokens"] > 0


def first_loss(config: Any) -> float:
    """Of the student on the answers that the teacher samples in the first step."""
    from transformers import AutoTokenizer

    from nemo_trd.data.prompts import load_prompts, prompts_of_step
    from nemo_trd.data.types import GenerationRequest
    from nemo_trd.generation.local import LocalGenerator
    from nemo_trd.generation.protocol import request_seed

    tokenizer = AutoTokenizer.from_pretrained(config.model.student.path)
    prompts = load_prompts(config.data.train, "data.train", config.data, tokenizer).prompts
    asked = prompts_of_step(prompts, 0, 3, config.run.seed)
    seeds = [request_seed(config.run.seed, "teacher", 0, prompt.index) for prompt in asked]
    requests = [GenerationRequest(p.token_ids, s) for p, s in zip(asked, seeds, strict=True)]
    teacher = LocalGenerator(config.teacher_source.path, config.generation.local, False, False)
    answers = teacher.generate(requests, config.generation.refinement, "answers")
    student = AutoModelForCausalLM.from_pretrained(config.model.student.path)
    total, count = 0.0, 0
    for prompt, answer in zip(asked, answers, strict=True):
        ids = torch.tensor([[*prompt.token_ids, *answer.token_ids]])
        labels = ids.clone()
        labels[0, : len(prompt.token_ids)] = -100
        with torch.no_grad():
            total += student(input_ids=ids, labels=labels).loss.item() * len(answer.token_ids)
        count += len(answer.token_ids)
    return total / count


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_quick_runs_every_method_and_writes_everything(
    methods: dict[str, Any], tmp_path: Path
) -> None:
    command = [sys.executable, str(BENCHMARKS / "trd_vs_opd.py"), "--quick", "--json"]
    output = tmp_path / "comparison"
    subprocess.run(
        [*command, str(tmp_path / "all.json"), "--output", str(output)], check=True, timeout=590
    )
    written = ("tables.md", "points.csv", "methods.svg", "pass.svg")
    first = [(output / "quick" / name).read_text() for name in written]
    titles = [f"| {described['title']} |" for described in methods.values()]
    assert all(first[0].count(title) == 2 for title in titles)  # and in the table of seeds
    ends = [row for row in csv.DictReader(io.StringIO(first[1])) if row["step"] != "0"]
    assert {row["method"] for row in ends} == {*methods}
    assert all(int(row["generated_tokens"]) > 0 for row in ends)
    again = [str(tmp_path / "all.json"), "--output", str(tmp_path / "again")]
    subprocess.run([*command[:2], "--from", *again], check=True, timeout=120)
    assert [(tmp_path / "again" / name).read_text() for name in written] == first
