"""Who may import whom: only rooms of a lower floor, and within a room nobody in a circle.

The floors stand in docs/draw_rooms.py, which draws them.
"""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter

from draw_rooms import FLOORS, PACKAGE, arrows_between_files, room
from draw_rooms import ROOMS as FLOOR

ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
ARROWS = arrows_between_files()


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
    commands = ("train", "launch", "quickstart", "generate", "smollm2")
    assert sorted([*ROOMS, *commands]) == sorted(name for floor in FLOORS for name in floor)
    for name in ROOMS:
        plate = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text())) or ""
        assert 3 <= len(plate.splitlines()) <= 7, f"nemo_trd/{name}/__init__.py: {plate}"
