"""One Slurm for all tests of this directory, and tiny models for its jobs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import make_inputs
from slurm_cluster import SlurmCluster, missing_programs
from slurm_jobs import Jobs


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
    # Columns beyond the tokenizer, as real models have them.
    return make_inputs(tmp_path_factory.mktemp("inputs"), vocab_size=300)


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
