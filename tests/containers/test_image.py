"""The Dockerfile, executed with buildah on stand-ins for the base images, and what it makes, run.

The stand-ins hold the real packages of this environment (local_base.py); what cannot be had here is
NVIDIA's and vLLM's own images. vLLM itself is only a name and a version there.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from local_base import SITE_PACKAGES, closure, make_root
from tiny_models import make_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).parents[2]
REVISION = "0123abc"
# In no base. The other pin, tenacity, is in the base for training, in an older version.
ABSENT = {
    *("accelerate", "antlr4-python3-runtime", "gguf", "hydra-core", "latex2sympy2-extended"),
    *("math-verify", "omegaconf"),
}
COMPOSED = """
from nemo_trd.config.load import compose
print(compose(["experiment=trd_8b"]).cluster.gpus_per_node)
"""
UNPRIVILEGED = ("--user", "1234:1234", "--env", "HOME=/nonexistent")


class Buildah:
    """buildah with a storage of its own."""

    def __init__(self, storage: Path) -> None:
        places = [f"--root={storage / 'root'}", f"--runroot={storage / 'run'}"]
        self._command = ["buildah", *places, "--storage-driver=vfs"]

    def __call__(self, *arguments: str | Path, check: bool = True) -> Any:
        done = subprocess.run(
            [*self._command, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
            env={**os.environ, "BUILDAH_ISOLATION": "chroot"},
        )
        assert not check or done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
        return done

    def base(self, name: str, root: Callable[[Path], None], **environment: str) -> None:
        """An image whose file system `root` makes. Its entry point is as in vLLM's image."""
        container = self("from", "scratch").stdout.strip()
        root(Path(self("mount", container).stdout.strip()))
        settings = {"PATH": "/opt/venv/bin:/usr/bin:/bin", **environment}
        variables = [f"--env={key}={value}" for key, value in settings.items()]
        self("config", *variables, '--entrypoint=["vllm", "serve"]', container)
        self("commit", "--rm", container, name)

    def build(self, base: str, name: str) -> None:
        arguments = [f"--build-arg=BASE={base}", f"--build-arg=REVISION={REVISION}"]
        options = ["--format=docker", "--pull-never", "--layers=false", f"--tag={name}"]
        self("bud", *options, *arguments, REPOSITORY)

    def remove(self) -> None:
        self("rm", "--all", check=False)
        self("rmi", "--all", "--force", check=False)


