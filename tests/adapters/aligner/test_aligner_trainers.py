"""NeMo-Aligner's own trainer drives the student, in NeMo-Aligner's own environment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from aligner_runs import PROMPTS, STEPS, make_inputs, settings
from launch import launch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).parents[3] / "examples" / "nemo_aligner" / "train_gpt_trd.py"
TP2 = "parallel.student.tensor_model_parallel_size=2"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


class Recorder:
    """In the place of a Lightning logger: what Aligner's wrapper hands on."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.lines.append((step, dict(metrics)))


def supervised_fit(directory: str, overrides: list[str]) -> None:
    """On every rank: `SupervisedTrainer.fit` over the prompts that our loop would take."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from nemo_aligner.algorithms.supervised import SupervisedTrainer
    from nemo_aligner.data.nlp.builders import build_dataloader
    from nemo_aligner.utils.train_script_utils import CustomLoggerWrapper
    from omegaconf import OmegaConf

    from nemo_trd.adapters.nemo_aligner import TRDStudent, collate_prompts
    from nemo_trd.config.load import compose
    from nemo_trd.run.run import Run
    from nemo_trd.train import launch as launch_run

    class RunTimer:
        """Aligner's own asks for a CUDA tensor."""

        def start_time(self) -> None: ...

        def is_finished(self) -> bool:
            return False

    def fit(run: Run) -> int:
        model, recorder = TRDStudent(run), Recorder()
        cfg = OmegaConf.create({"model": {"seed": 1, "data": {"num_workers": 0}}})

        def loader(prompts: list[Any], mbs: int) -> Any:
            sizes = {"consumed_samples": 0, "mbs": mbs, "gbs": PROMPTS}
            kinds = {"collate_fn": collate_prompts, "use_random_sampler": False}
            return build_dataloader(cfg, prompts, **sizes, **kinds)

        trainer = SupervisedTrainer(
            cfg=OmegaConf.create(
                {
                    "max_epochs": 1,
                    "max_steps": STEPS,
                    "limit_train_batches": 1.0,
                    "limit_val_batches": 1.0,
                    "val_check_interval": STEPS,
                    "save_interval": STEPS,
                    "gradient_clip_val": 1.0,
                }
            ),
            model=model,
            optimizer=model.optimizer,
            scheduler=model.scheduler,
            train_dataloader=loader(
                [p for step in range(STEPS) for p in run.inputs.prompts(step)], 1
            ),
            val_dataloader=loader(run.inputs.validation_prompts, 1),
            test_dataloader=None,
            logger=CustomLoggerWrapper([recorder]),
            ckpt_callback=model.checkpoint_callback,
            run_timer=RunTimer(),
        )
        parameters = [n for m in run.student.models for n in m.named_parameters()]
        before = {name: parameter.clone() for name, parameter in parameters}
        trainer.fit()
        assert trainer.step == run.step == STEPS
        changed = {name for name, p in parameters if not p.equal(before[name])}
        assert changed == {name for name, p in parameters if p.requires_grad}
        assert all((".adapter." in name) == (run.student.adapter is not None) for name in changed)
        if dist.get_rank() == 0:
            Path(directory, "record.json").write_text(json.dumps(recorder.lines))
        parallel_state.destroy_model_parallel()
        return 0

    assert launch_run(compose([*overrides, f"run.dir={directory}/run"]), fit) == 0


def own_and_supervised(directory: str, own: list[str], overrides: list[str]) -> None:
    """On one rank: our loop; Aligner's; and our loop again, from what Aligner's saved."""
    from nemo_trd.config.load import compose
    from nemo_trd.train import launch as launch_run

    assert launch_run(compose(own)) == 0
    supervised_fit(directory, overrides)
    resumed = [*overrides, f"run.dir={directory}/run", f"train.num_steps={STEPS + 2}"]
    assert launch_run(compose(resumed)) == 0


