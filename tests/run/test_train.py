"""Whole runs of the training entry point: stopping, resuming, failing."""

from __future__ import annotations

import json
import re
import shutil
import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from launch import launch, processes_of, run_ranks
from tiny_models import make_model
from training_run import STEPS, run_training, settings
from transformers_oracle import mean_kl

from nemo_trd.records.read import read_runs
from nemo_trd.report.main import write_report

pytestmark = pytest.mark.distributed

SAVE_AT_HALF = [f"checkpoint.save_interval={STEPS // 2}"]
EOS = 3
ANSWERS = [([70, 71, EOS], "stop"), ([EOS], "stop"), ([72], "length"), ([73, EOS], "stop")]
PP2 = ["parallel.student.pipeline_model_parallel_size=2"]


def run_until_killed(log_file: str) -> None:
    """Rank 1 is killed without a word while rank 0 waits, and not in a collective."""
    import os
    import signal
    import time

    from nemo_trd.distributed.process import init_distributed

    init_distributed(1, Path(log_file))
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def run_with_scripted_rollouts(directories: list[str], overrides: list[str], record: str) -> None:
    """Vanilla distillation of known answers, once for each directory of models."""
    from dataclasses import asdict

    import nemo_trd.train as entry
    from nemo_trd.config.load import compose
    from nemo_trd.data.types import Completion
    from nemo_trd.generation.local import LocalGenerator

    script = [Completion(tuple(y), reason, 0) for y, reason in ANSWERS]  # type: ignore[arg-type]
    LocalGenerator.generate = lambda _, requests, *__: script if requests else []  # type: ignore
    pair, seen = entry.pair, []

    def recorded(*arguments: Any) -> Any:
        trajectories = pair(*arguments)
        seen.append([asdict(trajectory) for trajectory in trajectories])
        return trajectories

    entry.pair = recorded
    for number, directory in enumerate(directories):
        models = [f"model.{role}.path={directory}/{role}" for role in ("student", "teacher")]
        paths = [*models, f"run.dir={directory}/run"]
        assert entry.launch(compose([*overrides, *paths])) == 0, number
    Path(record).write_text(json.dumps(seen))


def run_again(runs: list[list[str]]) -> None:
    """On one rank: a run for each list of settings, also after one that is refused."""
    from nemo_trd.config.errors import ConfigError
    from nemo_trd.config.load import compose
    from nemo_trd.train import launch

    for overrides in runs:
        try:
            assert launch(compose(overrides)) == 0
        except ConfigError as error:
            print(f"refused: {error}")


def run_with_programs(overrides: list[str], rollouts: list[str], rewrite: str) -> None:
    """A run whose student answers with these programs in turn, and whose teacher with one."""
    from itertools import cycle

    from tiny_models import byte_tokenizer

    from nemo_trd.config.load import compose
    from nemo_trd.data.types import Completion
    from nemo_trd.generation.local import LocalGenerator
    from nemo_trd.train import launch

    def say(program: str) -> Completion:
        ids = byte_tokenizer()(f"```\n{program}\n```", add_special_tokens=False)["input_ids"]
        return Completion((*ids, EOS), "stop", 0)

    said = {"rollouts": cycle(rollouts), "refinements": cycle([rewrite])}

    def generate(self: Any, requests: Any, sampling: Any, description: str) -> list[Completion]:
        if description == "evaluation":  # of a model, what it says depends on the request alone
            return [say(rewrite if r.seed % 3 else rollouts[-1]) for r in requests]
        return [say(next(said[description])) for _ in requests]

    LocalGenerator.generate = generate  # type: ignore[assignment]
    assert launch(compose(overrides)) == 0


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models that share a tokenizer, and problems."""
    root = tmp_path_factory.mktemp("inputs")
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    for seed, role in enumerate(("student", "teacher")):
        make_model(root / role, "qwen3", seed=seed, tokenizer=True, **sizes)
    rows = [{"question": f"{n}+1?", "answer": f"so #### {n + 1}"} for n in range(6)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """What does not depend on the clock, of every step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds/", "tokens_per_second", "time")
    return [{k: v for k, v in line.items() if not k.startswith(clock)} for line in lines]


