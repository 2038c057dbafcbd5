"""One Slurm for all tests of this directory, tiny models, and how a job of them is queued."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import SlurmCluster, missing_programs
from tiny_models import make_model

CHECKOUT = Path(__file__).parents[2]
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


@dataclass
class Jobs:
    """Queues slurm/trd_70b.sh with what makes it small."""

    cluster: SlurmCluster
    inputs: Path

    def submit(
        self,
        run_dir: Path,
        *settings: str,
        nodes: int = 2,
        servers: tuple[int, int] = (0, 0),
        options: tuple[str, ...] = (),
        script: Path = CHECKOUT / "slurm" / "trd_70b.sh",
        **environment: str,
    ) -> int:
        """`servers` are the nodes for the servers of student and teacher."""
        small = [f"--nodes={nodes}", "--gpus-per-node=1", "--mem=1000", "--time=60"]
        student, teacher = servers
        return self.cluster.sbatch(
            [*small, *options],
            script,
            *self._tiny(),
            *([] if student else ["generation=local", "generation.max_staleness=0"]),
            *settings,
            RUN_DIR=str(run_dir),
            STUDENT_SERVER_NODES=str(student),
            TEACHER_SERVER_NODES=str(teacher),
            OMP_NUM_THREADS="1",
            **environment,
        )

    def _tiny(self) -> list[str]:
        return [
            *("data=gsm8k", "data.max_prompt_tokens=64", "data.verifier=exact"),
            *(f"model.student.path={self.inputs}/student", "parallel=single"),
            *(f"data.train.path={self.inputs}/data.jsonl", "precision.dtype=fp32"),
            "refinement.templates.opsd='{problem} {reference_solution} {rollout}'",
            *("refinement.max_context_tokens=450", "refinement.on_failure=rollout"),
            *("generation.rollout.max_tokens=12", "generation.refinement.max_tokens=12"),
            *("optimizer.lr=1e-3", "optimizer.distributed=false", "train.recompute=none"),
            *("train.num_steps=150", "train.prompts_per_step=4", "checkpoint.async_save=false"),
            *("cluster.student_server_tp=1", "cluster.teacher_server_tp=1"),
        ]


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
