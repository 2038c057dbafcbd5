"""The stand-in of NCCL (fake_nccl.c), compiled, and a trainer that uses it on the CPU."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemo_trd.generation import nccl, transport

SOURCE = Path(__file__).with_name("fake_nccl.c")


def compile_fake_nccl(directory: Path) -> Path:
    library = directory / "libnccl.so.2"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, SOURCE]
    subprocess.run(command, check=True, timeout=60)
    return library


def use_fake_nccl(monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    """Let this process's weight sync use it: tensors in host memory, no device, no stream."""
    monkeypatch.setenv("FAKE_NCCL_DIRECTORY", str(library.parent))
    monkeypatch.setattr(nccl, "LIBRARY", str(library))
    stream = SimpleNamespace(cuda_stream=None, query=lambda: True)
    cuda = SimpleNamespace(
        current_device=lambda: None,
        current_stream=lambda: stream,
        device=lambda _: contextlib.nullcontext(),
        synchronize=lambda _: None,
    )
    for module in (nccl, transport):  # and not torch's own: megatron-core asks it too
        monkeypatch.setattr(module, "torch", SimpleNamespace(cuda=cuda))