class Container:
    """One container of an image."""

    def __init__(self, buildah: Buildah, image: str, volume: Path) -> None:
        self._buildah = buildah
        self._volume = f"{volume}:/work"
        self.name = buildah("from", "--pull-never", image).stdout.strip()
        self.files = Path(buildah("mount", self.name).stdout.strip())
        self.config = json.loads(buildah("inspect", self.name).stdout)["Docker"]["config"]

    def run(self, *command: str, options: tuple[str, ...] = ()) -> Any:
        volume = ("--volume", self._volume)
        return self._buildah("run", *options, *volume, self.name, "--", *command, check=False)

    def version(self, distribution: str) -> str | None:
        names = [path.name for path in (self.files / SITE_PACKAGES).glob("*.dist-info")]
        versions = dict(name.removesuffix(".dist-info").split("-") for name in names)
        return versions.get(distribution.replace("-", "_"))


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    if not os.environ.get("CI"):
        if shutil.which("buildah") is None:
            pytest.skip("needs buildah: `make system-packages` installs it")
        if os.geteuid():
            pytest.skip("needs root: buildah's chroot isolation mounts and changes the user")
    storage = tmp_path_factory.mktemp("buildah")
    with open("/tmp/nemo_trd-buildah.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several GB and a core: one at a time
        tool = Buildah(storage)
        yield tool
        tool.remove()
        shutil.rmtree(storage)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip downloads while an image is built; the bases have no index to ask."""
    directory = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "--quiet", "wheel", f"--wheel-dir={directory}"]
    pins = REPOSITORY / "containers" / "requirements-train.txt"
    build_tools = [f"--constraint={REPOSITORY / 'constraints.txt'}", "hatchling"]
    for wanted in (["--no-deps", f"--requirement={pins}"], build_tools):
        subprocess.run([*pip, *wanted], check=True, timeout=300)
    return directory


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with models and data that every user may write to, mounted at /work."""
    root = tmp_path_factory.mktemp("work")
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    for seed, role in enumerate(("student", "teacher")):
        make_model(root / role, "qwen3", seed=seed, tokenizer=True, **sizes)
    rows = [{"question": f"{n}+1?", "answer": f"so #### {n + 1}"} for n in range(6)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path in (root, *root.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    return root


def listing(site_packages: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file."""
    files = {path: path.stat() for path in site_packages.rglob("*") if path.is_file()}
    return {
        str(path.relative_to(site_packages)): (stat.st_size, int(stat.st_mtime))
        for path, stat in files.items()
    }


@pytest.fixture(scope="module")
def trainer(buildah: Buildah, wheels: Path, work: Path) -> tuple[Container, dict]:
    """The image for training, and the files that its base had in site-packages."""
    before: dict[str, tuple[int, int]] = {}

    def root(directory: Path) -> None:
        packages = closure(["nemo_trd", "pip", "setuptools"]) - ABSENT - {"nemo-trd"}
        make_root(directory, packages, wheels)
        older = directory / SITE_PACKAGES / "tenacity-9.0.0.dist-info"
        shutil.rmtree(directory / SITE_PACKAGES / f"tenacity-{version('tenacity')}.dist-info")
        write_metadata(older, "tenacity", "9.0.0")
        before.update(listing(directory / SITE_PACKAGES))

    buildah.base("localhost/base", root, PIP_CONSTRAINT="/etc/pip/constraint.txt")
    buildah.build("localhost/base", "localhost/trainer")
    return Container(buildah, "localhost/trainer", work), before


@pytest.fixture(scope="module")
def server(buildah: Buildah, wheels: Path, work: Path) -> Container:
    """The image for servers, on a base that has of vLLM only the name."""

    def root(directory: Path) -> None:
        make_root(directory, closure(["pydantic", "PyYAML", "packaging", "pip"]), wheels)
        write_metadata(directory / SITE_PACKAGES / "vllm-0.32.0.dist-info", "vllm", "0.32.0")
        (directory / SITE_PACKAGES / "vllm").mkdir()
        (directory / SITE_PACKAGES / "vllm/__init__.py").touch()

    buildah.base("localhost/vllm", root)
    buildah.build("localhost/vllm", "localhost/server")
    return Container(buildah, "localhost/server", work)


def write_metadata(directory: Path, name: str, number: str) -> None:
    directory.mkdir()
    (directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")


def test_training_image_leaves_the_packages_of_its_base_untouched(trainer: Any) -> None:
    container, before = trainer
    after = listing(container.files / SITE_PACKAGES)
    assert {path: after.get(path) for path in before} == before
    assert "torch/__init__.py" in before and "megatron/core/__init__.py" in before
    for name in ("torch", "megatron-core", "transformers", "numpy"):
        assert container.version(name) == version(name)
    assert container.version("tenacity") == "9.0.0"
    assert {name for name in ABSENT if container.version(name) is None} == set()
    new = {path.split("/")[0] for path in after.keys() - before.keys()}
    new = {name for name in new if name.endswith(".dist-info")}
    assert len(new) == len(ABSENT) + 1, new  # and nemo_trd


def test_labels_say_what_the_image_is(trainer: Any) -> None:
    labels = trainer[0].config["Labels"]
    prefix = "org.opencontainers.image."
    said = {key.removeprefix(prefix): text for key, text in labels.items() if prefix in key}
    assert said["title"] == "nemo_trd" and said["licenses"] == "Apache-2.0"
    assert said["version"] == version("nemo_trd")
    assert (said["revision"], said["base.name"]) == (REVISION, "localhost/base")


@pytest.mark.parametrize("options", [(), UNPRIVILEGED], ids=["root", "unprivileged"])
def test_health_command_of_the_training_image_succeeds(
    trainer: Any, options: tuple[str, ...]
) -> None:
    container = trainer[0]
    assert container.config["Healthcheck"]["Test"][0] == "CMD"
    health = container.config["Healthcheck"]["Test"][1:]
    assert container.config.get("Entrypoint") in (None, [])
    assert container.config["Cmd"] == health
    done = container.run(*health, options=options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "role train" in done.stdout and "OK: a run can work here" in done.stdout
    assert [line.split() for line in done.stdout.splitlines() if "caches" in line] == [
        ["caches", "yes"]
    ]


def test_unprivileged_user_plans_and_trains(trainer: Any, work: Path) -> None:
    container = trainer[0]
    asked = container.run("python3", "-m", "nemo_trd.train", "--help", options=UNPRIVILEGED)
    assert asked.returncode == 0 and "train" in asked.stdout, asked.stderr
    plan = ["python3", "-m", "nemo_trd.plan", "experiment=trd_8b"]
    planned = container.run(*plan, options=UNPRIVILEGED)
    assert "GiB" in planned.stdout, planned.stdout + planned.stderr
    run = [
        *("model=local", "data=gsm8k", "data.max_prompt_tokens=64", "data.verifier=exact"),
        *(f"model.{role}.path=/work/{role}" for role in ("student", "teacher")),
        *("data.train.path=/work/data.jsonl", "run.dir=/work/run"),
        *("refinement.templates.opd='{problem} {rollout}'", "refinement.max_context_tokens=200"),
        *("generation.rollout.max_tokens=12", "generation.refinement.max_tokens=12"),
        *("train.num_steps=2", "train.prompts_per_step=2", "precision.dtype=fp32"),
        *("refinement.on_failure=rollout", "logging.progress=false"),
    ]
    one_thread = ("--env", "OMP_NUM_THREADS=1")
    trained = container.run(
        "python3", "-m", "nemo_trd.train", *run, options=(*UNPRIVILEGED, *one_thread)
    )
    assert trained.returncode == 0, trained.stdout + trained.stderr
    lines = (work / "run/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 and (work / "run").stat().st_uid == 1234


def test_server_image_serves_and_adds_nothing_but_what_reads_settings(server: Container) -> None:
    assert server.config.get("Entrypoint") in (None, [])
    added = ABSENT - {"omegaconf", "antlr4-python3-runtime", "hydra-core"}
    assert server.version("hydra-core") and not any(server.version(name) for name in added)
    for options in ((), UNPRIVILEGED):
        for name, option in (("serve", "--weight-backend"), ("serve.node", "--reached-from")):
            command = ["python3", "-m", f"nemo_trd.{name}", "--help"]
            done = server.run(*command, options=options)
            assert done.returncode == 0 and option in done.stdout, done.stderr
        settings = ["python3", "-c", COMPOSED]
        done = server.run(*settings, options=options)
        assert done.returncode == 0 and done.stdout == "8\n", done.stderr


def test_health_command_of_the_server_image_says_that_a_gpu_is_missing(server: Container) -> None:
    done = server.run(*server.config["Healthcheck"]["Test"][1:], options=UNPRIVILEGED)
    faults = [line for line in done.stdout.splitlines() if line.startswith("FAULT")]
    assert "role server" in done.stdout and done.returncode == 1, done.stdout + done.stderr
    assert len(faults) == 1 and "needs a GPU" in faults[0], faults