def own_loop(overrides: list[str]) -> None:
    from nemo_trd.config.load import compose
    from nemo_trd.train import launch as launch_run

    assert launch_run(compose(overrides)) == 0


def test_supervised_trainer_on_two_ranks_trains_an_adapter_as_our_loop_on_one(
    inputs: Path, tmp_path: Path
) -> None:
    adapter = ["student.adapter=lora", "student.adapter.rank=4", "student.adapter.targets=[q,v,up]"]
    launch(1, own_loop, settings(inputs, tmp_path / "own", *adapter), timeout=300)
    supervised = settings(inputs, tmp_path / "run", *adapter, TP2)
    launch(2, supervised_fit, str(tmp_path), supervised, timeout=300)
    check_trained_as(read_metrics(tmp_path / "own"), tmp_path)


@pytest.fixture(scope="module")
def one_rank_runs(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories `own`, of two steps more than others, and `run`, Aligner's."""
    root = tmp_path_factory.mktemp("runs")
    own = settings(inputs, root / "own", f"train.num_steps={STEPS + 2}")
    launch(1, own_and_supervised, str(root), own, settings(inputs, root / "run"), timeout=300)
    return root


def check_trained_as(own: list[dict[str, Any]], directory: Path) -> None:
    lines = json.loads((directory / "record.json").read_text())
    training = [(step, line) for step, line in lines if "train/loss" in line]
    assert [step for step, _ in training] == list(range(STEPS))
    for (_, line), expected in zip(training, own, strict=False):
        assert line["train/loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["train/grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert line["train/lr"] == expected["lr"]
        assert line["train/accepted"] == expected["accepted"]
    assert sum(line["train/accepted"] for _, line in training) > STEPS  # not rollouts alone

    ((step, validation),) = [(step, line) for step, line in lines if "val/loss" in line]
    assert step == STEPS and 0 < validation["val/loss"] < 100
    assert (directory / "run" / "checkpoints" / "step_00000005").is_dir()


def test_supervised_trainer_trains_as_our_loop_does(one_rank_runs: Path) -> None:
    check_trained_as(read_metrics(one_rank_runs / "own"), one_rank_runs)


@pytest.mark.parametrize("layout", [[], [TP2]])
def test_supervised_trainer_on_two_ranks_trains_as_our_loop_on_one(
    layout: list[str], inputs: Path, one_rank_runs: Path, tmp_path: Path
) -> None:
    launch(
        2, supervised_fit, str(tmp_path), settings(inputs, tmp_path / "run", *layout), timeout=300
    )
    check_trained_as(read_metrics(one_rank_runs / "own"), tmp_path)


def test_our_loop_goes_on_where_supervised_trainer_saved(one_rank_runs: Path) -> None:
    assert "resumed from" in (one_rank_runs / "run" / "log.txt").read_text()
    own, resumed = (read_metrics(one_rank_runs / name) for name in ("own", "run"))
    assert [line["loss"] for line in resumed] == pytest.approx(
        [line["loss"] for line in own], rel=1e-5
    )


def by_hand(directory: str, overrides: list[str]) -> None:
    """On one rank: the trainer's parts, and Aligner's inference."""
    import torch

    from nemo_trd.adapters.nemo_aligner import AlignerTracker, TRDStudent, TRDTrainer
    from nemo_trd.config.load import compose
    from nemo_trd.run.run import Run
    from nemo_trd.train import launch as launch_run

    class Wrapper:
        def __init__(self) -> None:
            self.names: set[str] = set()

        def log_metrics(self, metrics: dict[str, float], step: int, prefix: str) -> None:
            self.names |= {f"{prefix}{name}" for name in metrics}

        def finalize(self) -> None: ...

    logger, losses = Wrapper(), []

    def work(run: Run) -> int:
        trainer = TRDTrainer(TRDStudent(run))
        refinements, counts, seconds = trainer.generate_rollouts()
        assert len(refinements) == PROMPTS and counts["accepted"] <= PROMPTS
        assert seconds.keys() == {"rollout", "refinement", "student_pool", "teacher_pool"}
        losses.append(trainer.run_training(refinements)[0])
        assert trainer.state_dict() == {"step": 1, "consumed_samples": PROMPTS, "epoch": 0}
        assert 0 <= trainer.run_validation()["avg@1"] <= 1
        trainer.save()
        assert trainer.fit() == 0 and trainer.state_dict()["step"] == STEPS

        prompts = run.inputs.validation_prompts[:2]
        rows = [torch.tensor(prompt.token_ids) for prompt in prompts]
        text = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        out = trainer.model.infer({"text": text, "length": torch.tensor([len(r) for r in rows])})
        for row, prompt, length, answer in zip(
            out["response_tokens"],
            prompts,
            out["response_lengths"],
            out["predictions"],
            strict=True,
        ):
            ids = row[:length].tolist()
            assert ids[: len(prompt.token_ids)] == list(prompt.token_ids)
            assert len(prompt.token_ids) < length and not row[length:].any()
            assert run.inputs.decode(ids[len(prompt.token_ids) :]) == answer
        return 0

    assert launch_run(compose(overrides), work, [AlignerTracker(logger)]) == 0
    found = {"names": sorted(logger.names), "losses": losses}
    Path(directory, "record.json").write_text(json.dumps(found))


def test_trd_trainer_has_the_parts_of_our_loop(
    inputs: Path, one_rank_runs: Path, tmp_path: Path
) -> None:
    overrides = settings(inputs, tmp_path / "run", f"evaluation.interval={STEPS}")
    launch(1, by_hand, str(tmp_path), overrides, timeout=300)
    record = json.loads((tmp_path / "record.json").read_text())
    own, lines = read_metrics(one_rank_runs / "own"), read_metrics(tmp_path / "run")
    assert record["losses"] == pytest.approx([own[0]["loss"]], rel=1e-5)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    for line, expected in zip(lines, own, strict=False):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    names = set(record["names"])
    assert {"train/loss", "train/grad_norm", "val/avg@1", "timers/rollout", "timers/step"} <= names
    assert {name.split("/")[0] for name in names} == {"train", "val", "timers"}


def test_example_script_trains_and_logs_as_aligners_do(inputs: Path, tmp_path: Path) -> None:
    sampling = [
        f"+model.trd.generation.{which}.max_tokens={limit}"
        for which, limit in (("rollout", 12), ("refinement", 100))
    ]
    command = [
        *(sys.executable, str(SCRIPT), "trainer.precision=32", "trainer.trd.max_steps=2"),
        *("trainer.trd.val_check_interval=2", f"exp_manager.explicit_log_dir={tmp_path / 'run'}"),
        *("model.optim.sched.warmup_steps=1", "model.global_batch_size=4"),
        *(
            f"{key}={inputs / 'data.jsonl'}"
            for key in ("model.data.train", "model.data.validation")
        ),
        f"pretrained_checkpoint.restore_from_path={inputs / 'student'}",
        f"model.trd.model.teacher.path={inputs / 'teacher'}",
        "+model.trd.refinement.templates.opd='{problem} {rollout}'",
        *("+model.trd.refinement.max_context_tokens=200", "+model.trd.data.max_prompt_tokens=64"),
        *("+model.trd.data.verifier=exact", "+model.trd.refinement.on_failure=rollout", *sampling),
        *("+model.trd.generation.local.dtype=fp32", "+model.trd.logging.progress=false"),
    ]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2]
    assert (tmp_path / "run" / "export" / "config.json").is_file()
    # What Aligner's logger wrote, where its users look for it.
    events = EventAccumulator(str(next((tmp_path / "run").glob("events.out.tfevents.*"))))
    names = set(events.Reload().Tags()["scalars"])
    assert {"train/loss", "val/avg@8", "timers/student"} <= names
