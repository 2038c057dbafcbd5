"""One Slurm for all tests of this directory, and tiny models for its jobs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import SlurmCluster, missing_programs
from slurm_jobs import Jobs
from tiny_models import make_model

SHAPE: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tokenizer": True,
}


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    missing = missing_programs()
    if missing or os.geteuid() != 0:
        reason = f"needs root and {missing or 'nothing else'} (`make system-packages`)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with SlurmCluster(tmp_path_factory.mktemp("slurm") / "root", nodes=8) as running:
        yield running
        assert running.of_jobs() == []


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    for seed, role in enumerate(("student", "teacher")):
        make_model(root / role, "qwen3", seed=seed, **SHAPE)
    rows = [{"question": f"{n}+1?", "answer": f"so #### {n + 1}"} for n in range(8)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="session")
def jobs(cluster: SlurmCluster, inputs: Path) -> Jobs:
    return Jobs(cluster, inputs)


@pytest.fixture(scope="session")
def fake_pyxis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stands in for Pyxis: fake_pyxis.c says how."""
    compiler = shutil.which("cc")
    if compiler is None or not Path("/usr/include/slurm/spank.h").exists():
        reason = "needs a C compiler and slurm/spank.h (`make system-packages`)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    library = tmp_path_factory.mktemp("spank") / "fake_pyxis.so"
    source = Path(__file__).with_name("fake_pyxis.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True, timeout=60)
    return library
