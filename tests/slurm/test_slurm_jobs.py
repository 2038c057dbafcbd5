"""Whole jobs on a real Slurm: nodes, ranks, servers, logs, containers, and environments that cannot
work."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, eventually
from slurm_jobs import CHECKOUT, Jobs

from nemo_trd.config.load import compose

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.timeout(1800)]

SCRIPTS = sorted((CHECKOUT / "slurm").glob("*.sh"))
ON_SERVERS = [
    *("generation.vllm.server.dtype=fp32", "generation.vllm.server.max_model_len=512"),
    *("generation.vllm.weight_sync.backend=file", "generation.vllm.server.max_num_seqs=16"),
]
SERVERS_END = "[[ $* == *nemo_trd.serve.node* ]] && exit 3; exec"
LISTEN = """
import socket, sys, time
held = []
for port in range(int(sys.argv[1]), int(sys.argv[2]) + 1):
    held.append(socket.socket())
    held[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # after ranks of other tests
    held[-1].bind(("0.0.0.0", port))
    held[-1].listen()
print("listening", flush=True)
time.sleep(3600)
"""


def head(script: Path) -> dict[str, str]:
    """The #SBATCH lines of a script, by option; flags are ""."""
    lines = re.findall(r"^#SBATCH --(\S+)", script.read_text(), re.M)
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_every_line_of_the_head_is_honoured(jobs: Jobs, script: Path) -> None:
    cluster, given = jobs.cluster, head(script)
    cluster.run("sbatch", "--test-only", str(script))
    number = cluster.sbatch(["--hold"], script)
    job = cluster.job(number)
    cluster.run("scancel", str(number))
    honoured = {
        "job-name": job["JobName"],
        "nodes": job["NumNodes"].split("-")[0],
        "gpus-per-node": job["TresPerNode"].removeprefix("gres:gpu:"),
        "exclusive=": job["OverSubscribe"],
        "mem=": job["MinMemoryNode"],
        "time": job["TimeLimit"],
        "requeue=": job["Requeue"],
        "output": Path(job["StdOut"]).name,
    }
    assert honoured == {
        "job-name": given["job-name"],
        "nodes": given["nodes"],
        "gpus-per-node": given["gpus-per-node"],
        "exclusive=": "NO",
        "mem=": "0",
        "time": given["time"],
        "requeue=": "1",
        "output": f"{given['job-name']}-{number}.log",
    }
    # --open-mode and --signal show in what jobs do: test_slurm_life_cycle.py.
    shown = {"job-name", "nodes", "gpus-per-node", "exclusive", "mem", "time", "requeue", "output"}
    assert given.keys() == shown | {"open-mode", "signal"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_the_nodes_of_a_script_are_those_of_its_recipe(script: Path) -> None:
    text = script.read_text()
    recipe = compose([f"experiment={script.stem}"]).cluster
    servers = [int(n) for n in re.findall(r"_SERVER_NODES=\$\{\w+:-(\d+)\}", text)]
    assert servers == [recipe.student_server_nodes, recipe.teacher_server_nodes]
    assert int(head(script)["nodes"]) == recipe.training_nodes + sum(servers)
    assert int(head(script)["gpus-per-node"]) == recipe.gpus_per_node


@pytest.mark.vllm
def test_a_run_on_four_nodes_with_servers_on_two_of_them(jobs: Jobs, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = [*ON_SERVERS, "train.num_steps=4"]
    number = jobs.submit(run_dir, *settings, nodes=4, servers=(1, 1))
    job = jobs.cluster.wait(number)
    log = jobs.cluster.log(number)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), log
    nodes = jobs.cluster.run("scontrol", "show", "hostnames", job["NodeList"]).split()
    assert f"2 nodes train, 1 serve the student, 1 the teacher ({' '.join(nodes)})" in log

    logs = run_dir / "logs" / str(number) / "0"
    assert (run_dir / "logs" / "latest").resolve() == logs.resolve()
    assert (run_dir / "logs" / str(number) / "job.log").read_text() == log
    for role, node in (("student", nodes[2]), ("teacher", nodes[3])):
        address = f"10.213.{jobs.cluster.subnet}.{node.removeprefix('node')}"
        assert re.search(rf"the {role}'s servers: http://{re.escape(address)}:\d+$", log, re.M)
        assert (logs / f"{role}-server-{node}-0.log").exists()
    for rank in (0, 1):
        assert (logs / f"training-{rank:04d}.log").exists()
    assert "2 ranks" in (run_dir / "log.txt").read_text()

    written = (run_dir / "config.yaml").read_text()
    key = re.compile(r"NEMO_TRD_API_KEY=|[0-9a-f]{64}")
    assert not key.search(written + log), "the servers' key is in no file"
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert (run_dir / "checkpoints" / "latest").resolve().name == "step_00000004"
    assert (run_dir / "export" / "model.safetensors").exists()
    eventually("no process of the job", lambda: not jobs.cluster.of_jobs())


@pytest.fixture
def private_directory(jobs: Jobs, tmp_path: Path) -> Iterator[Path]:
    """A directory that is another one on node2."""
    directory, elsewhere = tmp_path / "private", tmp_path / "of node2"
    for each in (directory, elsewhere):
        each.mkdir()
    jobs.cluster.mount("node2", elsewhere, directory)
    yield directory
    jobs.cluster.unmount("node2", directory)


def assert_refused(jobs: Jobs, number: int, line: str) -> None:
    job = jobs.cluster.wait(number)
    log = jobs.cluster.log(number).strip().splitlines()
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0"), log
    assert re.search(line, log[-1]), log[-1]
    assert len([text for text in log if "trd_70b: " in text]) == 1


def test_environments_that_cannot_work_are_refused_in_one_line(
    jobs: Jobs, tmp_path: Path, private_directory: Path
) -> None:
    run_dir, on_both = tmp_path / "run", ("--nodelist=node[1-2]",)
    python = str(tmp_path / "no-python")
    refused = {
        "CONTAINER_IMAGE is set and this Slurm has no Pyxis": jobs.submit(
            run_dir, CONTAINER_IMAGE="nvcr.io/nvidia/nemo:26.06"
        ),
        r"2 nodes are fewer than 2 for servers .* and one for training": jobs.submit(
            run_dir, servers=(1, 1)
        ),
        "node2: RUN_DIR is not shared": jobs.submit(private_directory / "run", options=on_both),
        rf"node\d: {python} is not there": jobs.submit(run_dir, PYTHON=python),
        "RUN_DIR=/dev/null/run cannot be made": jobs.submit(Path("/dev/null/run")),
        "run.dir=elsewhere: .* Fix: RUN_DIR=elsewhere": jobs.submit(run_dir, "run.dir=elsewhere"),
        "train.nm_steps = '5': unknown key": jobs.submit(run_dir, "train.nm_steps=5"),
        "parallel.student.*world size|world size": jobs.submit(run_dir, "parallel=tp4"),
    }
    for line, number in refused.items():
        assert_refused(jobs, number, line)
    assert not (run_dir / "metrics.jsonl").exists()


def test_without_a_free_port_a_job_ends(jobs: Jobs, tmp_path: Path) -> None:
    with ExitStack() as stack:
        listener = jobs.cluster.on("node1", "python3", "-c", LISTEN, "29500", "29627")
        stack.callback(listener.wait)
        stack.callback(listener.kill)
        assert listener.stdout and listener.stdout.readline() == "listening\n"
        first = ("--nodelist=node[1-2]",)
        one = jobs.submit(tmp_path / "run", options=first, MASTER_PORT="29501")
        none = jobs.submit(tmp_path / "run", options=first)
        assert_refused(jobs, one, "no free port on node1: something listens on 29501 to 29501")
        assert_refused(jobs, none, r"no free port on node1: something listens on 295\d\d to")


@pytest.fixture
def with_pyxis(
    cluster: SlurmCluster,
    fake_pyxis: Path,
    tmp_path_factory: pytest.TempPathFactory,
    inputs: Path,
) -> Iterator[Jobs]:
    """A cluster of its own, whose srun knows the options of Pyxis."""
    root = tmp_path_factory.mktemp("pyxis") / "root"  # short: slurmstepd has a socket below it
    with SlurmCluster(root, nodes=2, spank_plugin=fake_pyxis) as running:
        yield Jobs(running, inputs)


def test_containers_are_entered_with_the_mounts_that_they_need(
    with_pyxis: Jobs, tmp_path: Path
) -> None:
    """The container itself is a stand-in: fake_pyxis.c."""
    run_dir, seen, python = tmp_path / "run", tmp_path / "seen", tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\necho "$FAKE_PYXIS$GIVEN" >> {seen}\nexec {CHECKOUT}/.venv/bin/python "$@"\n'
    )
    python.chmod(0o755)
    containers = {"CONTAINER_IMAGE": "nvcr.io/nvidia/nemo:26.06", "PYTHON": str(python)}
    number = with_pyxis.submit(
        *(run_dir, "train.num_steps=2"),
        CONTAINER_MOUNTS=f"{tmp_path}:/data:ro",
        TRAINING_SRUN_ARGS="--export=ALL,GIVEN=also --immediate=600",
        **containers,
    )
    job = with_pyxis.cluster.wait(number)
    assert job["ExitCode"] == "0:0", with_pyxis.cluster.log(number)
    wanted = f"image={containers['CONTAINER_IMAGE']};"
    wanted += f"mounts={CHECKOUT}:{CHECKOUT},{run_dir}:{run_dir},{tmp_path}:/data:ro;"
    wanted += f"workdir={run_dir};no-mount-home=;"
    plan, *ranks = seen.read_text().splitlines()
    assert plan == wanted and ranks == [f"{wanted}also"] * 2

    seen.unlink()
    python.write_text(python.read_text().replace("exec", SERVERS_END))
    servers = with_pyxis.submit(
        *(run_dir, *ON_SERVERS, "algorithm.trajectory=rollout"),
        servers=(1, 0),
        SERVER_CONTAINER_IMAGE="vllm/vllm-openai:v0.32.0",
        **containers,
    )
    job = with_pyxis.cluster.wait(servers)
    assert job["ExitCode"] == "3:0", with_pyxis.cluster.log(servers)
    assert "a student server on node2: Exited with exit code 3" in with_pyxis.cluster.log(servers)
    images = [line.split(";")[0].removeprefix("image=") for line in seen.read_text().splitlines()]
    assert images == [containers["CONTAINER_IMAGE"], "vllm/vllm-openai:v0.32.0"]  # plan, server

    missing = with_pyxis.submit(run_dir, CONTAINER_MOUNTS="/no/such:/data", **containers)
    assert_refused(with_pyxis, missing, "the mount /no/such of CONTAINER_MOUNTS does not exist")
    image = with_pyxis.submit(run_dir, CONTAINER_IMAGE="/no/such/image.sqsh")
    assert_refused(with_pyxis, image, "/no/such/image.sqsh is not there")


def test_scripts_are_clean() -> None:
    scripts = [*SCRIPTS, *sorted((CHECKOUT / "slurm" / "lib").glob("*.sh"))]
    result = subprocess.run(
        ["shellcheck", "-x", *map(str, scripts)], capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout
