from __future__ import annotations

import io
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_tokenizers import byte_level_tokenizer
from tqdm import tqdm

from nemo_trd.config.load import compose
from nemo_trd.config.schema import Config
from nemo_trd.data.types import (
    Completion,
    LabelValues,
    Prompt,
    Refinement,
    RefinementPrompt,
    Rollout,
    Trajectory,
)
from nemo_trd.evaluate.accuracy import Accuracy, Score, accuracy
from nemo_trd.records.run_logger import RunLogger, finite
from nemo_trd.records.samples import Sample, fenced, sample_record, samples_page, token_texts
from nemo_trd.records.step_lines import StepLines
from nemo_trd.records.timers import Timers
from nemo_trd.records.trackers import public_settings

SECONDS = {"rollout": 1.5, "student": 0.25, "step": 2.0}
METRICS = {
    "loss": 0.43211,
    "label_tokens": 1200.0,
    "accepted": 30,
    "rejected_truncated": 1,
    "rejected_empty": 1,
    "rejected_subset": 7,
    "grad_norm": 0.812345,
    "lr": 5e-6,
}


def settings(tmp_path: Path, *overrides: str) -> Config:
    quiet = ["logging.tensorboard=false"]
    return compose([f"run.dir={tmp_path / 'run'}", "train.num_steps=100", *quiet, *overrides])


def evaluate(logger: RunLogger, step: int, measured: Accuracy) -> None:
    logger.evaluation(step, measured.summary(), str(measured))


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps_in(path: Path) -> list[int]:
    return [record["step"] for record in records(path)]


def test_timers_sum_phases_and_start_again_each_step() -> None:
    timers = Timers()
    for _ in range(2):
        with timers("rollout"):
            time.sleep(0.02)
    with pytest.raises(ZeroDivisionError), timers("student"):
        time.sleep(0.01)
        1 / 0  # noqa: B018
    first = timers.take()
    assert list(first) == ["rollout", "student", "step"]
    assert first["rollout"] >= 0.04 and first["student"] >= 0.01
    assert first["step"] >= first["rollout"] + first["student"]
    assert list(timers.take()) == ["step"]


def test_a_step_is_one_json_line_and_one_console_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLogger(settings(tmp_path), writer=True) as logger:
        logger.step(7, METRICS, SECONDS)
    (record,) = records(tmp_path / "run" / "metrics.jsonl")
    assert time.time() - record.pop("time") < 60
    assert record == {
        "step": 7,
        **METRICS,
        "tokens_per_second": 600.0,
        "seconds/rollout": 1.5,
        "seconds/student": 0.25,
        "seconds/step": 2.0,
    }
    line = (
        "step   7/100 | loss 0.4321 | 1,200 tokens | refinements 30 accepted 2 failed | "
        "grad norm 0.8123 | lr 5e-06 | 600 tok/s | "
        "seconds: rollout 1.5 student 0.2 step 2.0 | left 0:03:06"
    )
    assert capsys.readouterr().out == line + "\n"
    assert (tmp_path / "run" / "log.txt").read_text().rstrip().endswith(line)


def test_the_line_of_a_step_tells_how_even_experts_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = {"load_balancing_loss": 1.2345678, "max_expert_load": 2.1678}
    with RunLogger(settings(tmp_path), writer=True) as logger:
        logger.step(7, {**METRICS, **experts}, SECONDS)
    told = "| grad norm 0.8123 | load balancing 1.235, fullest expert 2.17 times the mean | lr"
    assert told in capsys.readouterr().out


def test_figures_go_to_trackers_from_outside_too(tmp_path: Path) -> None:
    class Outside:
        def __init__(self) -> None:
            self.found: list[Any] = []

        def log(self, step: int, values: Any) -> None:
            self.found.append((step, values["loss"], values["seconds/rollout"]))

        def close(self, succeeded: bool) -> None:
            self.found.append(succeeded)
            raise OSError("not reached")

    outside, elsewhere = Outside(), Outside()
    for tracker, writer in ((outside, True), (elsewhere, False)):
        with RunLogger(settings(tmp_path), writer=writer, trackers=[tracker]) as logger:
            logger.step(7, METRICS, SECONDS)
            logger.close(last_line="finished")
    assert outside.found == [(7, METRICS["loss"], 1.5), True]
    assert elsewhere.found == []
    told = (tmp_path / "run" / "log.txt").read_text().splitlines()[-2:]
    assert told[0].endswith("Outside failed: OSError: not reached")
    assert told[1].endswith("finished")


def test_a_skipped_step_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLogger(settings(tmp_path), writer=True) as logger:
        logger.step(1, {"accepted": 0, "rejected_empty": 4}, SECONDS)
    assert "skipped: nothing to train on | refinements 0 accepted 4 failed" in (
        capsys.readouterr().out
    )


