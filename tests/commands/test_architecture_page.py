"""docs/architecture.md and its picture say what the tree is, and no page names a file not there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from draw_rooms import PACKAGE, PICTURE, ROOMS, ROOT, arrows_in, drawn_arrows, rooms_in

PAGE = ROOT / "docs" / "architecture.md"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", "Dockerfile")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("containers/*.txt")),
    *sorted(ROOT.glob("conf/**/*.yaml")),
    *sorted(ROOT.glob("slurm/**/*.sh")),
]
PLACES = "benchmarks|conf|containers|docs|examples/nemo_aligner|nemo_trd|slurm|tests"
PATH = re.compile(rf"(?<![\w./-])(?:{PLACES})/[\w./*-]*[\w*/]")
MODULE = re.compile(r"(?<![\w./-])nemo_trd(?:\.[a-zA-Z_]\w*)+(?!\.\w)")
PYTHON_FILE = re.compile(r"`([\w/]+\.py)`")  # also one named from within its room
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
ANY_NAME = re.compile(r"\b[A-Z]{3,}\b")  # NAME in a path stands for any
SUFFIXES = ("sqsh", "yaml")  # nemo_trd.sqsh is a file that a reader makes
FOREIGN = ("recipes.md",)  # names files of other projects


def missing(page: str, text: str, folder: Path) -> Iterator[str]:
    """Paths, modules and links of a page that lead nowhere."""
    for path in PATH.findall(text):
        if not any(ROOT.glob(ANY_NAME.sub("*", path).rstrip("/"))):
            yield path
    for file in PYTHON_FILE.findall(text) if page not in FOREIGN else ():
        if not any(f"/{known}".endswith(f"/{file}") for known in python_files()):
            yield file
    for link in LINK.findall(text) if page.endswith(".md") else ():
        if not (folder / link).exists():
            yield link
    for module in MODULE.findall(text):
        if not module.endswith(SUFFIXES) and not names_something(module):
            yield module


@cache
def python_files() -> list[str]:
    folders = [ROOT / place for place in PLACES.split("|")]
    files = [file for folder in folders for file in folder.rglob("*.py")]
    return [file.relative_to(ROOT).as_posix() for file in files]


def names_something(dotted: str) -> bool:
    """Whether it is a room, a module, or a name that a module has."""
    parts = dotted.split(".")
    for length in (len(parts), len(parts) - 1):
        place = PACKAGE.parent.joinpath(*parts[:length])
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.is_file() and length > 1:
                name = rf"(?m)^(?:def|class|async def)?\s*{re.escape(parts[-1])}\b"
                return length == len(parts) or bool(re.search(name, file.read_text()))
    return False


def test_every_room_has_its_paragraph_and_no_other_has() -> None:
    names = re.findall(r"\*\*`nemo_trd/(\w+)(?:/|\.py)`\*\*", PAGE.read_text())
    assert sorted(names) == sorted(ROOMS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    assert not sorted(set(missing(page.name, page.read_text(), page.parent)))


def test_a_wrong_name_is_noticed() -> None:
    right = (
        "`train.py` `loss/fused.py` nemo_trd.train nemo_trd/train.py nemo_trd.loss "
        "conf/experiment/ conf/experiment/NAME.yaml runs/docs/none [here](README.md) nemo_trd.sqsh"
    )
    wrong = "`gone.py` conf/gone.yaml [gone](gone.md) nemo_trd.gone nemo_trd.train.gone"
    assert not list(missing("README.md", right, ROOT))
    assert sorted(missing("README.md", wrong, ROOT)) == [
        *("conf/gone.yaml", "gone.md", "gone.py", "nemo_trd.gone", "nemo_trd.train.gone")
    ]


def test_ranks_are_known_where_contributing_says() -> None:
    rule = (ROOT / "CONTRIBUTING.md").read_text().split("- Ranks are known")[1].split("\n- ")[0]
    places = [ROOT / path for path in PATH.findall(rule)]
    asking = [file for file in PACKAGE.rglob("*.py") if asks_ranks(file)]
    assert not [f for f in asking if not any(f.is_relative_to(place) for place in places)]
    assert len(asking) > 15


def asks_ranks(file: Path) -> bool:
    """Whether it imports collectives, or what is built on them."""
    modules = ("torch.distributed", "nemo_trd.distributed.exchange", "nemo_trd.distributed.process")
    found = re.findall(r"(?m)^\s*(?:import|from) ([\w.]+)(?: import (\w+))?", file.read_text())
    return any(f"{module}.{name}".startswith(modules) for module, name in found)


def test_the_picture_is_what_the_imports_give() -> None:
    picture = PICTURE.read_text()
    again = "run .venv/bin/python docs/draw_rooms.py"
    assert arrows_in(picture) == drawn_arrows(), again
    assert rooms_in(picture) == sorted(ROOMS.items()), again
    assert len(rooms_in(picture)) > 20 and len(arrows_in(picture)) > 20


def test_an_arrow_that_a_longer_way_implies_is_left_out() -> None:
    arrows = drawn_arrows()
    assert ("train", "run") in arrows
    assert ("train", "data") not in arrows  # train -> run -> ... -> data
    assert not [arrow for arrow in arrows if "config" in arrow]
