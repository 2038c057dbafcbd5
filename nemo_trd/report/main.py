"""One HTML page on a run, or on several beside each other, from their records.

python -m nemo_trd.report runs/quickstart
python -m nemo_trd.report runs/trd runs/vanilla --output comparison.html

The page holds everything in itself: no script, no network. Exit code 2: a directory is none of a
run, or the page cannot be written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from nemo_trd.config.arguments import path
from nemo_trd.config.errors import ConfigError
from nemo_trd.records.read import RunRecords, read_runs
from nemo_trd.report import figures, prefix, tables
from nemo_trd.report.marked import LEVELS, choose, show
from nemo_trd.report.plots import run_color, run_marker

SAMPLES = 10
_TEMPLATES = Path(__file__).parent


def page(runs: Sequence[RunRecords]) -> str:
    """The report of some runs as HTML. Whatever the records hold is escaped."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    samples = choose([run.samples for run in runs], SAMPLES)
    return environment.get_template("page.html").render(
        css=Markup((_TEMPLATES / "page.css").read_text(encoding="utf-8")),
        runs=runs,
        marks=[(run_color(position), run_marker(position)) for position in range(len(runs))],
        at_a_glance=[tables.at_a_glance(run) for run in runs],
        learning=figures.learning(runs),
        rewriting=figures.rewriting(runs),
        changes=[tables.changes(run) for run in runs],
        likelihood=figures.likelihood(runs),
        nll=[tables.nll(run) for run in runs],
        time=figures.time(runs),
        phases=tables.phases(runs),
        pools=tables.pools(runs),
        staleness=figures.staleness(runs),
        ages=[tables.staleness(run) for run in runs],
        prefix_failure=[prefix.section(position, run) for position, run in enumerate(runs)],
        samples=[show(run, record) for run, record in samples],
        samples_recorded=sum(len(run.samples) for run in runs),
        levels=LEVELS,
        settings=tables.settings(runs),
    )


def write_report(directories: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page to `output`, or into the first run's directory. Returns its path.

    Raises:
        ConfigError: a directory is none of a run.
    """
    runs = read_runs(directories)
    output = output or directories[0] / "report.html"
    output.write_text(page(runs), encoding="utf-8")
    return output


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m nemo_trd.report", description="One HTML page of what became of runs."
    )
    parser.add_argument("run_dir", nargs="+", type=path, metavar="RUN_DIR", help="a run.dir")
    parser.add_argument(
        "--output", type=path, metavar="FILE", help="(default: report.html in the first RUN_DIR)"
    )
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.run_dir, options.output))
    except (ConfigError, OSError) as error:
        print(f"nemo_trd: {error}", file=sys.stderr)
        return 2
    return 0
