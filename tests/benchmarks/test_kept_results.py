"""docs/comparison: tables and figures are those of the results that are kept beside them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
KEPT = sorted((DOCS / "comparison").glob("*/*.json"))
SCRIPTS = {"methods": "trd_vs_opd"}  # all others are prefix_NAME.py
SOURCES = [DOCS / "comparison" / "methods.md", *(file.with_name("tables.md") for file in KEPT)]


@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.stem)
def test_kept_results_give_the_tables_and_points_beside_them(file: Path, tmp_path: Path) -> None:
    assert file.stat().st_size < 2**20
    name = SCRIPTS.get(file.stem, f"prefix_{file.stem}")
    script = load_script(ROOT / "benchmarks" / f"{name}.py")
    script.main(["--from", str(file), "--output", str(tmp_path)])
    for name in ("tables.md", "points.csv"):
        assert (tmp_path / name).read_text() == file.with_name(name).read_text()
    assert "<svg" in (tmp_path / f"{file.stem}.svg").read_text()


@pytest.mark.parametrize(
    ("page", "sources"),
    [
        (DOCS / "comparison.md", SOURCES),
        *((DOCS / "comparison" / f"{f.stem}.md", [f.with_name("tables.md")]) for f in KEPT),
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else "",
)
def test_pages_have_no_figure_of_their_own(page: Path, sources: list[Path]) -> None:
    assert figures(page) <= {figure for source in sources for figure in figures(source)}


def figures(page: Path) -> set[str]:
    """Numbers with a decimal point."""
    return set(re.findall(r"\d+\.\d+", page.read_text()))
