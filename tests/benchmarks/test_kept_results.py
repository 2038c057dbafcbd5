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
RECOMMENDATION = DOCS / "comparison" / "recommendation.md"
SOURCES = [*(file.with_name("tables.md") for file in KEPT), RECOMMENDATION]


@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.stem)
def test_kept_results_give_the_tables_and_points_beside_them(file: Path, tmp_path: Path) -> None:
    assert file.stat().st_size < 2**20
    name = SCRIPTS.get(file.stem, f"prefix_{file.stem}")
    script = load_script(ROOT / "benchmarks" / f"{name}.py")
    script.main(["--from", str(file), "--output", str(tmp_path)])
    for name in ("tables.md", "points.csv"):
        assert (tmp_path / name).read_text() == file.with_name(name).read_text()
    assert "<svg" in (tmp_path / f"{file.stem}.svg").read_text()


def test_the_recommendation_is_what_its_rule_gives(tmp_path: Path) -> None:
    script = load_script(ROOT / "benchmarks" / "recommendation.py")
    script.main(["--output", str(tmp_path / "made.md")])
    made = (tmp_path / "made.md").read_text()
    assert made == RECOMMENDATION.read_text()
    page = (DOCS / "comparison.md").read_text()
    for line in made.splitlines()[2:]:
        method, *_, conditions, experiments = (cell.strip() for cell in line.strip("|").split("|"))
        title = "TRD, forward KL" if method == "TRD" else method
        assert f"| {title} | {conditions} | {experiments} |" in page
    # By hand: 0.96 - t of 2 degrees of freedom, 4.30265 * deviation 0.0264575 * sqrt(4 / 3).
    assert script.prediction([0.93, 0.97, 0.98]) == pytest.approx(0.828552, abs=1e-6)


@pytest.mark.parametrize(
    ("page", "sources"),
    [
        (DOCS / "comparison.md", SOURCES),
        *((DOCS / "comparison" / f"{f.stem}.md", [f.with_name("tables.md")]) for f in KEPT),
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else "",
)
def test_pages_have_no_figure_of_their_own(page: Path, sources: list[Path]) -> None:
    known = {figure for source in sources for figure in figures(source.read_text())}
    assert figures(page.read_text()) <= known


def test_nor_has_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    section = text.split("## Does it beat plain on-policy distillation?")[1].split("\n## ")[0]
    found = figures(section)
    assert len(found) > 10
    assert found <= {figure for source in SOURCES for figure in figures(source.read_text())}


def figures(text: str) -> set[str]:
    """Numbers with a decimal point."""
    return set(re.findall(r"\d+\.\d+", text))