def test_console_lines_do_not_tear_progress_bars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bar on the same terminal is cleared before the line and drawn again after it."""
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    bar = tqdm(total=3, desc="rollouts", file=screen)
    with RunLogger(settings(tmp_path), writer=True) as logger, bar:
        bar.update(1)
        logger.step(1, METRICS, SECONDS)
    before, _, after = screen.getvalue().partition("step   1/100")
    assert before.endswith("\r") and not before.split("\r")[-2].strip()
    assert "rollouts" in after


def test_messages_of_the_package_reach_console_and_file_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = logging.getLogger("nemo_trd")
    before = (package.level, package.propagate, list(package.handlers))
    with RunLogger(settings(tmp_path), writer=True):
        logging.getLogger("nemo_trd.data.prompts").warning("3 prompts are too long")
    assert capsys.readouterr().out == "3 prompts are too long\n"
    text = (tmp_path / "run" / "log.txt").read_text()
    assert text.count("WARNING nemo_trd.data.prompts: 3 prompts are too long") == 1
    assert (package.level, package.propagate, list(package.handlers)) == before


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLogger(settings(tmp_path, "logging.tensorboard=true"), writer=False) as logger:
        logger.step(1, METRICS, SECONDS)
        evaluate(logger, 1, accuracy([Score(0, 1, 1, 0)], 2))
        logger.samples(1, [sample()], str)
        logger.summary({"a": 1})
        assert logger.wants_samples(20) and not logger.wants_samples(19)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_resuming_leaves_each_step_once(tmp_path: Path) -> None:
    config = settings(tmp_path)
    path = tmp_path / "run" / "metrics.jsonl"
    with RunLogger(config, writer=True) as logger:
        for step in range(1, 8):
            logger.step(step, METRICS | {"loss": float(step)}, SECONDS)
            if step in (2, 6):
                evaluate(logger, step, accuracy([Score(0, 1, 1, 0)], 2))
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    with RunLogger(config, writer=True, resumed_step=4) as logger:
        assert steps_in(path) == [1, 2, 3, 4]
        assert list(logger.evaluations()) == [2]
        logger.step(5, METRICS | {"loss": 50.0}, SECONDS)
        assert logger.total(["accepted", "loss", "unknown"]) == {
            "accepted": 150,
            "loss": 1 + 2 + 3 + 4 + 50.0,
            "unknown": 0,
        }
    assert steps_in(path) == [1, 2, 3, 4, 5]
    assert not list(path.parent.glob("*.partial"))


def test_a_line_cut_off_is_dropped_even_when_it_parses(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text('{"step": 1}\n{"step": 2}')  # the second lacks its end
    lines = StepLines(path, resumed_step=5)
    assert lines.read() == [{"step": 1}]
    lines.append(2, {"loss": 1.0})
    assert path.read_text() == '{"step": 1}\n{"step": 2, "loss": 1.0}\n'


def test_a_repeated_step_replaces_what_follows_it(tmp_path: Path) -> None:
    lines = StepLines(tmp_path / "lines", resumed_step=0)
    for step, value in ((0, "a"), (1, "b"), (2, "c"), (1, "d")):
        lines.append(step, {"value": value})
    assert [(r["step"], r["value"]) for r in lines.read()] == [(0, "a"), (1, "d")]


def test_a_new_run_in_an_old_directory_starts_its_files_again(tmp_path: Path) -> None:
    config = settings(tmp_path)
    for _ in range(2):
        with RunLogger(config, writer=True) as logger:
            evaluate(logger, 0, accuracy([Score(0, 1, 1, 0)], 2))
            logger.step(1, METRICS, SECONDS)
    assert steps_in(tmp_path / "run" / "metrics.jsonl") == [1]
    assert steps_in(tmp_path / "run" / "evaluation.jsonl") == [0]


def test_numbers_that_are_not_finite_become_null_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLogger(settings(tmp_path, "logging.tensorboard=true"), writer=True) as logger:
        logger.step(3, METRICS | {"grad_norm": float("nan")}, SECONDS)
        logger.summary({"before": {"stderr": float("inf")}, "paths": [Path("a")]})
    (record,) = records(tmp_path / "run" / "metrics.jsonl")
    assert record["grad_norm"] is None
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {
        "before": {"stderr": None},
        "paths": ["a"],
    }
    out = capsys.readouterr().out
    assert "step 3: grad_norm is nan" in out and "grad norm not finite" in out
    assert "summary: before: stderr is inf" in out
    assert finite({"a": (1, 2.5, True, None, "x")}, "") == {"a": [1, 2.5, True, None, "x"]}


def test_evaluations_are_recorded_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLogger(settings(tmp_path), writer=True) as logger:
        evaluate(logger, 0, accuracy([Score(0, 1, 3, 0), Score(1, 4, 0, 0)], 4))
        found = logger.evaluations()
    assert found[0]["avg@4"] == 0.625 and found[0]["problems"] == 2
    assert "evaluation after step 0: avg@4 0.625 ± 0.375, pass@4 1.000" in capsys.readouterr().out


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(directory))
    events.Reload()
    return {
        tag: [(e.step, pytest.approx(e.value)) for e in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path: Path) -> None:
    config = settings(tmp_path, "logging.tensorboard=true")
    with RunLogger(config, writer=True) as logger:
        for step in (1, 2, 3):
            logger.step(step, METRICS | {"loss": float(step)}, SECONDS)
    with RunLogger(config, writer=True, resumed_step=2) as logger:
        logger.step(3, METRICS | {"loss": 30.0}, SECONDS)
        evaluate(logger, 3, accuracy([Score(0, 1, 1, 0)], 2))
    found = scalars(tmp_path / "run" / "tensorboard")
    assert found["train/loss"] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert found["seconds/rollout"][0] == (1, 1.5)
    assert found["evaluation/avg@2"] == [(3, 0.5)]


def test_settings_are_written_without_credentials(tmp_path: Path) -> None:
    uri = "https://someone:hunter2@tracking.example:5000/x"
    config = settings(tmp_path, f"logging.mlflow={{experiment: e, tracking_uri: '{uri}'}}")
    public = public_settings(config)
    assert public["logging"]["mlflow"]["tracking_uri"] == "https://***@tracking.example:5000/x"
    assert "hunter2" not in json.dumps(public)
    assert config.logging.mlflow and config.logging.mlflow.tracking_uri == uri
    plain = settings(tmp_path)
    with RunLogger(plain, writer=True):
        pass
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert yaml.safe_load(text) == plain.model_dump(mode="json")


class FakeWandB(ModuleType):
    """Records what is asked of W&B; `fails` makes its server unreachable."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = SimpleNamespace()  # type: ignore[assignment]
        self.started: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.exit_codes: list[int] = []
        self.fails = False

    def init(self, **arguments: Any) -> FakeWandB:
        self.started.append(arguments)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: dict[str, Any]) -> None:
        if self.fails:
            raise ConnectionError("no route")
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandB]:
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    yield fake


