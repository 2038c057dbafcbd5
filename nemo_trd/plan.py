"""Check settings against a cluster, and estimate memory, time and disk. Needs no GPU.

python -m nemo_trd.plan experiment=trd_70b
python -m nemo_trd.plan experiment=trd_8b cluster.training_nodes=2 --json plan.json --plot plan.png

Only config.json of the models is read. Exit code: 0 the run fits, 1 it does not fit into the
GPUs, 2 a setting is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field

from nemo_trd.arguments import path
from nemo_trd.config import Config, ConfigError, compose
from nemo_trd.planning import show
from nemo_trd.planning.advice import Advice, advise, capacity, on_fewer_gpus, peak
from nemo_trd.planning.checks import Findings, check, disk_needed
from nemo_trd.planning.cost import (
    Evening,
    Split,
    StepFlops,
    evening_servers,
    possible_splits,
    split_of,
    step_flops,
)
from nemo_trd.planning.memory import GpuMemory, training_memory
from nemo_trd.planning.plot import plot
from nemo_trd.planning.shapes import has_shape
from nemo_trd.preflight import Model


@dataclass
class Plan:
    """What is known of a run before it is started. Without models, only `findings`."""

    config: Config
    findings: Findings
    student: Model | None = None
    teacher: Model | None = None
    memory: list[GpuMemory] = field(default_factory=list)
    tried: Config | None = None  # layouts that fill the GPUs, where the settings' do not
    advice: Advice | None = None
    flops: StepFlops | None = None  # with all below: None where the teacher's shape is unknown
    split: Split | None = None
    fastest: Split | None = None  # of the same nodes
    evenest: Split | None = None  # of the same nodes: the longer of generation and training least
    evening: Evening | None = None  # server nodes that even out the training nodes
    disk: int = 0

    @property
    def fits(self) -> bool:
        return bool(self.memory) and peak(self.memory).total <= capacity(self.config)

    @property
    def exit_code(self) -> int:
        if self.findings.problems:
            return 2
        return 0 if self.fits else 1


def make_plan(config: Config) -> Plan:
    """Everything that `nemo_trd.plan` shows. Broken rules are in it, not raised."""
    student, teacher, findings = check(config)
    plan = Plan(config, findings, student, teacher)
    if student is None or teacher is None:
        return plan
    layouts = [config.parallel.student]
    if config.teacher.scoring == "megatron":
        layouts.append(config.parallel.teacher)
    if any(config.cluster.world_size % layout.model_parallel_size for layout in layouts):
        plan.tried = on_fewer_gpus(config)
        if plan.tried is None:
            return plan
        config = plan.tried
    plan.memory = training_memory(config, student.hf, teacher.hf)
    if not plan.fits:
        plan.advice = advise(config, student.hf, teacher.hf)
    plan.disk = disk_needed(config, student)
    if not has_shape(teacher.hf):
        return plan
    plan.flops = step_flops(config, student.hf, teacher.hf)
    plan.split = split_of(config, student.hf, teacher.hf)
    splits = [split_of(other, student.hf, teacher.hf) for other in possible_splits(config)]
    if splits:
        plan.fastest = min(splits, key=lambda split: split.time.total)
        plan.evenest = min(
            splits, key=lambda split: max(split.time.generation, split.time.training)
        )
    if config.generation.vllm is not None:
        plan.evening = evening_servers(config, student.hf, teacher.hf)
    return plan


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m nemo_trd.plan",
        description="Check settings against a cluster; estimate memory, time and disk.",
    )
    parser.add_argument("overrides", nargs="*", help="as for nemo_trd.train")
    parser.add_argument("--json", type=path, metavar="FILE", help="write all figures")
    parser.add_argument("--plot", type=path, metavar="FILE", help="draw memory by part")
    given = parser.parse_intermixed_args(arguments)
    try:
        plan = make_plan(compose(given.overrides))
    except ConfigError as error:
        print(f"nemo_trd: {error}", file=sys.stderr)
        return 2
    print(show.text(plan))
    try:
        if given.json:
            given.json.write_text(json.dumps(show.figures(plan), indent=1) + "\n")
        if given.plot and plan.memory:
            plot(plan.memory, plan.config.cluster.gpu_memory_gib, given.plot)
    except (OSError, ValueError) as error:  # no such directory; no such image format
        print(f"nemo_trd: {error}", file=sys.stderr)
        return 2
    for problem in plan.findings.problems:
        print(f"nemo_trd: {problem}", file=sys.stderr)
    return plan.exit_code


if __name__ == "__main__":
    sys.exit(main())
