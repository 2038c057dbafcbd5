"""Samples on disk, judges that die, and what an evaluation refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from launch import commands_below

from nemo_trd.config.errors import ConfigError
from nemo_trd.config.evaluation import EvaluationConfig
from nemo_trd.config.load import compose_as
from nemo_trd.evaluate.figures import figures, table
from nemo_trd.evaluate.judging import JudgePool
from nemo_trd.evaluate.main import main
from nemo_trd.evaluate.sample_store import Sample, SampleStore
from nemo_trd.evaluate.source import find_source, fingerprint
from nemo_trd.verifiers.judgement import Judgement

SETTINGS = {"seed": 1, "sampling": {"top_p": 0.5}, "benchmarks": {"a": {"problems": "x"}}}


def configured(*overrides: str) -> EvaluationConfig:
    base = ["model.path=m", "benchmark=jsonl", "benchmarks.jsonl.path=p.jsonl", "progress=false"]
    return compose_as(EvaluationConfig, [*base, *overrides], "evaluate")


def sample(problem: int, number: int, correct: bool | None = True, **changes: Any) -> Sample:
    values: dict[str, Any] = {
        "benchmark": "jsonl",
        "problem": problem,
        "sample": number,
        "seed": 7,
        "finish_reason": "stop",
        "tokens": 3,
        "weight_version": 0,
        "correct": correct,
        "reason": {True: "right", False: "wrong_answer", None: "timeout"}[correct],
        "text": "line\u2028separator \U0001f44d \\boxed{3}",
    }
    return Sample(**values | changes)


# --- on disk ---


def test_samples_come_back_and_a_line_that_was_cut_off_is_drawn_again(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, SETTINGS)
    kept = [sample(0, 0), sample(0, 1, False), sample(1, 0, None)]
    for one in kept:
        store.append(one)
    file = tmp_path / "samples.jsonl"
    with file.open("a") as stream:
        stream.write('{"benchmark": "jsonl", "prob')
    again = SampleStore(tmp_path, SETTINGS)
    assert list(again.samples.values()) == kept
    again.append(sample(1, 1))
    assert list(SampleStore(tmp_path, SETTINGS).samples.values()) == [*kept, sample(1, 1)]


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, SETTINGS)

    def write(problem: int) -> None:
        for number in range(50):
            store.append(sample(problem, number, text="x" * 5000))

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(SampleStore(tmp_path, SETTINGS).samples) == 400


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"seed": 2},
            r"seed = 2: .* says 1, and samples of both would be mixed",
        ),
        ({"sampling": {"top_p": 1.0}}, r"sampling.top_p = 1.0: .* says 0.5"),
        ({"benchmarks": {"a": {"problems": "y"}}}, r"benchmarks.a.problems = 'y'"),
        ({"benchmarks": {}}, r"benchmarks"),
        ({"further": 1}, r"further = 1"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    SampleStore(tmp_path, SETTINGS).append(sample(0, 0))
    with pytest.raises(ConfigError, match=message):
        SampleStore(tmp_path, SETTINGS | changed)


def test_samples_without_settings_and_damaged_lines_are_refused(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, SETTINGS)
    store.append(sample(0, 0))
    (tmp_path / "samples.jsonl").write_text('{"benchmark": 1}\n')
    with pytest.raises(ConfigError, match=r"samples.jsonl line 1: not a sample"):
        SampleStore(tmp_path, SETTINGS)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ConfigError, match="no settings.json"):
        SampleStore(tmp_path, SETTINGS)


# --- judges ---


def judge_all(config: EvaluationConfig, answers: list[tuple[str, str]]) -> list[Judgement]:
    found: dict[int, Judgement] = {}
    with JudgePool(config) as pool:
        for number, (text, answer) in enumerate(answers):
            pool.submit("math", text, answer, lambda verdict, n=number: found.update({n: verdict}))
        pool.finish(progress=False)
    return [found[number] for number in range(len(answers))]


def test_a_comparison_that_hangs_is_a_class_of_its_own_and_costs_nobody_else_a_verdict() -> None:
    config = configured("verification.workers=2", "verification.math_timeout_seconds=1.5")
    good = (r"\boxed{x + x}", "2x")
    bad = (r"\boxed{3x}", "2x")
    fractions = "+".join(rf"\frac{{{n}x+1}}{{x+{n}}}" for n in range(1, 51))  # of ordinary size
    hang = (rf"\boxed{{{fractions}}}", "5x")
    verdicts = judge_all(config, [good, hang, bad, good, hang, good, bad, good])
    right, wrong = Judgement(True, "right"), Judgement(False, "wrong_answer")
    late = Judgement(None, "timeout")
    assert verdicts == [right, late, wrong, right, late, right, wrong, right]


def test_a_worker_that_dies_is_replaced_and_only_its_own_verdict_is_missing() -> None:
    config = configured("verification.workers=1")
    seen: list[Judgement] = []
    with JudgePool(config) as pool:
        asked = (r"\boxed{x + x}", "2x")
        pool.submit("math", *asked, seen.append)
        pool.finish(progress=False)
        workers = [pid for pid, command in commands_below().items() if "serve()" in command]
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        for _ in range(3):
            pool.submit("math", *asked, seen.append)
        pool.finish(progress=False)
    assert workers
    expected = [Judgement(True, "right"), Judgement(None, "error")] + [Judgement(True, "right")] * 2
    assert seen == expected


HOSTILE = {  # what a program does, and the classes that this may end in
    "fork bomb": (
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        {"time_limit", "memory_limit"},  # many small processes are large together
    ),
    "memory bomb": (  # 10 MiB between two looks at its memory
        "import time\nhold = []\nwhile True:\n    hold.append(b'x' * 2**20)\n    time.sleep(0.005)",
        {"memory_limit"},
    ),
    "fast memory bomb": (  # may fail in a call before it is seen
        "hold = []\nwhile True: hold.append(b'x' * 2**20)",
        {"memory_limit", "runtime_error"},
    ),
    "memory bomb of many": (
        "import os, time\nfor _ in range(3): os.fork()\n"
        "hold = bytearray(90 * 2**20)\nhold[::4096] = b'x' * len(hold[::4096])\ntime.sleep(60)",
        {"memory_limit"},
    ),
    "endless loop": ("while True: pass", {"time_limit"}),
    "sleep": ("import time\ntime.sleep(1000)", {"time_limit"}),
    "reads the home directory": ("import os\nprint(os.listdir(HOME))", {"runtime_error"}),
    "writes outside": ("open(OUTSIDE, 'w').write('x')", {"runtime_error"}),
    "opens a socket": ("import socket\nsocket.create_connection(ADDRESS)", {"runtime_error"}),
    "prints gigabytes": ("while True: print('x' * 10**6)", {"output_limit"}),
}


def test_hostile_programs_are_classed_and_the_evaluation_goes_on(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    config = configured(
        *("benchmarks.jsonl.verifier=code", "verification.workers=2", "sandbox.case_seconds=5"),
        *("sandbox.memory_mib=256", "sandbox.output_mib=4", "sandbox.processes=12"),
    )
    tests = json.dumps({"inputs": ["1 2"], "outputs": ["3"]})
    honest = "print(sum(map(int, input().split())))"
    found: dict[str, Judgement] = {}
    with socket.create_server(("127.0.0.1", 0)) as server, JudgePool(config) as pool:
        server.settimeout(0)
        known = f"HOME = {str(Path.home())!r}\nOUTSIDE = {str(tmp_path / 'x')!r}\n"
        known += f"ADDRESS = {server.getsockname()!r}\n"
        for what, (program, _) in HOSTILE.items():
            for name, code in ((what, known + program), (f"honest beside {what}", honest)):
                text = f"```python\n{code}\n```"
                pool.submit("code", text, tests, lambda v, name=name: found.update({name: v}))
        pool.finish(progress=False)
        with pytest.raises(BlockingIOError):
            server.accept()
    for what, (_, classes) in HOSTILE.items():
        assert found[what].correct is False and found[what].reason in classes, (what, found[what])
        assert found[f"honest beside {what}"] == Judgement(True, "right")
    assert list(tmp_path.iterdir()) == []
    assert not [c for c in commands_below().values() if Path(c.split(" ")[0]).name == "bwrap"]


def test_what_goes_wrong_with_a_judgement_ends_the_evaluation() -> None:
    def full_disk(judgement: Judgement) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"), JudgePool(configured()) as pool:
        pool.submit("math", "#### 3", "3", full_disk)
        pool.finish(progress=False)
    with pytest.raises(OSError, match="no space"), JudgePool(configured()) as pool:
        for _ in range(4000):  # nor is more drawn, of which nothing could be kept
            pool.submit("math", "#### 3", "3", full_disk)
            time.sleep(0.05)


# --- figures ---


def test_figures_count_everything() -> None:
    drawn = [
        sample(0, 0),
        sample(0, 1, False, finish_reason="length"),
        sample(1, 0, None),
        sample(1, 1, None, reason="error"),
        sample(2, 0, False, reason="no_answer", tokens=9),
        sample(2, 1, True),
    ]
    config = configured("samples_per_problem=2", "bootstrap.resamples=100")
    found = figures(drawn, {"too_long": 4}, config)
    assert found["estimates"]["avg@2"]["value"] == pytest.approx(0.5)
    assert found["estimates"]["pass@2"]["value"] == 1
    assert found["reasons"] == {
        "error": 1,
        "no_answer": 1,
        "right": 2,
        "timeout": 1,
        "wrong_answer": 1,
    }
    del found["estimates"], found["reasons"]
    assert found == {
        "problems": 3,
        "samples": 6,
        "left_out_problems": {"too_long": 4},
        "undecided_samples": 2,
        "undecided_problems": 1,
        "timeouts": 1,
        "truncated_samples": 1,
        "mean_tokens": 4,
        "weight_versions": [0],
    }


def test_the_order_of_the_samples_changes_no_figure() -> None:
    drawn = [sample(p, n, (p * n) % 3 == 0) for p in range(5) for n in range(4)]
    config = configured("samples_per_problem=4", "bootstrap.resamples=100")
    assert figures(drawn, {}, config) == figures(drawn[::-1], {}, config)


def test_the_table_shows_powers_of_two_and_no_figure_where_nothing_is_known() -> None:
    config = configured("samples_per_problem=6", "bootstrap.resamples=10")
    found = {
        "known": figures([sample(0, n, n < 3) for n in range(6)], {}, config),
        "unknown": figures([sample(0, n, None) for n in range(6)], {}, config),
    }
    lines = table(found, 6, 0.95).splitlines()
    header = ["benchmark", "problems", "avg@6", "pass@2", "pass@4", "pass@6"]
    assert lines[0].split() == [*header, "undecided", "timeouts", "truncated"]
    assert "50.0 [50.0, 50.0]" in lines[1] and "95%" in lines[3]
    assert lines[2].split()[2:6] == ["-"] * 4 and "6 of 6" in lines[2]


# --- settings ---


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "model.path has no value"),
        (["model.path=m"], "benchmark = None: there is nothing to evaluate on.*Fix: choose some"),
        (["model.path=m", "benchmark=gsm9k"], "(?s)Could not find 'benchmark/gsm9k'.*gsm8k"),
        (["model.path=m", "benchmark=jsonl"], "benchmarks.jsonl.path has no value"),
        (
            ["model.path=m", "benchmark=gsm8k", "benchmarks.gsm8k.verifyer=math"],
            r"benchmarks.gsm8k.verifyer = 'math': unknown key. Fix: did you mean .*verifier\?",
        ),
        (
            ["model.path=m", "benchmark=gsm8k", "benchmarks.gsm8k.verifier=none"],
            "benchmarks.gsm8k.verifier = 'none': it judges nothing",
        ),
        (["model.path=m", "benchmark=gsm8k", "seed=-1"], "seed = -1"),
        (["model.path=m", "benchmark=gsm8k", "samples=3"], "samples = '3': unknown key"),
        (
            ["model.path=m", "benchmark=gsm8k", "generation.backend=vllm"],
            "generation.vllm.urls = .*exactly one of urls and replicas",
        ),
        (
            ["model.path=m", "benchmark=gsm8k", "benchmarks.gsm8k.template=hello"],
            r"benchmarks.gsm8k.template = 'hello': it lacks \{problem\}",
        ),
        (["model.path=nowhere", "benchmark=gsm8k"], "model.path = 'nowhere': there is no such dir"),
    ],
)
def test_a_wrong_argument_is_told_in_one_line(
    overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(overrides) == 2
    told = capsys.readouterr().err
    assert re.search(message, told), told
    assert "Traceback" not in told


def test_every_benchmark_can_be_chosen_and_help_shows_all_settings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    told = capsys.readouterr().out
    assert left.value.code == 0
    names = told.split("benchmarks: ")[1].splitlines()[0].split(", ")
    assert {"gsm8k", "math500", "aime24", "aime25", "hmmt25", "beyond_aime", "amo_bench"} < {*names}
    chosen = f"benchmark=[{','.join(names)}]"
    paths = ["benchmarks.jsonl.path=a.jsonl", "benchmarks.livecodebench.path=b.jsonl"]
    config = compose_as(EvaluationConfig, ["model.path=m", chosen, *paths], "evaluate")
    assert list(config.benchmarks) == names
    for field in EvaluationConfig.model_fields:
        assert f"\n{field}:" in told


def test_a_fingerprint_tells_other_weights(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(10**6))
    before = fingerprint(tmp_path)
    os.utime(file, (1, 1))
    assert fingerprint(tmp_path) == before
    file.write_bytes(bytes(10**6 - 1) + b"x")
    assert fingerprint(tmp_path) != before


def test_a_directory_that_is_nothing_we_know_is_refused(tmp_path: Path) -> None:
    config = configured(f"model.path={tmp_path}")
    with pytest.raises(ConfigError, match="no checkpoint"):
        find_source(config.model)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"Fix: give its run's directory, or .*export_merged"):
        find_source(configured(f"model.path={adapter}").model)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"Fix: evaluate .*/export"):
        find_source(config.model)
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(ConfigError, match="it belongs to a checkpoint"):
        find_source(configured(f"model.path={tmp_path}", "model.hf_path=x").model)
