"""Who may import whom: only rooms of a lower floor, and within a room nobody in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "nemo_trd"
FLOORS = [
    "config",
    "loss models verifiers",
    "data",
    "records",
    "preflight",
    "algorithm generation plan",
    "distributed serve toy",
    "doctor megatron",
    "evaluate prefix_failure",
    "report run",
    "train",
    "adapters launch quickstart smollm2",
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def imports(file: Path) -> set[Path]:
    """Files of the package that `file` imports, inside functions too."""
    modules = {}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules |= {f"{node.module}.{name.name}": node.module for name in node.names}
        elif isinstance(node, ast.Import):
            modules |= {name.name: name.name for name in node.names}
    places = [(source(name), source(module)) for name, module in modules.items()]
    found = {exact or module for exact, module in places}
    return {f for f in found if f} - {file, PACKAGE / "__init__.py"}


def source(module: str) -> Path | None:
    path = PACKAGE.parent.joinpath(*module.split("."))
    files = path.with_suffix(".py"), path / "__init__.py"
    return next((f for f in files if PACKAGE in f.parents and f.is_file()), None)


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


ARROWS = {f: imports(f) for f in PACKAGE.rglob("*.py") if f != PACKAGE / "__init__.py"}


def test_no_import_goes_upwards_or_sideways() -> None:
    wrong = [
        f"{file.relative_to(PACKAGE)} imports {other.relative_to(PACKAGE)}"
        for file, others in ARROWS.items()
        for other in others
        if room(file) != room(other) and FLOOR[room(other)] >= FLOOR[room(file)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_imports_make_a_circle() -> None:
    TopologicalSorter(ARROWS).prepare()  # CycleError names the files


def test_every_room_has_a_floor_and_a_door_plate() -> None:
    assert {*ROOMS, "train", "launch", "quickstart", "smollm2"} == {*FLOOR}
    for name in ROOMS:
        plate = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text())) or ""
        assert 3 <= len(plate.splitlines()) <= 7, f"nemo_trd/{name}/__init__.py: {plate}"
