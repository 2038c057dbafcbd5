"""nemo_trd.generate draws pairs once; a run with generation=stored trains on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launch import launch
from tiny_models import make_model
from training_run import settings

pytestmark = pytest.mark.distributed

PROBLEMS = 6


def work(steps: list[tuple[str, list[str]]]) -> None:
    """On every rank: calls of `generate` and of `train`, one after the other."""
    from functools import partial

    from nemo_trd.config.errors import ConfigError
    from nemo_trd.config.load import compose
    from nemo_trd.generate import draw_pairs
    from nemo_trd.run.run_lock import RunLock
    from nemo_trd.run.session import with_all_ranks
    from nemo_trd.train import launch as train

    def refuse(lock: RunLock) -> None:
        raise ConfigError("the lock is another run's")

    for command, overrides in steps:
        config = compose(overrides)
        run = partial(train, config)
        if command == "generate":
            run = partial(with_all_ranks, config, partial(draw_pairs, config))
        if command == "another run takes the lock":
            monkeypatch = pytest.MonkeyPatch()
            monkeypatch.setattr(RunLock, "check", refuse)
            with pytest.raises(ConfigError, match="lock"):
                with_all_ranks(config, partial(draw_pairs, config))
            monkeypatch.undo()
            continue
        assert run() == 0


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    for seed, role in enumerate(("student", "teacher")):
        make_model(root / role, "qwen3", seed=seed, tokenizer=True, **sizes)
    rows = [{"question": f"{n}+1?", "answer": f"so #### {n + 1}"} for n in range(PROBLEMS)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_stored_pairs_train_as_drawn_ones_and_survive_an_interruption(
    inputs: Path, tmp_path: Path
) -> None:
    def of(name: str, *overrides: str) -> list[str]:
        common = ("train.num_steps=1", "checkpoint.export_hf=false")
        return settings(inputs, tmp_path / name, *common, *overrides)

    whole, small = f"train.prompts_per_step={PROBLEMS}", "train.prompts_per_step=4"
    pairs = tmp_path / "pairs" / "pairs.jsonl"
    stored = ("generation=stored", f"data.train.path={pairs}", "evaluation.at_end=false")
    generate = ("generate", of("pairs", whole))
    launch(
        1,
        work,
        [
            generate,
            ("train", of("drawn", whole)),
            ("train", of("stored", whole, *stored)),
            ("generate", of("steps", small)),
            ("another run takes the lock", of("taken", small)),
        ],
    )
    assert (tmp_path / "taken" / "pairs.jsonl").read_text() == ""
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    assert [row["question"] for row in rows] == [f"{n}+1?" for n in range(PROBLEMS)]
    assert all(row["rollout"]["token_ids"] and row["refinement"]["token_ids"] for row in rows)
    # The samples of the first step are those of the step-0 models either way.
    (drawn,), (read,) = metrics(tmp_path / "drawn"), metrics(tmp_path / "stored")
    assert read["generated_tokens"] == 0 and drawn["generated_tokens"] > 0
    for name in ("loss", "grad_norm", "label_tokens", "accepted", "rejected_truncated"):
        assert read[name] == pytest.approx(drawn[name], rel=1e-6), name
    assert drawn["loss"] > 1e-3 and drawn["label_tokens"] > PROBLEMS

    # Two ranks, and a kill in the middle of writing: the same file.
    file = tmp_path / "steps" / "pairs.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[: content.index(b"\n", content.index(b"3+1?")) + 40])
    (tmp_path / "steps" / "stop").touch()  # the first start obeys, and draws nothing
    launch(2, work, [("generate", of("steps", small)), ("generate", of("steps", small))])
    assert file.read_bytes() == content
    log = (tmp_path / "steps" / "log.txt").read_text()
    assert log.count("stopped on request; start again with run.dir=") == 1
    assert log.count("step 1 of 2") == 1 and log.count("step 2 of 2") == 2
    assert f"{PROBLEMS} pairs of {PROBLEMS} problems in {file}" in log.splitlines()[-1]

    from nemo_trd.config.errors import ConfigError
    from nemo_trd.config.load import compose
    from nemo_trd.generate import PairFile, load_problems, what_pairs_depend_on

    other = compose(of("steps", small, "generation.rollout.temperature=0.5"))
    problems = load_problems(other)
    with pytest.raises(ConfigError, match=r"generation\.rollout\.temperature = 0\.5: .* says 1\.0"):
        PairFile(other.run_dir, what_pairs_depend_on(other, problems.prompts), [4, 2])
    with pytest.raises(ConfigError, match="has a column 'rollout'"):
        load_problems(compose(of("again", f"data.train.path={pairs}")))