def last_line(log_file: Path) -> str:
    return log_file.read_text().splitlines()[-1]


@pytest.fixture(scope="module")
def whole_run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run on one rank that nothing interrupted."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert run_ranks(1, run_training, settings(inputs, run_dir, *SAVE_AT_HALF), "")[0] == 0
    return run_dir


def test_the_records_of_a_run_are_what_its_report_shows(whole_run: Path) -> None:
    """Samples are all that the step trained on here: their means must be the step's figures."""
    (run,) = read_runs([whole_run])
    assert sorted({s["step"] for s in run.samples}) == [2, 4] and len(run.samples) == 8
    assert run.missing == ["no evaluation (evaluation.at_start, interval, at_end)"]
    for line in run.steps:
        samples = [s for s in run.samples if s["step"] == line["step"]]
        for metric, label in (("student_nll",) * 2, ("teacher_nll",) * 2, ("loss", "divergence")):
            values = [value for sample in samples for value in sample["labels"][label]]
            if samples:
                assert len(values) == line["label_tokens"]
                assert line[metric] == pytest.approx(sum(values) / len(values), rel=1e-5)
        rewritten = [s for s in samples if s["trained_on"] == "refinement"]
        assert len(rewritten) == (line["accepted"] if samples else 0)
        for side in ("rollout", "refinement"):
            lengths = [len(sample[side]["token_ids"]) for sample in rewritten]
            if lengths:
                assert line[f"{side}_tokens"] == pytest.approx(sum(lengths) / len(lengths))
    text = write_report([whole_run]).read_text()
    assert text.count("<article") == 8 and "Not recorded: Held-out accuracy" in text


@pytest.mark.parametrize(("ranks", "signal"), [(1, "SIGINT"), (2, "SIGUSR1")])
def test_a_signalled_run_saves_and_resumes_to_the_same_numbers(
    ranks: int, signal: str, inputs: Path, whole_run: Path, tmp_path: Path
) -> None:
    layout = PP2 if ranks == 2 else []
    whole, cut = (settings(inputs, tmp_path / name, *layout) for name in ("whole", "cut"))
    if ranks == 2:
        assert run_ranks(ranks, run_training, whole, "")[0] == 0
        whole_run = tmp_path / "whole"
    code, output = run_ranks(ranks, run_training, cut, signal, launcher="nemo_trd")
    assert code == 75 and "Traceback" not in output
    assert output.count(f"{signal}: the run saves and stops after the step that it is in") == 1
    stopped = "stopped on request after step 2; the run can be resumed: start again with run.dir="
    assert last_line(tmp_path / "cut" / "log.txt").endswith(f"{stopped}{tmp_path / 'cut'}")
    assert len(metrics(tmp_path / "cut")) == STEPS // 2
    again = "started once more" if ranks == 1 else ""  # processes meet only once
    launcher: Any = "torchrun" if ranks == 2 else "fork"
    code, output = run_ranks(ranks, run_training, cut, again, launcher=launcher)
    assert code == 0 and output.count("resumed from") == 1  # not by every rank
    summary = f"see {tmp_path / 'cut' / 'summary.json'}, the model in {tmp_path / 'cut' / 'export'}"
    assert f"finished after step {STEPS}; {summary}; python -m nemo_trd.report" in output
    said = f"finished after step {STEPS}; {summary}"
    if again:
        said = f"nothing left to do: step {STEPS} is done (exported) and train.num_steps is "
        said += f"{STEPS - 1}; {summary}"
    assert f"{said}; python -m nemo_trd.report" in last_line(tmp_path / "cut" / "log.txt")
    config = (tmp_path / "cut" / "config.yaml").read_text()
    assert f"num_steps: {STEPS}" in config, "what changed nothing is not recorded"
    assert metrics(tmp_path / "cut") == metrics(whole_run)
    assert len(metrics(tmp_path / "cut")) == STEPS
    files = {path.name for path in (tmp_path / "cut").iterdir()}
    assert files >= {"checkpoints", "export", "samples", "summary.json", "config.yaml"}


