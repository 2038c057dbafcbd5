"""Runs TRD once from end to end on the toy arithmetic task: warm starts, distillation, results.

python -m nemo_trd.quickstart [key=value ...]     settings of conf/experiment/quickstart.yaml
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from nemo_trd.config.errors import ConfigError
from nemo_trd.config.load import compose
from nemo_trd.config.schema import Config
from nemo_trd.records.last_line import end_process
from nemo_trd.report.main import write_report
from nemo_trd.toy import warm_start
from nemo_trd.train import launch


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m nemo_trd.quickstart", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="as for nemo_trd.train, beside those of conf/experiment/quickstart.yaml",
    )
    overrides = parser.parse_args(arguments).overrides
    config = compose(["experiment=quickstart", *overrides])
    toy = Path(config.model.student.path).parent
    torch.set_num_threads(min(2, torch.get_num_threads()))
    try:
        warm_start.make(toy, config.run.seed)
    except RuntimeError as error:  # a model did not pass its gates
        end_process(f"nemo_trd: {error}", 1)
    torch.set_num_threads(1)  # tiny models run faster so; see nemo_trd/generation/local.py
    exit_code = launch(config)
    if exit_code == 0:
        print(report(config, json.loads((config.run_dir / "summary.json").read_text())))
        print(f"  {'report':<12} {write_report([config.run_dir])}")
    return exit_code


def report(config: Config, summary: dict[str, Any]) -> str:
    """Text with the results of a run and the paths of its files."""
    k = config.evaluation.samples_per_problem
    lines = ["", f"Held-out accuracy after {summary['steps']} steps of TRD"]
    for moment in ("before", "after"):
        score = summary[moment]
        if score is None:
            lines.append(f"  {moment:<7} not evaluated")
            continue
        lines.append(
            f"  {moment:<7} avg@{k} {score[f'avg@{k}']:.3f} ± {score['stderr']:.3f}   "
            f"pass@{k} {score[f'pass@{k}']:.3f}   ({score['problems']} problems)"
        )
    counts = summary["refinement"]
    for old, new, verb in (("wrong", "right", "repaired"), ("right", "wrong", "spoiled")):
        changed = counts[f"{old}_to_{new}"]
        whole = changed + counts[f"{old}_to_{old}"]
        share = changed / whole if whole else 0.0
        lines.append(f"The teacher {verb} {changed} of {whole} {old} rollouts ({share:.1%})")
    lines += [f"  {name:<12} {path}" for name, path in summary["paths"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigError as error:
        end_process(f"nemo_trd: {error}", 2)
