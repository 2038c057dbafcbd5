"""benchmarks/gpu.py and `make gpu`: they measure, list what fails, go on, and say so at the end."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
JUNIT = """<testsuites><testsuite>
<testcase name="good"/>
<testcase name="bad"><failure message="assert 1 == 2&#10;more"/></testcase>
<testcase name="left"><skipped message="needs two CUDA devices"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture(scope="module")
def benchmark() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gpu

    return gpu


def arguments(output: Path, **changed: Any) -> argparse.Namespace:
    settings = {"output": output, "only": ["loss", "training"], "gpus": 1, "tiny": True}
    return argparse.Namespace(**settings | {"tests": None} | changed)


def test_a_case_that_fails_is_listed_and_the_others_go_on(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"tokens": 7, "peak_gb": 1.0, "seconds": 2.0, "grad_error": 1e-7}
    rows = [{"name": "ours", **row}, {"name": "liger", "failed": "no compiler"}]

    def run_case(case: Any, number: int, output: Path) -> Any:
        if case.part == "training":
            raise RuntimeError(f"{case.name} broke")
        return rows

    machine = benchmark.Machine("H100", 1, 79.1, False, "no TransformerEngine", {"torch": "2.12"})
    monkeypatch.setattr(benchmark, "this_machine", lambda gpus: machine)
    monkeypatch.setattr(benchmark, "run_case", run_case)
    args = arguments(tmp_path / "out", tests=tmp_path / "tests.xml")
    args.tests.write_text(JUNIT)
    monkeypatch.setattr(benchmark, "arguments", lambda: args)
    assert benchmark.main() == 1
    found = json.loads((args.output / "gpu.json").read_text())
    assert [failure["part"] for failure in found["failures"]] == [
        *("loss: jsd, chunks of 32: liger", "training: toy-student bf16"),
        *("training: toy-teacher bf16", "test bad"),
    ]
    assert found["tests"] == {"passed": 1, "failed": 1, "skipped": 1}
    page = (args.output / "gpu.md").read_text()
    for line in (
        "1 x H100 with 79.1 GiB",
        "| jsd, chunks of 32, 7 tokens | ours | 1 | 2 | 1.0e-07 |",
        "- training: toy-student bf16: toy-student bf16 broke",
        "- training: toy-student fp8: no TransformerEngine",
        "- test bad: assert 1 == 2\n",
        "- tests: left: needs two CUDA devices",
    ):
        assert line in page, page
    assert not (args.output / "models").exists()


def test_a_case_ends_with_its_error_or_at_its_limit(benchmark: Any, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    wrong = benchmark.Case("loss", "wrong", ["loss.py", "--only", "nothing"])
    with pytest.raises(RuntimeError, match="exit code 2: .*invalid choice: 'nothing'"):
        benchmark.run_case(wrong, 1, tmp_path)
    slow = benchmark.Case("loss", "slow", ["loss.py"], seconds=0.2)
    with pytest.raises(RuntimeError, match=r"no end within 0.2 s; see .*02\.log"):
        benchmark.run_case(slow, 2, tmp_path)


def test_a_model_has_as_many_layers_as_fit_into_the_card(benchmark: Any, tmp_path: Path) -> None:
    machine = benchmark.Machine("H100", 1, 79.1, True, None, {})
    written: dict[str, Any] = {}

    def layers(shape: str, gpus: int) -> int:
        args = benchmark.dataclasses.replace(machine, gpus=gpus)
        settings = benchmark.training_settings(benchmark.FULL, args, tp=gpus)
        benchmark.fitting_model(shape, settings, tmp_path)
        return written["num_hidden_layers"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "write_model", lambda directory, shape: written.update(shape))
        assert layers("Qwen3-1.7B", 1) == 28
        assert 4 <= layers("Qwen3-8B", 1) < 36
        assert layers("Qwen3-8B", 4) == 36


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_make_gpu_tests_and_measures_on_emulated_kernels(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import te_stand_in\nte_stand_in.install()\n")
    paths = [str(tmp_path), str(ROOT / "tests" / "support")]
    environment = {
        **os.environ,
        "NEMO_TRD_EMULATED_GPU": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
    }
    command = ["make", "gpu", f"GPU_PYTHON={sys.executable}", f"GPU_OUTPUT={tmp_path / 'out'}"]
    command += ["PYTEST_ARGS=-k steps_gpu", "ARGS=--tiny --gpus 2"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1400
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert found["failures"] == [] and found["tests"]["failed"] == 0
    assert found["tests"]["passed"] >= 5
    assert found["machine"]["versions"]["transformer-engine"].startswith("2.")
    (rows,) = found["figures"]["loss"].values()
    assert [row["name"] for row in rows] == ["chunked", "liger", "ours"]
    training = found["figures"]["training"]
    assert {row["layers"] for row in training.values()} == {"TransformerEngine"}
    for shape in ("toy-student", "toy-teacher"):
        bf16, fp8 = (training[f"{shape} {kind}"]["losses"] for kind in ("bf16", "fp8"))
        assert bf16 != fp8 and bf16 == pytest.approx(fp8, rel=0.3)
    assert training["toy-teacher bf16"]["layout"] == "TP 2"
    (server,) = found["figures"]["generation"].values()
    assert server["tokens_per_second"] > 0 and server["sync_seconds"] > 0
    assert (tmp_path / "out" / "gpu.md").read_text().startswith("# This machine")