@pytest.mark.parametrize("moment", ["before a shard is on the disk", "before the last rename"])
def test_a_run_killed_while_it_saves_resumes_from_the_save_before(
    moment: str, inputs: Path, whole_run: Path, tmp_path: Path
) -> None:
    run = settings(inputs, tmp_path / "run", *SAVE_AT_HALF)
    marked = {"TEST_MARK": str(tmp_path)}
    code, output = run_ranks(
        *(1, run_training, run, f"killed {moment}"), environment=marked, launcher="nemo_trd"
    )
    assert code not in (0, -1) and "SIGKILL" in output, output[-3000:]
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "latest",
        "step_00000002",
        "step_00000004.partial",
    ]
    assert (checkpoints / "latest").resolve().name == "step_00000002"
    code, output = run_ranks(1, run_training, run, "")
    assert code == 0 and f"resumed from {checkpoints / 'step_00000002'}" in output
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"took {tmp_path / 'run' / 'run.lock'} over from process " in log
    assert "step_00000004.partial, which a save that was cut off had left" in log
    assert not list((tmp_path / "run").glob("run.lock*"))
    assert metrics(tmp_path / "run") == metrics(whole_run)
    assert weights(tmp_path / "run" / "export") == weights(whole_run / "export")
    assert not (checkpoints / "step_00000004.partial").exists()
    assert [process.cmdline() for process in processes_of(str(tmp_path))] == []


def weights(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.glob("*.safetensors")}


def test_a_checkpoint_of_a_different_model_is_refused_and_left_alone(
    inputs: Path, whole_run: Path, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 48, "intermediate_size": 48, "num_attention_heads": 4}
    other = make_model(tmp_path / "other", "qwen3", tokenizer=True, **sizes)
    kept = [path for path in whole_run.rglob("*") if path.name != "log.txt"]
    before = {path: path.stat().st_mtime_ns for path in kept}
    run = settings(inputs, whole_run, f"model.student.path={other}", "train.num_steps=6")
    code, output = run_ranks(1, run_training, run, "")
    assert code not in (0, -1)
    refused = "it holds a model with hidden_size = 32, and the student has 48"
    assert refused in output and refused in last_line(whole_run / "log.txt")
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert {path for path in whole_run.rglob("*") if path.name != "log.txt"} == set(kept)


def test_a_resumed_run_obeys_and_names_changed_settings_and_refuses_changed_data(
    inputs: Path, tmp_path: Path
) -> None:
    data, run_dir = tmp_path / "data.jsonl", tmp_path / "run"
    lines = (inputs / "data.jsonl").read_text().splitlines(keepends=True)[:3]
    data.write_text("".join(lines))
    (tmp_path / "swapped.jsonl").write_text("".join([lines[0], *lines[:0:-1]]))
    run = settings(
        inputs,
        run_dir,
        *(f"data.train.path={data}", "train.prompts_per_step=7", "optimizer.schedule=linear"),
        *("checkpoint.save_interval=1", "checkpoint.export_hf=false", "train.num_steps=2"),
        *("logging.samples_interval=1", "logging.samples_count=7"),
    )
    more = ["train.num_steps=3", "optimizer.lr=5e-4", "optimizer.warmup_fraction=0"]
    swapped = f"data.train.path={tmp_path / 'swapped.jsonl'}"
    output = launch(1, run_again, [run, [*run, *more, swapped], [*run, *more]])
    assert f"{tmp_path / 'swapped.jsonl'} line 2" in output and "another order" in output
    assert [line["lr"] for line in metrics(run_dir)][-1] == pytest.approx(5e-4 / 4)
    log = (run_dir / "log.txt").read_text()
    first = log[log.index("resumed from") :].splitlines()[0]
    assert first.endswith(
        "step_00000002; changed: optimizer.lr: 0.001 -> 0.0005; "
        "optimizer.warmup_fraction: 0.1 -> 0.0; train.num_steps: 2 -> 3"
    )
    assert output.count("optimizer.lr: 0.001 -> 0.0005") == 1
    assert "3 usable prompts, and train.prompts_per_step = 7: a step holds each of them 2.33" in log
    for path in (run_dir / "samples").glob("*.jsonl"):  # of a step, with prompts more than once
        drawn = [json.loads(line) for line in path.read_text().splitlines()]
        assert len({(s["prompt_index"], s["sample_index"]) for s in drawn}) == 7
        assert len({tuple(s["rollout"]["token_ids"]) for s in drawn}) == 7
        assert all(len(s["labels"]["divergence"]) > 0 for s in drawn)


