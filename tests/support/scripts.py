"""Loads scripts that belong to no package, such as benchmarks."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any


def load_script(file: Path) -> Any:
    """Module of a script, which is not run as a program."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
