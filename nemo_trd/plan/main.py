"""Check settings against a cluster, and estimate memory, time and disk. Needs no GPU.

python -m nemo_trd.plan experiment=trd_70b
python -m nemo_trd.plan experiment=trd_8b cluster.training_nodes=2 --json plan.json --plot plan.png
python -m nemo_trd.plan experiment=trd_8b --from runs/trd_8b

Only config.json of the models is read. Exit code: 0 the run fits, 1 it does not fit into the
GPUs, 2 a setting is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys

from nemo_trd.config.arguments import path
from nemo_trd.config.errors import ConfigError
from nemo_trd.config.load import compose
from nemo_trd.plan import show
from nemo_trd.plan.measured import measured_assumptions
from nemo_trd.plan.plan import make_plan
from nemo_trd.plan.plot import plot


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m nemo_trd.plan",
        description="Check settings against a cluster; estimate memory, time and disk.",
    )
    parser.add_argument("overrides", nargs="*", help="as for nemo_trd.train")
    parser.add_argument(
        "--from",
        dest="measured",
        type=path,
        metavar="RUN_DIR",
        help="assume the lengths and speeds that this run has measured",
    )
    parser.add_argument("--json", type=path, metavar="FILE", help="write all figures")
    parser.add_argument("--plot", type=path, metavar="FILE", help="draw memory by part")
    options = parser.parse_intermixed_args(arguments)
    try:
        measured = measured_assumptions(options.measured) if options.measured else {}
        assumed = [f"cluster.assumptions.{name}={value}" for name, value in measured.items()]
        plan = make_plan(compose([*assumed, *options.overrides]))
    except ConfigError as error:
        print(f"nemo_trd: {error}", file=sys.stderr)
        return 2
    print(show.text(plan))
    try:
        if options.json:
            options.json.write_text(json.dumps(show.as_json(plan), indent=1) + "\n")
        if options.plot and plan.memory:
            plot(plan.memory, plan.config.cluster.gpu_memory_gib, options.plot)
    except (OSError, ValueError) as error:  # no such directory; no such image format
        print(f"nemo_trd: {error}", file=sys.stderr)
        return 2
    for problem in plan.findings.problems:
        print(f"nemo_trd: {problem}", file=sys.stderr)
    return plan.exit_code