def test_a_rank_without_a_trajectory_takes_part_with_nothing(inputs: Path, tmp_path: Path) -> None:
    one = ["train.prompts_per_step=1", "train.num_steps=2"]
    losses = {}
    for ranks in (1, 2):
        run_dir = tmp_path / str(ranks)
        assert run_ranks(ranks, run_training, settings(inputs, run_dir, *one), "")[0] == 0
        losses[ranks] = [(m["loss"], m["grad_norm"], m["label_tokens"]) for m in metrics(run_dir)]
    assert len(losses[1]) == 2
    for step, expected in zip(losses[2], losses[1], strict=True):
        assert step == pytest.approx(expected, rel=1e-5)


def test_labels_are_y_with_its_eos_whatever_the_tokenizer_pads_with(
    inputs: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    directories = []
    for side, pad in product(("left", "right"), ("eos", "pad")):
        directories.append(tmp_path / f"{side}-{pad}")
        shutil.copytree(inputs, directories[-1])
        for role in ("student", "teacher"):
            tokenizer = AutoTokenizer.from_pretrained(inputs / role)
            tokenizer.padding_side = side
            tokenizer.pad_token = tokenizer.eos_token if pad == "eos" else tokenizer.pad_token
            assert (tokenizer.pad_token_id == tokenizer.eos_token_id) == (pad == "eos")
            tokenizer.save_pretrained(directories[-1] / role)
    overrides = [
        *(s for s in settings(inputs, tmp_path) if not s.startswith(("model.", "run.dir"))),
        *("algorithm.trajectory=rollout", "train.num_steps=1"),
    ]
    record = tmp_path / "record.json"
    launch(1, run_with_scripted_rollouts, [str(d) for d in directories], overrides, str(record))
    runs = json.loads(record.read_text())
    assert [[t["labels"] for t in run] for run in runs] == [[y for y, _ in ANSWERS]] * 4
    results = [metrics(directory / "run") for directory in directories]
    assert results[0][0]["label_tokens"] == sum(len(y) for y, _ in ANSWERS)
    assert results == [results[0]] * 4
    expected = mean_kl(inputs / "student", inputs / "teacher", runs[0])
    assert results[0][0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_an_exception_on_one_rank_ends_all_ranks_with_its_cause(
    inputs: Path, tmp_path: Path
) -> None:
    start = time.monotonic()
    code, output = run_ranks(
        2,
        run_training,
        settings(inputs, tmp_path / "run", *PP2),
        "exception",
        launcher="nemo_trd",
    )
    assert code == 1
    log_file = tmp_path / "run" / "log.txt"
    cause = "rank 0 stops: rank 1 failed first: RuntimeError: broken on purpose"
    assert output.splitlines()[-1] == f"{cause}; see {log_file}"
    assert output.count("broken on purpose") == 1 and "Traceback" not in output
    assert last_line(log_file).endswith(f" ERROR nemo_trd: {cause}")
    assert "in broken\n" in log_file.read_text(), "the traceback of the rank that failed"
    assert time.monotonic() - start < 300  # a collective waits for 30 minutes


def test_a_rank_that_is_killed_is_named(tmp_path: Path) -> None:
    log_file = tmp_path / "log.txt"
    code, output = run_ranks(2, run_until_killed, str(log_file), launcher="nemo_trd")
    assert code == 128 + 9, output
    told = output.splitlines()
    assert re.fullmatch(
        r"rank 0 stops: rank 1 is gone \(process \d+ on \S+\): killed, or out of memory; see "
        + re.escape(str(log_file)),
        told[0],
    )
    assert told[1:] == ["nemo_trd: rank 1 was ended by SIGKILL"]
    assert last_line(log_file).endswith("killed, or out of memory")


def test_steps_with_nothing_to_train_on_are_skipped_and_then_stop_the_run(
    inputs: Path, tmp_path: Path
) -> None:
    nothing = ["refinement.on_failure=drop", "generation.refinement.max_tokens=1"]
    overrides = settings(inputs, tmp_path / "run", *nothing, "train.max_failed_steps=2")
    code, output = run_ranks(1, run_training, overrides, "")
    assert code == 1
    assert "2 steps in a row (train.max_failed_steps)" in last_line(tmp_path / "run" / "log.txt")
    assert "2 steps in a row (train.max_failed_steps)" in output and "Traceback" not in output
    assert "'rejected_truncated': 4" in output
    assert [("loss" in line) for line in metrics(tmp_path / "run")] == [False, False]


def test_bad_settings_end_every_rank_before_anything_is_written(
    inputs: Path, tmp_path: Path
) -> None:
    overrides = settings(inputs, tmp_path / "run", "parallel.student.tensor_model_parallel_size=3")
    code, output = run_ranks(2, run_training, overrides, "")
    assert code not in (0, -1)
    assert "world size = 2" in output and "Fix: " in output
    assert not (tmp_path / "run").exists()


def test_vanilla_distillation_trains_on_rollouts_through_the_same_loop(
    inputs: Path, tmp_path: Path
) -> None:
    overrides = settings(inputs, tmp_path / "run", "algorithm.trajectory=rollout")
    assert run_ranks(1, run_training, overrides, "")[0] == 0
    for line in metrics(tmp_path / "run"):
        assert line["rejected_subset"] == line["rollouts"] == 4
        assert line["loss"] > 0


def test_rollouts_that_are_programs_are_judged_by_their_tests(inputs: Path, tmp_path: Path) -> None:
    tests = {"inputs": ["1 2", "5 5"], "outputs": ["3", "10"]}
    rows = [{"question": f"add {n}", "tests": tests} for n in range(7)]
    data = tmp_path / "programs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    right, wrong = "print(sum(map(int, input().split())))", "print(3)"
    columns = "{problem: question, messages: null, reference_solution: null, answer: tests}"
    dataset = f"{{path: {data}, name: null, split: train, columns: {columns}, "
    dataset += "answer_pattern: null, limit: null, template: null}"
    evaluations = []
    for ranks in (1, 2):
        run = settings(
            inputs,
            tmp_path / f"run{ranks}",
            *(f"data.train={dataset}", f"data.validation={dataset}", "data.verifier=code"),
            *("refinement.subset=wrong", "train.num_steps=1", "generation.rollout.max_tokens=64"),
            *("generation.refinement.max_tokens=64", "sandbox.memory_mib=256"),
            *("evaluation.at_start=true", "evaluation.samples_per_problem=3"),
        )
        said = [right, wrong] if ranks == 2 else [right, wrong, "while True: prin()", wrong]
        output = launch(ranks, run_with_programs, run, said, right)
        [step] = metrics(tmp_path / f"run{ranks}")
        counts = (step["rejected_subset"], step["wrong_to_right"], step["accepted"])
        assert counts == ((1, 3, 3) if ranks == 1 else (2, 2, 2)), output
        line = json.loads((tmp_path / f"run{ranks}" / "evaluation.jsonl").read_text())
        evaluations.append({name: value for name, value in line.items() if name != "time"})
    assert evaluations[0] == evaluations[1] and 0 < evaluations[0]["avg@3"] < 1
    assert evaluations[0]["undecided_samples"] == 0 and evaluations[0]["problems"] == 7


def test_a_signalled_run_in_fp8_resumes_to_the_same_numbers(inputs: Path, tmp_path: Path) -> None:
    """TransformerEngine's layers on the CPU."""
    fp8 = ["precision.fp8=hybrid", "precision.teacher_fp8=e4m3"]
    runs = []
    for fault in ("", "SIGTERM"):
        run_dir = tmp_path / (fault or "whole")
        overrides = settings(inputs, run_dir, *fp8)
        code, output = run_ranks(1, run_training, overrides, fault, transformer_engine=True)
        assert code == (0 if not fault else 1), output
        if fault:
            assert len(metrics(run_dir)) == STEPS // 2
            launch(1, run_training, overrides, "", transformer_engine=True)
        runs.append(metrics(run_dir))
    assert runs[0] == runs[1]