def test_wandb_goes_on_with_its_run_after_a_resume(tmp_path: Path, wandb: FakeWandB) -> None:
    config = settings(tmp_path, "logging.wandb={project: p, name: n}")
    with RunLogger(config, writer=True) as logger:
        logger.step(1, METRICS | {"grad_norm": float("nan")}, SECONDS)
    with pytest.raises(KeyboardInterrupt), RunLogger(config, writer=True, resumed_step=1) as logger:
        logger.step(2, METRICS, SECONDS)
        raise KeyboardInterrupt
    with RunLogger(config, writer=True):
        pass
    first, resumed, new = (start["id"] for start in wandb.started)
    assert first == resumed != new
    assert wandb.started[0]["config"]["run"]["seed"] == config.run.seed
    assert [values["step"] for values in wandb.logged] == [1, 2]
    assert wandb.logged[0]["train/loss"] == METRICS["loss"]
    assert "train/grad_norm" not in wandb.logged[0]
    assert wandb.exit_codes == [0, 1, 0]


def test_a_tracking_server_that_is_down_does_not_stop_the_run(
    tmp_path: Path, wandb: FakeWandB, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb.fails = True
    with RunLogger(settings(tmp_path, "logging.wandb={project: p}"), writer=True) as logger:
        logger.step(1, METRICS, SECONDS)
    assert "WandBTracker failed: ConnectionError: no route" in capsys.readouterr().out
    assert steps_in(tmp_path / "run" / "metrics.jsonl") == [1]


def test_mlflow_records_settings_and_steps(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra nemo_trd[mlflow] is not installed")
    uri = (tmp_path / "server").as_uri()
    config = settings(tmp_path, f"logging.mlflow={{experiment: e, tracking_uri: '{uri}'}}")
    with RunLogger(config, writer=True) as logger:
        logger.step(1, METRICS, SECONDS)
    with RunLogger(config, writer=True, resumed_step=1) as logger:
        logger.step(2, METRICS | {"loss": 0.5}, SECONDS)
        evaluate(logger, 2, accuracy([Score(0, 1, 1, 0)], 2))
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("e")
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(1, METRICS["loss"]), (2, 0.5)]
    assert run.data.metrics["evaluation/avg_at_2"] == 0.5
    assert run.data.params["run.seed"] == str(config.run.seed)
    assert run.info.status == "FINISHED"


def sample(
    correct: bool | None = False, text: str = "* p 3 9 = 1 ; # 7", rejected: bool = False
) -> Sample:
    prompt = Prompt(17, "p 3 9 q 8 2 ?", (1, 2), answer="10")
    rollout = Rollout(prompt, 0, Completion((5, 6, 3), "stop", 19), text, correct)
    request = RefinementPrompt(rollout, (1, 2, 9), shortened=("rollout",))
    labels = (4, 9, 8, 8, 7, 6, 3)
    refinement = Refinement(
        request,
        Completion(labels, "length" if rejected else "stop", 0),
        "* p 3 9 = 1 ; # 10",
        None if rejected else True,
        "truncated" if rejected else None,
    )
    trajectory = Trajectory(17, 0, "refinement", (1, 2), (1, 2, 9), labels, 19)
    if rejected:
        return Sample(rollout, refinement, None, None)
    divergence = [0.1, 0.0, 2.5, 0.0, 0.3, 0.2, 0.4]
    figures = LabelValues(divergence, [1.0] * len(labels), [0.5] * len(labels))
    return Sample(rollout, refinement, trajectory, figures)


def test_a_sample_tells_problem_attempts_verdicts_and_divergence() -> None:
    page = samples_page(20, [sample()], lambda token_id: f"<{token_id}|\n")
    assert page.startswith("# Samples of step 20\n")
    assert "## Prompt 17, sample 0: rollout wrong, refinement right, trained on refinement" in page
    assert "**Problem**\n\n```text\np 3 9 q 8 2 ?\n```" in page
    assert "**Reference answer**\n\n```text\n10\n```" in page
    assert "**Rollout** (wrong, 3 tokens, ended by stop, weight version 19)" in page
    assert "the teacher saw a shortened rollout" in page
    assert "over 7 label tokens: mean 0.5000, max 2.5000 (nats)" in page
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert rows[0] == r"| 3 | `<8\|\n` | 2.5000 |"
    assert [row.split("|")[1].strip() for row in rows] == ["3", "7", "5", "6", "1"]


def test_a_rejected_refinement_shows_why() -> None:
    page = samples_page(20, [sample(rejected=True, correct=None)], str)
    assert "rollout no verdict, refinement truncated, trained on nothing" in page
    assert "rejected: truncated" in page
    assert "# 10" in page  # what there is of the rewrite is shown all the same


def test_vanilla_distillation_has_samples_without_refinement() -> None:
    full = sample()
    page = samples_page(1, [Sample(full.rollout, None, None, None)], str)
    assert "Refinement" not in page and "trained on nothing" in page


def test_text_with_backticks_cannot_leave_its_block(tmp_path: Path) -> None:
    assert fenced("a\n```\n# not a heading") == "````text\na\n```\n# not a heading\n````"


def test_sample_pages_have_the_configured_length(tmp_path: Path) -> None:
    with RunLogger(settings(tmp_path, "logging.samples_count=2"), writer=True) as logger:
        logger.samples(20, [sample()] * 5, str)
    page = (tmp_path / "run" / "samples" / "step_000020.md").read_text()
    assert page.count("## Prompt") == 2
    assert len(records(tmp_path / "run" / "samples" / "step_000020.jsonl")) == 2


def test_a_sample_for_programs_has_token_ids_verdicts_and_figures_of_each_label() -> None:
    record = json.loads(json.dumps(sample_record(20, sample(), lambda ids: "".join(map(str, ids)))))
    assert (record["step"], record["prompt_index"], record["sample_index"]) == (20, 17, 0)
    rollout, refinement = record["rollout"], record["refinement"]
    assert rollout["token_ids"] == [5, 6, 3] and rollout["tokens"] == ["5", "6", "3"]
    assert (rollout["correct"], refinement["correct"]) == (False, True)
    assert rollout["weight_version"] == 19 and "logprobs" not in rollout
    assert refinement["shortened"] == ["rollout"] and refinement["rejection"] is None
    assert record["trained_on"] == "refinement"
    assert record["labels"]["divergence"] == [0.1, 0.0, 2.5, 0.0, 0.3, 0.2, 0.4]
    assert len(record["labels"]["student_nll"]) == len(refinement["token_ids"])
    rejected = sample_record(20, sample(rejected=True), str)
    assert rejected["trained_on"] is rejected["labels"] is None
    assert rejected["refinement"]["rejection"] == "truncated"


BYTE_LEVEL = byte_level_tokenizer()


@given(st.text(max_size=30))
def test_token_texts_join_to_the_text(text: str) -> None:
    """Every byte is a token here: most characters need several of them."""
    token_ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    texts = token_texts(token_ids, BYTE_LEVEL.decode)
    assert len(texts) == len(token_ids)
    assert "".join(texts) == BYTE_LEVEL.decode(token_ids)


def test_a_character_of_several_tokens_belongs_to_the_last_of_them() -> None:
    token_ids = BYTE_LEVEL.encode("a€b", add_special_tokens=False)
    assert token_texts(token_ids, BYTE_LEVEL.decode) == ["a", "", "", "€", "b"]
    assert token_texts(token_ids[:3], BYTE_LEVEL.decode) == ["a", "", "\ufffd"]
