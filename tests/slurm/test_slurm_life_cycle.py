"""Jobs that are stopped, preempted, cut off and broken, on a real Slurm."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from slurm_cluster import SlurmCluster, eventually
from slurm_jobs import CHECKOUT, STEPS, Jobs

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.timeout(1800)]

NEVER = "checkpoint.save_interval=1000"


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """What does not depend on the clock, of every step whose line is written to its end."""
    file = run_dir / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    clock = ("seconds/", "tokens_per_second", "time")
    return [{k: v for k, v in line.items() if not k.startswith(clock)} for line in lines]


def saved_step(run_dir: Path) -> int:
    """0 where nothing was saved, as of a run that was told to stop before its first step."""
    latest = run_dir / "checkpoints" / "latest"
    return int(latest.resolve().name.removeprefix("step_")) if latest.exists() else 0


def last_line(log: str) -> str:
    return log.strip().splitlines()[-1]


def after_steps(run_dir: Path, count: int) -> None:
    eventually(f"{count} steps in {run_dir}", lambda: len(metrics(run_dir)) >= count)


def assert_nothing_left(cluster: SlurmCluster) -> None:
    eventually("no process of the job", lambda: not cluster.of_jobs())


@pytest.fixture(scope="module")
def uninterrupted(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    number = jobs.submit(run_dir, NEVER)
    assert jobs.cluster.wait(number)["ExitCode"] == "0:0", jobs.cluster.log(number)
    assert len(metrics(run_dir)) == STEPS
    return metrics(run_dir)


def test_a_slice_shorter_than_the_save_interval_makes_progress(
    jobs: Jobs, tmp_path: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    run_dir = tmp_path / "run"
    number = jobs.submit(run_dir, NEVER)
    after_steps(run_dir, 3)
    jobs.cluster.run("scancel", "--signal=USR1", "--batch", str(number))
    job = jobs.cluster.wait(number)
    log = jobs.cluster.log(number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), log
    assert log.count("; requeued") == 1
    attempts = sorted((run_dir / "logs" / str(number)).glob("[0-9]*"))
    assert [path.name for path in attempts] == ["0", "1"]
    assert (run_dir / "logs" / "latest").resolve() == attempts[1].resolve()
    assert metrics(run_dir) == uninterrupted
    assert_nothing_left(jobs.cluster)


def test_the_signal_of_the_head_comes_before_the_time_limit(jobs: Jobs, tmp_path: Path) -> None:
    """A limit below the 900 s of `#SBATCH --signal` brings it at Slurm's next look, in 30 s."""
    number = jobs.submit(
        *(tmp_path / "run", NEVER, "train.num_steps=100000"), options=("--time=5",)
    )
    eventually("requeued", lambda: "; requeued" in jobs.cluster.log(number))
    jobs.cluster.run("scancel", str(number))
    assert saved_step(tmp_path / "run") == len(metrics(tmp_path / "run"))
    assert jobs.cluster.wait(number)["JobState"] == "CANCELLED"
    assert_nothing_left(jobs.cluster)


