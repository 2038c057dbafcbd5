"""Draw the rooms of the package on their floors, and who imports whom: docs/rooms.svg.

python docs/draw_rooms.py

The arrows are read from the code. Only those are drawn that no longer way implies, and none to
`config`, which every room may import. `FLOORS` is the one list of the floors: the tests read it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from functools import cache
from html import escape
from pathlib import Path

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
        "launch": "ranks of a machine",
        "smollm2": "a real small model",
    },
]
ROOMS = {room: number for number, floor in enumerate(FLOORS) for room in floor}

WIDTH, BOX, HEIGHT, STEP, LANE, MARGIN = 860, 150, 40, 76, 16, 12
Point = tuple[int, int]
Node = tuple[int, str]  # (floor, room or lane of an arrow that passes the floor)


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
    """The arrows that a drawn picture has."""
    lines = [line for line in picture.splitlines() if line.startswith('<path class="arrow"')]
    return sorted((line.split('"')[3], line.split('"')[5]) for line in lines)


def rooms_in(picture: str) -> list[tuple[str, int]]:
    """(room, its floor) of all rooms that a drawn picture has."""
    lines = [line for line in picture.splitlines() if line.startswith('<g class="room"')]
    return sorted((line.split('"')[3], int(line.split('"')[5])) for line in lines)


def draw() -> str:
    """The picture, as SVG. Its colours are readable on white and on black."""
    arrows = drawn_arrows()
    ways = {arrow: _way(*arrow) for arrow in arrows}
    places = _places(ways.values())
    top = len(FLOORS) - 1
    height = top * STEP + HEIGHT + 2 * MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" font-family="Helvetica, Arial, sans-serif">',
        "<title>Rooms of nemo_trd: an arrow goes from the room that imports</title>",
        "<style>.arrow { fill: none; stroke: #7b8aa0; stroke-width: 1.4; } "
        "rect { fill: #e6edf7; stroke: #5478a8; } .start rect { fill: #ffe9c2; stroke: #b97a10; } "
        "text { fill: #14233a; text-anchor: middle; font-size: 11px; } "
        ".name { font-size: 14px; font-weight: bold; }</style>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" '
        'markerHeight="6" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#7b8aa0"/></marker>'
        "</defs>",
    ]
    for (one, other), way in ways.items():
        lines.append(
            f'<path class="arrow" data-from="{one}" data-to="{other}" '
            f'd="{_curve(way, places, top)}" marker-end="url(#head)"/>'
        )
    for number, floor in enumerate(FLOORS):
        for name, words in floor.items():
            lines += _box(name, number, words, places[number, name], _y(number, top))
    return "\n".join([*lines, "</svg>", ""])


def _way(one: str, other: str) -> list[Node]:
    """The nodes of an arrow: its two rooms, and a lane on each floor between."""
    between = range(ROOMS[one] - 1, ROOMS[other], -1)
    lanes = [(floor, f"{one}>{other}") for floor in between]
    return [(ROOMS[one], one), *lanes, (ROOMS[other], other)]


def _places(ways: Iterable[list[Node]]) -> dict[Node, int]:
    """The middle of every room and lane, from the left, in pixels.

    Each is drawn to the middle of its neighbours above and below, again and again; those of a
    floor are then put in that order, and moved apart until they do not overlap.
    """
    neighbours: dict[Node, list[Node]] = {}
    for way in ways:
        for one, other in zip(way, way[1:], strict=False):
            neighbours.setdefault(one, []).append(other)
            neighbours.setdefault(other, []).append(one)
    floors = [[(number, name) for name in floor] for number, floor in enumerate(FLOORS)]
    for node in sorted(neighbours):
        if node not in floors[node[0]]:
            floors[node[0]].append(node)
    middle = {
        node: WIDTH * (2 * place + 1) / (2 * len(nodes))
        for nodes in floors
        for place, node in enumerate(nodes)
    }
    for sweep in range(60):
        for nodes in floors[:: 1 if sweep % 2 else -1]:
            drawn = {n: _mean(middle, neighbours.get(n, [n])) for n in nodes}
            middle |= _apart(sorted(nodes, key=lambda n: (drawn[n], n)), drawn)
    return {node: round(x) for node, x in middle.items()}


def _mean(middle: Mapping[Node, float], nodes: list[Node]) -> float:
    return sum(middle[node] for node in nodes) / len(nodes)


def _apart(nodes: list[Node], drawn: Mapping[Node, float]) -> dict[Node, float]:
    """Places in this order without overlap: groups that touch move together, as one."""
    groups: list[tuple[list[Node], list[float]]] = []  # nodes, and where each would put the first
    for node in nodes:
        group, starts = [node], [drawn[node]]
        while groups and _mean_of(groups[-1][1]) + _length(groups[-1][0], group) > _mean_of(starts):
            before, wishes = groups.pop()
            length = _length(before, group)
            group, starts = before + group, wishes + [start - length for start in starts]
        groups.append((group, starts))
    places = {}
    for group, starts in groups:
        for place, node in enumerate(group):
            offset = _length(group[:place], [node]) if place else 0
            places[node] = _mean_of(starts) + offset
    left = min((x - _half(n) for n, x in places.items()), default=0)
    right = max((x + _half(n) for n, x in places.items()), default=0)
    shift = max(0, MARGIN - left) - max(0, right - WIDTH + MARGIN)
    return {node: x + shift for node, x in places.items()}


def _mean_of(values: list[float]) -> float:
    return sum(values) / len(values)


def _length(before: list[Node], after: list[Node]) -> float:
    """From the middle of the first node of `before` to that of the first of `after`."""
    row = [*before, after[0]]
    pairs = zip(row, row[1:], strict=False)
    return sum(_half(one) + _half(other) + LANE for one, other in pairs)


def _half(node: Node) -> float:
    return BOX / 2 if node[1] in ROOMS else 0


def _y(floor: int, top: int) -> int:
    return MARGIN + (top - floor) * STEP


def _curve(way: list[Node], places: Mapping[Node, int], top: int) -> str:
    """A line from the foot of one box to the head of the other, upright on every floor."""
    x, y = places[way[0]], _y(way[0][0], top) + HEIGHT
    path = f"M{x} {y}"
    for node in way[1:]:
        below_x, below_y = places[node], _y(node[0], top)
        half = (y + below_y) // 2
        path += f" C{x} {half} {below_x} {half} {below_x} {below_y}"
        if node != way[-1]:
            path += f" V{below_y + HEIGHT}"
        x, y = below_x, below_y + HEIGHT
    return path


def _box(name: str, floor: int, words: str, x: int, y: int) -> list[str]:
    left, width = (MARGIN, WIDTH - 2 * MARGIN) if name == "config" else (x - BOX // 2, BOX)
    middle = left + width // 2
    start = ' class="start"' if name == "train" else ""
    return [
        f'<g class="room" data-room="{name}" data-floor="{floor}">',
        f'<g{start}><rect x="{left}" y="{y}" width="{width}" height="{HEIGHT}" rx="6"/></g>',
        f'<text class="name" x="{middle}" y="{y + 17}">{name}</text>',
        f'<text x="{middle}" y="{y + 32}">{escape(words)}</text></g>',
    ]


if __name__ == "__main__":
    PICTURE.write_text(draw())
    print(PICTURE)
