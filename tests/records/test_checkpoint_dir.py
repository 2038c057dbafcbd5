"""Checkpoints on disk: which one is current, what is pruned, moved aside, damaged."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from nemo_trd.config.errors import ConfigError
from nemo_trd.config.evaluation import EvaluatedModel
from nemo_trd.config.schema import Checkpoint
from nemo_trd.evaluate.source import find_source
from nemo_trd.records import abandoned, checkpoint_dir, checksums, disk_space, latest
from nemo_trd.records.abandoned import begin_line
from nemo_trd.records.checkpoint_dir import (
    TrainerState,
    candidates,
    checkpoint_name,
    commit,
    complete_checkpoints,
    defects,
    find_checkpoint,
    read_state,
)


def save(root: Path, step: int, keep_last: int = 9, slurm_job: str | None = None) -> Path:
    """A checkpoint of two files, as a run writes it."""
    partial = root / f"{checkpoint_name(step)}.partial"
    (partial / "rng").mkdir(parents=True)
    (partial / "__0_0.distcp").write_bytes(bytes(range(256)) * 4)
    (partial / "rng" / "rank_0").write_bytes(b"random")
    checksums.leave(partial, 0, ["__0_0.distcp"])
    state = TrainerState(step, step, 0, 7, "digest", {}, slurm_job=slurm_job)
    return commit(partial, state, keep_last)


def settings(resume: str = "auto") -> Checkpoint:
    return Checkpoint(
        save_interval=1,
        keep_last=1,
        resume=resume,
        accept_changed_data=False,
        async_save=False,
        export_hf=False,
    )


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of six steps that saved after three and six, and its records."""
    run = tmp_path / "run"
    for step in (3, 6):
        save(run / "checkpoints", step)
    lines = "".join(json.dumps({"step": step}) + "\n" for step in range(1, 7))
    (run / "metrics.jsonl").write_text(lines)
    (run / "config.yaml").write_text("")
    (run / "samples").mkdir()
    for step in (2, 6):
        (run / "samples" / f"step_{step:06d}.md").write_text(str(step))
    return run


