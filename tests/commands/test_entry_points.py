"""Every entry point has a usage, refuses what it does not know, and writes nothing then."""

from __future__ import annotations

import importlib
import importlib.util
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
MODULES = (
    *("launch", "quickstart", "smollm2", "plan", "evaluate", "report", "prefix_failure", "doctor"),
    *("serve", "serve.node", "toy.warm_start", "generate"),
)
SCRIPTS = (
    *("overlap.py", "trd_vs_opd.py", "loss.py", "comparison/sft.py"),
    *("prefix_dose.py", "prefix_length.py", "prefix_exploration.py"),
)


def main_of(module: str) -> Callable[[list[str]], object]:
    """Return what `python -m nemo_trd.MODULE` calls."""
    name = f"nemo_trd.{module}"
    is_room = importlib.util.find_spec(name).submodule_search_locations
    return importlib.import_module(f"{name}.main" if is_room else name).main


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """Servers' entry points choose what signals do to their process."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before, mask = [signal.getsignal(n) for n in numbers], signal.pthread_sigmask(0, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, in which nothing may appear."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", MODULES)
def test_help_is_a_usage(module: str, empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = main_of(module)
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    told = capsys.readouterr()
    assert (ended.value.code, told.err) == (0, "")
    assert told.out.startswith(f"usage: python -m nemo_trd.{module} [-h]")
    with pytest.raises(SystemExit) as ended:
        main(["--no-such-option"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"usage: python -m nemo_trd.{module}")


def test_help_of_training_names_the_launcher_the_groups_and_the_exit_codes(
    empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nemo_trd import train

    monkeypatch.setattr(sys, "argv", ["train", "--help"])
    with pytest.raises(SystemExit) as ended:
        train.hydra_entry(train.main)()
    assert ended.value.code in (0, None)
    told = capsys.readouterr().out
    assert told.startswith("python -m nemo_trd.train [KEY=VALUE ...]")
    for named in ("nemo_trd.launch --nproc N", "experiment: ", "75 SIGTERM, SIGUSR1 or Ctrl-C"):
        assert named in told


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_a_benchmark_is_a_usage(
    script: str,
    empty: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = CHECKOUT / "benchmarks" / script
    monkeypatch.syspath_prepend(str(file.parent))
    monkeypatch.setattr(sys, "argv", [str(file), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file), run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {file.name} [-h]")


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("smollm2", ["", "refused"]),
        ("smollm2", ["one", "two"]),
        ("smollm2", [""]),
        ("report", [""]),
        ("prefix_failure", [""]),
        ("plan", ["--json", ""]),
        ("launch", ["--nproc", "0"]),
    ],
)
def test_what_cannot_be_meant_is_refused(
    module: str, arguments: list[str], empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main_of(module)(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"usage: python -m nemo_trd.{module} ")


def test_a_directory_that_holds_something_else_is_no_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nemo_trd.smollm2 import main

    assert main([str(tmp_path)]) == 1
    told = f"nemo_trd: {tmp_path} is there already, and holds no model\n"
    assert capsys.readouterr().err == told