def test_a_preempted_job_saves_and_goes_on(
    jobs: Jobs, tmp_path: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    run_dir = tmp_path / "run"
    number = jobs.submit(run_dir, NEVER, options=("--nodelist=node[1-2]",))
    after_steps(run_dir, 3)
    urgent = jobs.cluster.run(
        *("sbatch", "--parsable", "--partition=urgent", "--nodelist=node[1-2]", "--nodes=2"),
        *("--exclusive", "--output=urgent-%j.log", "--wrap", "true"),
    )
    assert jobs.cluster.wait(int(urgent))["JobState"] == "COMPLETED"
    reached = saved_step(run_dir)
    assert reached == len(metrics(run_dir)) >= 3, "the step under way was finished and saved"
    job = jobs.cluster.wait(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), jobs.cluster.log(number)
    assert f"stopped on request after step {reached}" in jobs.cluster.log(number)
    assert metrics(run_dir) == uninterrupted
    assert_nothing_left(jobs.cluster)


def test_a_cancelled_job_saves_and_stays_cancelled(jobs: Jobs, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    number = jobs.submit(run_dir, NEVER)
    after_steps(run_dir, 3)
    jobs.cluster.run("scancel", str(number))
    job = jobs.cluster.wait(number)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), jobs.cluster.log(number)
    assert saved_step(run_dir) == len(metrics(run_dir)) < STEPS
    assert "cancelled, sbatch again to go on" in jobs.cluster.log(number)
    assert_nothing_left(jobs.cluster)


def test_a_job_that_may_not_be_requeued_saves_and_says_so(jobs: Jobs, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    number = jobs.submit(run_dir, NEVER, options=("--no-requeue",))
    after_steps(run_dir, 3)
    jobs.cluster.run("scancel", "--signal=USR1", "--batch", str(number))
    job = jobs.cluster.wait(number)
    last = last_line(jobs.cluster.log(number))
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "75:0", "0"), last
    assert "not requeued" in last and "sbatch again to go on" in last
    assert saved_step(run_dir) == len(metrics(run_dir)) < STEPS


def test_a_stop_file_ends_a_run_gracefully(
    jobs: Jobs, tmp_path: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    """From a checkout and into a run directory with blanks in their paths; then resumed by hand."""
    checkout, run_dir = tmp_path / "a checkout", tmp_path / "a run"
    checkout.symlink_to(CHECKOUT)
    script = checkout / "slurm" / "trd_70b.sh"
    number = jobs.submit(run_dir, NEVER, script=script)
    after_steps(run_dir, 3)
    (run_dir / "stop").touch()
    job = jobs.cluster.wait(number)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), jobs.cluster.log(number)
    assert saved_step(run_dir) == len(metrics(run_dir)) < STEPS
    assert_nothing_left(jobs.cluster)
    again = jobs.submit(run_dir, NEVER, script=script)
    assert jobs.cluster.wait(again)["ExitCode"] == "0:0", jobs.cluster.log(again)
    assert metrics(run_dir) == uninterrupted


def test_a_lost_node_requeues_the_job_which_loses_no_saved_step(
    jobs: Jobs, tmp_path: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    run_dir = tmp_path / "run"
    every = 10
    number = jobs.submit(
        *(run_dir, f"checkpoint.save_interval={every}"), options=("--nodelist=node[1-2]",)
    )
    after_steps(run_dir, every + 3)
    jobs.cluster.set_link("node2", "down")
    try:
        eventually("requeued", lambda: jobs.cluster.job(number).get("Restarts", "0") == "1")
        reached = len(metrics(run_dir))
        assert saved_step(run_dir) >= reached - every
        jobs.cluster.run("scontrol", "update", f"JobId={number}", "ReqNodeList=")
        job = jobs.cluster.wait(number)
    finally:
        jobs.cluster.set_link("node2", "up")
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), jobs.cluster.log(number)
    assert "node2" not in job["NodeList"]
    assert metrics(run_dir) == uninterrupted
    assert_nothing_left(jobs.cluster)
    eventually("node2 is back", lambda: "idle" in jobs.cluster.run("sinfo", "-hn", "node2", "-o%t"))


def test_the_exit_code_of_a_trainer_is_that_of_the_job(jobs: Jobs, tmp_path: Path) -> None:
    run_dir, python = tmp_path / "run", tmp_path / "python"
    python.write_text(
        f"""#!/bin/bash
        real={CHECKOUT}/.venv/bin/python
        [[ "$*" == *nemo_trd.train* && $SLURM_PROCID == 1 ]] || exec $real "$@"
        $real "$@" &
        until [[ -s {run_dir}/metrics.jsonl ]]; do sleep 0.1; done
        echo "the disk of this node is broken"
        kill -KILL $!
        exit 7
        """
    )
    python.chmod(0o755)
    number = jobs.submit(run_dir, NEVER, PYTHON=str(python))
    job = jobs.cluster.wait(number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "7:0", "0")
    assert re.search(
        r"training task 1 on node\d: Exited with exit code 7: the disk of this node is broken",
        last_line(jobs.cluster.log(number)),
    )
    assert_nothing_left(jobs.cluster)


def test_a_trainer_that_raises_names_its_error_last(jobs: Jobs, tmp_path: Path) -> None:
    """Both ranks fail, and which of them Slurm hears of first is open: the cause is the same."""
    number = jobs.submit(
        *(tmp_path / "run", "refinement.on_failure=drop", "train.max_failed_steps=1")
    )
    assert jobs.cluster.wait(number)["ExitCode"] == "1:0"
    last = last_line(jobs.cluster.log(number))
    assert re.search(r"rank \d failed first: RuntimeError: 1 steps in a row", last), last
    assert_nothing_left(jobs.cluster)


def kill_server(cluster: SlurmCluster, node: str) -> None:
    commands = {}
    for pid in cluster.processes(node):
        with contextlib.suppress(psutil.NoSuchProcess):  # one that ends meanwhile is no server
            commands[pid] = psutil.Process(pid).cmdline()
    servers = [p for p, c in commands.items() if c[1:4] == ["-P", "-m", "nemo_trd_api_server"]]
    assert len(servers) == 1, commands
    os.kill(servers[0], signal.SIGKILL)


@pytest.mark.vllm
def test_with_servers_a_preempted_job_finishes_its_step_and_a_dead_server_ends_it(
    jobs: Jobs, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    number = jobs.submit(
        run_dir,
        *(NEVER, "generation.vllm.server.dtype=fp32", "generation.vllm.server.max_model_len=512"),
        *("generation.vllm.weight_sync.backend=file", "algorithm.trajectory=rollout"),
        *("train.num_steps=4000", "generation.vllm.server.max_num_seqs=16"),
        nodes=2,
        servers=(1, 0),
        options=("--nodelist=node[1-2]",),
    )
    after_steps(run_dir, 3)
    urgent = jobs.cluster.run(
        *("sbatch", "--parsable", "--partition=urgent", "--nodelist=node[1-2]", "--nodes=2"),
        *("--exclusive", "--output=urgent-%j.log", "--wrap", "true"),
    )
    assert jobs.cluster.wait(int(urgent))["JobState"] == "COMPLETED", jobs.cluster.log(number)
    reached = saved_step(run_dir)
    assert reached == len(metrics(run_dir)) >= 3
    assert f"stopped on request after step {reached}" in jobs.cluster.log(number)
    after_steps(run_dir, reached + 2)
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, len(metrics(run_dir)) + 1))
    kill_server(jobs.cluster, "node2")
    job = jobs.cluster.wait(number)
    log = jobs.cluster.log(number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "137:0", "1"), log
    assert re.search(
        r"a student server on node2: the server of \S+ at http://\S+ ended with status 137",
        last_line(log),
    ), last_line(log)
    assert saved_step(run_dir) == len(metrics(run_dir)) > reached, "what was trained is saved"
    assert_nothing_left(jobs.cluster)
