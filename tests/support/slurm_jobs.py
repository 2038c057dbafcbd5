"""Jobs of slurm/trd_70b.sh, made small enough for `slurm_cluster.SlurmCluster`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slurm_cluster import SlurmCluster

CHECKOUT = Path(__file__).parents[2]
STEPS = 80  # so many that a signal arrives before the last


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
            STOP_SECONDS="300",
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
            *(f"train.num_steps={STEPS}", "train.prompts_per_step=4"),
            *("cluster.student_server_tp=1", "cluster.teacher_server_tp=1"),
            "checkpoint.async_save=false",
        ]
