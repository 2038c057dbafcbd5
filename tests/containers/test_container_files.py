"""What the image is made from agrees with the rest of the repository."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import files, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from scripts import load_script

import nemo_trd

REPOSITORY = Path(__file__).parents[2]
CONTAINERS = REPOSITORY / "containers"


def pins(role: str) -> dict[str, str]:
    """Normalised name -> version."""
    lines = (CONTAINERS / f"requirements-{role}.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): number for name, number in pairs}


@pytest.mark.parametrize("role", ["train", "server"])
def test_images_get_the_versions_that_are_tested_and_no_compiled_package(role: str) -> None:
    for name, number in pins(role).items():
        assert version(name) == number, name
        assert not [file for file in files(name) or [] if file.suffix == ".so"], name


def test_packages_added_to_an_image_need_nothing_that_its_base_may_lack() -> None:
    """They are installed without what they need, so that is added too, or surely there."""
    base = {
        *("torch", "numpy", "pyyaml", "packaging", "psutil", "requests", "tqdm", "sympy"),
        *("huggingface-hub", "safetensors"),
    }
    for role in ("train", "server"):
        for name in pins(role):
            for need in map(Requirement, requires(name) or []):
                if need.marker is None or need.marker.evaluate({"extra": ""}):
                    assert canonicalize_name(need.name) in base | pins(role).keys(), (name, need)


def test_this_package_takes_what_the_base_of_the_training_image_pins() -> None:
    pinned = {"torch": "2.12.0", "megatron-core": "0.18.0", "numpy": "1.26.4", "httpx": "0.27.2"}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    ranges = {need.name: need.specifier for need in map(Requirement, project["dependencies"])}
    assert [name for name, number in pinned.items() if number not in ranges[name]] == []


def test_dockerfile_labels_the_version_of_the_package() -> None:
    written = re.search(r"^ARG VERSION=(.+)$", (REPOSITORY / "Dockerfile").read_text(), re.M)
    assert written is not None and written[1] == nemo_trd.__version__


def test_only_absent_packages_are_installed() -> None:
    module = load_script(CONTAINERS / "install_absent.py")
    assert module.absent(["numpy==0.1", "no-such-thing==1.0"]) == ["no-such-thing==1.0"]
