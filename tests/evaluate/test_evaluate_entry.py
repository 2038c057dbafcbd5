"""Whole evaluations: of a directory, resumed after a kill, of a run's checkpoint and its export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from launch import launch, run_ranks
from tiny_models import make_model
from training_run import run_training, settings

pytestmark = pytest.mark.distributed

SAMPLES, PROBLEMS = 4, 6
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
REPOSITORY = Path(__file__).parents[2]


def arguments(model: Path, problems: Path, output: Path, *overrides: str) -> list[str]:
    return [
        *(f"model.path={model}", f"output={output}", "benchmark=jsonl"),
        *(f"benchmarks.jsonl.path={problems}", "benchmarks.jsonl.verifier=exact"),
        *(f"samples_per_problem={SAMPLES}", "sampling.max_tokens=24", "sampling.top_k=0"),
        *("sampling.temperature=1.0", "sampling.top_p=1.0", "progress=false"),
        *("generation.local.batch_size=4", "generation.local.dtype=fp32"),
        *("bootstrap.resamples=200", *overrides),
    ]


def start(overrides: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "nemo_trd.evaluate", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        text=True,
    )


def evaluate(overrides: list[str]) -> None:
    """In a forked process: what `python -m nemo_trd.evaluate` does."""
    from nemo_trd.evaluate.main import main

    print(f"exit code {main(overrides)}")


def evaluate_and_die(overrides: list[str]) -> None:
    """As `evaluate`, killed when three samples are kept."""
    from nemo_trd.evaluate.sample_store import SampleStore

    append = SampleStore.append
    kept: list[Any] = []

    def append_and_die(self: Any, sample: Any) -> None:
        append(self, sample)
        kept.append(sample)
        if len(kept) >= 3:
            os.kill(os.getpid(), 9)

    SampleStore.append = append_and_die  # type: ignore[method-assign]
    evaluate(overrides)


def run(overrides: list[str], exit_code: int = 0) -> str:
    told = launch(1, evaluate, overrides)
    assert told.endswith(f"exit code {exit_code}\n"), told
    return told


def samples(output: Path) -> dict[tuple[int, int], dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    found = {(line["problem"], line["sample"]): line for line in lines}
    assert len(found) == len(lines) == PROBLEMS * SAMPLES
    return found


def results(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text())["benchmarks"]


def write_problems(file: Path, answers: list[str]) -> Path:
    rows = [{"problem": f"{n}+1?", "answer": answer} for n, answer in enumerate(answers)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and problems some of which it solves: what it is heard to say is their answer."""
    root = tmp_path_factory.mktemp("evaluated")
    for seed, role in enumerate(("student", "teacher")):
        make_model(root / role, "qwen3", seed=seed, tokenizer=True, **SIZES)
    unknown = write_problems(root / "unknown.jsonl", ["-"] * PROBLEMS)
    run(arguments(root / "student", unknown, root / "heard"))
    said = samples(root / "heard")
    last_words = [(said[n, n % SAMPLES]["text"].split() or ["-"])[-1] for n in range(PROBLEMS)]
    write_problems(root / "problems.jsonl", [*last_words[:4], "-", "-"])
    rows = [{"question": f"{n}+1?", "answer": f"so #### {n + 1}"} for n in range(6)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def whole(inputs: Path) -> Path:
    """The output of an evaluation that nothing interrupted."""
    output = inputs / "whole"
    process = start(arguments(inputs / "student", inputs / "problems.jsonl", output))
    told, _ = process.communicate(timeout=400)
    assert process.returncode == 0, told
    assert "avg@4" in told and "pass@2" in told and "results.json" in told
    return output


def test_figures_are_those_of_the_samples_that_it_keeps(inputs: Path, whole: Path) -> None:
    answers = [json.loads(line)["answer"] for line in (inputs / "problems.jsonl").open()]
    said = samples(whole)
    right = [
        [(said[p, n]["text"].split() or [""])[-1] == answers[p] for n in range(SAMPLES)]
        for p in range(PROBLEMS)
    ]
    assert 0 < mean(map(mean, right)) < 1
    found = results(whole)["jsonl"]["estimates"]
    assert found["avg@4"]["value"] == pytest.approx(mean(map(mean, right)))
    for k in range(1, SAMPLES + 1):
        expected = mean(mean(any(c) for c in combinations(row, k)) for row in right)
        assert found[f"pass@{k}"]["value"] == pytest.approx(expected)
    assert {key: s["correct"] for key, s in said.items()} == {
        (p, n): right[p][n] for p in range(PROBLEMS) for n in range(SAMPLES)
    }
    truncated = sum(sample["tokens"] == 24 for sample in said.values())
    assert results(whole)["jsonl"]["truncated_samples"] == truncated


def test_an_evaluation_that_was_killed_goes_on_to_the_same_numbers(
    inputs: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "cut"
    cut = arguments(
        inputs / "student", inputs / "problems.jsonl", output, "generation.local.batch_size=1"
    )
    code, told = run_ranks(1, evaluate_and_die, cut)
    assert code not in (0, -1) and "the first to end in failure: -9" in told
    kept = (output / "samples.jsonl").read_text().count("\n")
    assert 3 <= kept < PROBLEMS * SAMPLES and not (output / "results.json").exists()
    told = run(cut)
    assert f"{kept} samples of {PROBLEMS * SAMPLES} are there" in told
    assert samples(output) == samples(whole)
    assert results(output) == results(whole)
    again = run(cut)  # nothing is left to do, and no model is loaded
    assert f"{PROBLEMS * SAMPLES} samples of {PROBLEMS * SAMPLES} are there" in again
    assert results(output) == results(whole)


def test_changed_settings_weights_and_problems_are_refused(inputs: Path, whole: Path) -> None:
    problems = inputs / "problems.jsonl"
    other = write_problems(inputs / "other.jsonl", ["1"] * PROBLEMS)
    for changed, field in (
        (arguments(inputs / "student", problems, whole, "seed=2"), "seed = 2"),
        (arguments(inputs / "teacher", problems, whole), "model.weights ="),
        (arguments(inputs / "student", other, whole), "benchmarks.jsonl.problems ="),
        (arguments(inputs / "student", problems, whole, "sampling.top_k=3"), "sampling.top_k = 3"),
    ):
        told = run(changed, exit_code=2)
        assert f"nemo_trd: {field}" in told and "Fix:" in told, told


def test_a_prompt_too_long_for_the_model_is_refused_before_it_is_loaded(
    inputs: Path, tmp_path: Path
) -> None:
    problems = inputs / "problems.jsonl"
    too_long = arguments(inputs / "student", problems, tmp_path, "sampling.max_tokens=512")
    told = run(too_long, exit_code=2)
    assert "sampling.max_tokens = 512" in told
    assert "Loading" not in told


def test_evaluating_a_checkpoint_equals_evaluating_its_export(
    inputs: Path, whole: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    layout = ["parallel.student.tensor_model_parallel_size=2", "optimizer.lr=1e-2"]
    trained = settings(inputs, run_dir, *layout, "train.num_steps=2")
    assert run_ranks(2, run_training, trained, "")[0] == 0
    problems = inputs / "problems.jsonl"
    models = {"run": run_dir, "step": run_dir / "checkpoints/step_00000002"}
    for name, model in [*models.items(), ("export", run_dir / "export")]:
        run(arguments(model, problems, tmp_path / name))
    assert samples(tmp_path / "run") == samples(tmp_path / "export") != samples(whole)
    assert results(tmp_path / "run") == results(tmp_path / "step") == results(tmp_path / "export")
    (converted,) = (tmp_path / "run").glob("model-*/model.safetensors")
    assert converted.read_bytes() == (run_dir / "export/model.safetensors").read_bytes()


def test_a_checkpoint_whose_first_student_moved_says_what_to_set(
    inputs: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    trained = settings(inputs, run_dir, "train.num_steps=1", "checkpoint.export_hf=false")
    assert run_ranks(1, run_training, trained, "")[0] == 0
    student = inputs / "student"
    moved = student.rename(tmp_path / "moved")
    try:
        problems = inputs / "problems.jsonl"
        told = run(arguments(run_dir, problems, tmp_path / "out"), exit_code=2)
        assert "set model.hf_path" in told, told
        run(arguments(run_dir, problems, tmp_path / "out", f"model.hf_path={moved}"))
    finally:
        moved.rename(student)
