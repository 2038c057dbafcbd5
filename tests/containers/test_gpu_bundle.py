"""containers/gpu_bundle.py: parts hold all wheels, and what is there already is left alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from scripts import load_script

ROOT = Path(__file__).resolve().parents[2]


def test_parts_hold_the_wheels_and_only_absent_packages_are_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packing, commands = load_script(ROOT / "containers" / "gpu_bundle.py"), []
    packing.PART_BYTES = 3000
    wheels = {"absent_package-1-py3-none-any.whl": b"a" * 5000, "pytest-1-py3-none-any.whl": b"b"}

    def pip(command: list[str], check: bool) -> None:
        commands.append(command)
        directory = Path(command[command.index("--dest") + 1]) if "--dest" in command else None
        for name, content in wheels.items() if directory else ():
            (directory / name).write_bytes(content)

    monkeypatch.setattr(packing.subprocess, "run", pip)
    packing.pack(tmp_path / "bundle", "3.12")
    download, build = commands
    assert {"--no-deps", "--only-binary=:all:", "3.12", "--platform=any"} <= set(download)
    pinned = {word.split("==")[0] for word in download + build if re.match(r"[\w-]+==", word)}
    assert {"megatron-core", "hydra-core", "pydantic", "liger-kernel", "pytest-timeout"} <= pinned
    assert "antlr4-python3-runtime" in {word.split("==")[0] for word in build}
    assert not {"torch", "ruff", "pre_commit", "setuptools"} & pinned
    parts = sorted((tmp_path / "bundle").glob("wheels.tar.*"))
    assert len(parts) > 2 and all(part.stat().st_size <= 3000 for part in parts)
    assert "python3.12 gpu_bundle.py install" in (tmp_path / "bundle" / "README").read_text()

    there = load_script(tmp_path / "bundle" / "gpu_bundle.py")

    def install(command: list[str], check: bool) -> None:
        (wheel,) = [Path(word) for word in command if word.endswith(".whl")]
        assert wheel.read_bytes() == wheels[wheel.name]
        commands.append(command)

    monkeypatch.setattr(there.subprocess, "run", install)
    there.install()
    assert Path(commands[-1][-1]).name == "absent_package-1-py3-none-any.whl"
    assert {"--no-deps", "--no-index"} <= set(commands[-1])