@pytest.fixture(params=["links", "no links"])
def root(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> Path:
    """Its checkpoints, on a file system with symbolic links or without."""
    checkpoints = run_dir / "checkpoints"
    if request.param == "no links":

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")

        monkeypatch.setattr(Path, "symlink_to", refuse)
        monkeypatch.setattr(os, "symlink", refuse)
        latest.point(checkpoints, checkpoints / checkpoint_name(6))
        assert not (checkpoints / "latest").is_symlink()
    return checkpoints


def test_starting_anew_moves_what_was_there_aside_and_prunes_its_own_line_alone(root: Path) -> None:
    [notice] = begin_line(root, find_checkpoint(settings("never"), root))
    place = root / "abandoned_001"
    assert names(complete_checkpoints(place)) == ["step_00000003", "step_00000006"]
    assert "moved 2 checkpoints" in notice and f"checkpoint.resume={place}/step_00000006" in notice
    assert find_checkpoint(settings(), root) is None and not os.path.lexists(root / "latest")
    assert len((place / "metrics.jsonl").read_text().splitlines()) == 6
    assert names(sorted((place / "samples").iterdir())) == ["step_000002.md", "step_000006.md"]
    assert begin_line(root, None) == [  # it died before its first save, and is started again
        f"no checkpoint in {root} is current, so this run starts at step 0; 2 that earlier runs "
        f"did not go on from are kept there. To go on from the last one: "
        f"checkpoint.resume={place}/step_00000006"
    ]
    for step in (1, 2):
        saved = save(root, step, keep_last=1)
        assert names(complete_checkpoints(root)) == [saved.name]
        assert find_checkpoint(settings(), root) == latest.read(root) == saved
    assert len(complete_checkpoints(place)) == 2


def test_a_kill_while_an_old_checkpoint_is_pruned_leaves_nothing_to_go_on_from(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(directory: Path) -> None:
        (directory / "trainer_state.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        save(root, 7, keep_last=1)
    resumed = find_checkpoint(settings(), root)
    assert resumed == root / checkpoint_name(7)
    [notice] = begin_line(root, resumed)
    assert notice.startswith("removed ")
    assert names(complete_checkpoints(root)) == ["step_00000006", "step_00000007"]
    assert not list(root.glob("abandoned_*"))
    save(root, 8, keep_last=1)
    assert names(complete_checkpoints(root)) == ["step_00000008"]


def test_going_on_from_an_older_checkpoint_abandons_the_later_ones(root: Path) -> None:
    older = find_checkpoint(settings(str(root / checkpoint_name(3))), root)
    [notice] = begin_line(root, older)
    assert "moved 1 checkpoints" in notice and "step_00000006" in notice
    assert find_checkpoint(settings(), root) == older  # also before the next save
    assert names(sorted((root.parent / "samples").iterdir())) == ["step_000002.md"]
    save(root, 4)
    assert names(complete_checkpoints(root)) == ["step_00000003", "step_00000004"]
    (root.parent / "metrics.jsonl").write_text('{"step": 4}\n')
    (root.parent / "summary.json").write_text('{"steps": 4}')
    back = find_checkpoint(settings(str(root / "abandoned_001" / checkpoint_name(6))), root)
    begin_line(root, back)
    assert find_checkpoint(settings(), root) == root / "abandoned_001" / checkpoint_name(6)
    assert len((root.parent / "metrics.jsonl").read_text().splitlines()) == 6  # of that line
    assert not (root.parent / "summary.json").exists()  # of the line that it did not end
    assert (root / "abandoned_002" / "metrics.jsonl").read_text() == '{"step": 4}\n'
    assert (root / "abandoned_002" / "summary.json").exists()
    assert names(complete_checkpoints(root / "abandoned_002")) == [
        "step_00000003",
        "step_00000004",
    ]
    assert save(root, 7, keep_last=1).is_dir()
    assert len(complete_checkpoints(root / "abandoned_001")) == 1


def test_a_plain_resume_moves_nothing_and_removes_what_a_cut_off_save_left(root: Path) -> None:
    (root / "step_00000009.partial").mkdir()
    [notice] = begin_line(root, find_checkpoint(settings(), root))
    assert "step_00000009.partial" in notice
    assert sorted(names(list(root.iterdir()))) == ["latest", "step_00000003", "step_00000006"]


@pytest.mark.parametrize("resume", ["never", "step_00000003"])
def test_a_requeued_job_goes_on_from_what_it_has_saved(
    root: Path, resume: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = settings(resume if resume == "never" else str(root / resume))
    asked = None if resume == "never" else root / resume
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    assert find_checkpoint(wanted, root) == asked
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # the first attempt saved nothing
    assert find_checkpoint(wanted, root) == asked
    begin_line(root, asked)
    saved = save(root, 4, slurm_job="71")
    assert find_checkpoint(wanted, root) == saved
    monkeypatch.setenv("SLURM_JOB_ID", "72")
    assert find_checkpoint(wanted, root) == asked


def test_latest_decides_and_then_the_order_of_saving(root: Path) -> None:
    assert find_checkpoint(settings(str(root / "latest")), root) == root / checkpoint_name(6)
    save(root, 4)  # as an older version did after resuming from step 3
    assert names(candidates(root)) == ["step_00000004", "step_00000006", "step_00000003"]
    latest.point(root, root / checkpoint_name(3))
    assert names(candidates(root))[0] == "step_00000003"
    shutil.rmtree(root / checkpoint_name(3))  # leads nowhere
    assert names(candidates(root)) == ["step_00000004", "step_00000006"]
    latest.point(root, root / checkpoint_name(4))
    (root / checkpoint_name(4) / "__0_0.distcp").unlink()
    assert find_checkpoint(settings(), root) == root / checkpoint_name(6)


@pytest.mark.parametrize("named", ["latest", "auto"])
@pytest.mark.parametrize("alone", [False, True], ids=["beside its step", "alone"])
def test_a_copy_with_links_followed_goes_on_as_the_run_would(
    alone: bool, named: str, run_dir: Path
) -> None:
    root, six = run_dir / "checkpoints", run_dir / "checkpoints" / checkpoint_name(6)
    (root / "latest").unlink()
    shutil.copytree(six, root / "latest")
    if alone:
        shutil.rmtree(six)
    begin_line(
        root, find_checkpoint(settings(str(root / named) if named == "latest" else named), root)
    )
    assert find_checkpoint(settings(), root) == latest.read(root) == six
    assert names(complete_checkpoints(root)) == ["step_00000003", "step_00000006"]
    assert save(root, 7) == latest.read(root)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\0", b"step_00000009\n"])
def test_a_latest_that_leads_nowhere_is_passed_over(content: bytes, run_dir: Path) -> None:
    root = run_dir / "checkpoints"
    (root / "latest").unlink()
    (root / "latest").write_bytes(content)
    assert names(candidates(root)) == ["step_00000006", "step_00000003"]


def test_a_run_directory_is_evaluated_at_its_current_checkpoint(root: Path) -> None:
    model = root.parent / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    text = f"model: {{student: {{path: {model}}}}}\nprecision: {{dtype: fp32}}\n"
    (root.parent / "config.yaml").write_text(text)
    begin_line(root, None)
    current = save(root, 2)
    lost = root / "abandoned_001" / checkpoint_name(6)
    (root.parent / "config.yaml").write_text(text.replace("fp32", "bf16"))
    given = {
        root.parent: (current, "bf16"),
        root / "latest": (current, "bf16"),
        lost: (lost, "fp32"),  # what it was made with
    }
    for path, expected in given.items():
        settings = {"path": str(path), "hf_path": None, "trust_remote_code": False}
        source = find_source(EvaluatedModel.model_validate(settings))
        assert (source.checkpoint, source.dtype) == expected


def test_checkpoints_of_older_versions_are_older_than_all_that_record_an_order(
    run_dir: Path,
) -> None:
    root = run_dir / "checkpoints"
    for step in (3, 6):
        file = root / checkpoint_name(step) / "trainer_state.json"
        state = json.loads(file.read_text())
        for name in ("order", "checksums", "own_checksum"):
            del state[name]
        file.write_text(json.dumps(state))
    assert names(complete_checkpoints(root)) == ["step_00000003", "step_00000006"]
    assert read_state(root / checkpoint_name(6)).step == 6
    assert checkpoint_dir.recorded_checksums(root / checkpoint_name(6)) == {}
    save(root, 4)
    assert names(candidates(root)) == ["step_00000004", "step_00000006", "step_00000003"]


@pytest.mark.parametrize("name", ["__0_0.distcp", "rng/rank_0"])
def test_changed_bytes_of_unchanged_size_are_found_and_named(name: str, run_dir: Path) -> None:
    checkpoint = run_dir / "checkpoints" / checkpoint_name(6)
    expected = checkpoint_dir.recorded_checksums(checkpoint)
    assert list(expected) == ["__0_0.distcp", "rng/rank_0"]  # largest first
    assert checksums.first_difference(checkpoint, expected) is None
    content = bytearray((checkpoint / name).read_bytes())
    content[3] ^= 1
    (checkpoint / name).write_bytes(content)
    assert defects(checkpoint) is None
    assert f"{name} is damaged" in str(checksums.first_difference(checkpoint, expected))


@pytest.mark.parametrize("change", [{"files": None}, {"files": ["x"]}, {"a later field": 1}])
def test_a_state_that_cannot_be_read_is_a_damaged_one(
    change: dict[str, Any], run_dir: Path
) -> None:
    file = run_dir / "checkpoints" / checkpoint_name(6) / "trainer_state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "own_checksum": None, **change}))
    assert "trainer_state.json is damaged" in str(defects(file.parent))


def test_a_changed_trainer_state_is_found(run_dir: Path) -> None:
    file = run_dir / "checkpoints" / checkpoint_name(6) / "trainer_state.json"
    file.write_text(file.read_text().replace('"step": 6', '"step": 5'))
    assert "trainer_state.json is damaged" in str(defects(file.parent))
    found = find_checkpoint(settings(), run_dir / "checkpoints")
    assert found == run_dir / "checkpoints" / checkpoint_name(3)
    with pytest.raises(ConfigError, match=r"trainer_state\.json is damaged"):
        find_checkpoint(settings(str(file.parent)), run_dir / "checkpoints")


@pytest.mark.parametrize("of", ["directory", "file"])
def test_a_file_system_may_refuse_to_sync_a_directory_but_not_a_file(
    of: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}") == (of == "directory"):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    root = run_dir / "checkpoints"
    if of == "directory":
        assert save(root, 7) == latest.read(root)
    else:
        with pytest.raises(OSError, match="Invalid argument"):
            save(root, 7)
        assert latest.read(root) == root / checkpoint_name(6)


def test_a_disk_that_is_too_full_is_refused_with_the_figures(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = run_dir / "checkpoints"
    monkeypatch.setattr(disk_space, "free_bytes", lambda _: 3 * 2**20)
    disk_space.check_before_start(root, 3 * 2**20)
    with pytest.raises(ConfigError) as refused:
        disk_space.check_before_start(root, 3 * 2**20 + 1024**2 // 2)
    text = f"3.0 MiB are free in {root}, and a checkpoint needs 3.5 MiB"
    assert text in str(refused.value) and "\n" not in str(refused.value)
    leftover = root / "step_00000009.partial" / "x"  # is removed before anything is written
    leftover.parent.mkdir()
    leftover.write_bytes(bytes(2**19))
    disk_space.check_before_start(root, 3 * 2**20 + 2**19)
    monkeypatch.setattr(disk_space, "free_bytes", lambda _: None)  # nobody knows
    disk_space.check_before_start(root, 2**60)


def test_the_directory_that_a_run_begins_in_need_not_exist(tmp_path: Path) -> None:
    assert abandoned.begin_line(tmp_path / "run" / "checkpoints", None) == []
    assert disk_space.free_bytes(tmp_path / "run" / "checkpoints") > 0  # type: ignore[operator]
    assert find_checkpoint(settings(), tmp_path / "run" / "checkpoints") is None
