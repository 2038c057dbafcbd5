"""Draw the rooms of the package on their floors, and who imports whom: docs/rooms.svg.

python docs/draw_rooms.py

The arrows are read from the code. Only those are drawn that no longer way implies, and none to
`config`, which every room may import. `FLOORS` is the one list of the floors: the tests read it.
Graphviz lays it out (`make system-packages`).
"""

from __future__ import annotations

import ast
import subprocess
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nemo_trd"
PICTURE = ROOT / "docs" / "rooms.svg"

# From the ground up; a room imports from lower floors only. Room -> what the picture says of it.
FLOORS = [
    {"config": "conf/ in types: every setting, its meaning, and the rules between settings"},
    {
        "loss": "D(pi_T, pi_theta)",
        "models": "model directories",
        "verifiers": "is an answer right",
    },
    {"data": "problems and types"},
    {"records": "what is in RUN_DIR"},
    {"preflight": "refused before a start"},
    {
        "algorithm": "the paper, pure",
        "generation": "asking for samples",
        "plan": "memory, time, disk",
    },
    {"distributed": "ranks", "serve": "vLLM servers", "toy": "the arithmetic task"},
    {"megatron": "student and teacher", "doctor": "can a run work here"},
    {"evaluate": "avg@k, pass@k", "prefix_failure": "where rollouts fail"},
    {"run": "around the loop", "report": "one HTML page"},
    {"train": "THE LOOP"},
    {
        "adapters": "other recipes",
        "quickstart": "a whole toy run",
        "generate": "pairs, drawn once",
        "launch": "ranks of a machine",
        "smollm2": "a real small model",
    },
]
ROOMS = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def imports(file: Path) -> set[Path]:
    """Files of the package that `file` imports, inside functions too."""
    modules = {}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules |= {f"{node.module}.{name.name}": node.module for name in node.names}
        elif isinstance(node, ast.Import):
            modules |= {name.name: name.name for name in node.names}
    places = [(_source(name), _source(module)) for name, module in modules.items()]
    files = {exact or module for exact, module in places}
    return {f for f in files if f} - {file, PACKAGE / "__init__.py"}


def _source(module: str) -> Path | None:
    path = PACKAGE.parent.joinpath(*module.split("."))
    files = path.with_suffix(".py"), path / "__init__.py"
    return next((f for f in files if PACKAGE in f.parents and f.is_file()), None)


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def arrows_between_files() -> dict[Path, set[Path]]:
    files = sorted(PACKAGE.rglob("*.py"))
    return {f: imports(f) for f in files if f != PACKAGE / "__init__.py"}


def arrows_between_rooms() -> set[tuple[str, str]]:
    """(importing room, imported room), all of them."""
    arrows = arrows_between_files()
    pairs = {(room(file), room(other)) for file, others in arrows.items() for other in others}
    return {(one, other) for one, other in pairs if one != other}


def drawn_arrows() -> list[tuple[str, str]]:
    """Those that the picture shows: none to `config`, none that a longer way implies."""
    below: dict[str, set[str]] = {name: set() for name in ROOMS}
    for one, other in arrows_between_rooms():
        if other != "config":
            below[one].add(other)
    reached: dict[str, set[str]] = {}
    for name in sorted(ROOMS, key=ROOMS.__getitem__):  # lower floors first
        reached[name] = below[name].union(*(reached[other] for other in below[name]))
    return sorted(
        (one, other)
        for one, others in below.items()
        for other in others
        if not any(other in reached[between] for between in others - {other})
    )


def arrows_in(picture: str) -> list[tuple[str, str]]:
    """(importing room, imported room) of all arrows that a drawn picture has."""
    groups = ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}g")
    names = [group.get("id", "") for group in groups if group.get("class") == "edge"]
    return sorted((one, other) for one, other in (name.split(">") for name in names))


def rooms_in(picture: str) -> list[tuple[str, int]]:
    """(room, its floor) of all rooms that a drawn picture has."""
    groups = ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}g")
    names = [group.get("id", "") for group in groups if group.get("class") == "node"]
    return sorted((room, int(floor)) for room, floor in (name.split("@") for name in names))


def graph() -> str:
    """The rooms and arrows in Graphviz's language; colours are readable on white and on black."""
    lines = [
        "digraph rooms {",
        'bgcolor=transparent; newrank=true; ranksep=0.4; nodesep=0.25; size="9,12";',
        'node [shape=box, style="rounded,filled", fillcolor="#e6edf7", color="#5478a8",',
        'fontname="Helvetica,Arial,sans-serif", fontsize=11, fontcolor="#14233a"];',
        'edge [color="#7b8aa0", arrowsize=0.7];',
    ]
    for number, floor in enumerate(FLOORS):
        for name, words in floor.items():
            fill = ', fillcolor="#ffe9c2", color="#b97a10"' if name == "train" else ""
            lines.append(f'{name} [id="{name}@{number}", label=<<b>{name}</b><br/>{words}>{fill}];')
        lines.append(f"{{ rank=same; {'; '.join(floor)} }}")
    # Floors stay one above the other, also where no arrow says so.
    stairs = " -> ".join(next(iter(floor)) for floor in reversed(FLOORS))
    lines.append(f"{stairs} [style=invis, weight=0];")
    lines += [f'{one} -> {other} [id="{one}>{other}"];' for one, other in drawn_arrows()]
    return "\n".join([*lines, "}"])


if __name__ == "__main__":
    dot = ["dot", "-Tsvg"]
    drawn = subprocess.run(dot, input=graph(), capture_output=True, text=True, check=True).stdout
    PICTURE.write_text(drawn)
    print(PICTURE)
