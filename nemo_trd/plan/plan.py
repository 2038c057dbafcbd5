"""Plan of a configuration: memory, time, disk, and advice where it does not fit."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_trd.config.schema import Config
from nemo_trd.models.read import Model
from nemo_trd.plan.advice import Advice, advise, capacity, on_fewer_gpus, peak
from nemo_trd.plan.checks import Findings, check, disk_needed
from nemo_trd.plan.cost import (
    Evening,
    Split,
    StepFlops,
    evening_servers,
    possible_splits,
    split_of,
    step_flops,
)
from nemo_trd.plan.faster import Saving, savings
from nemo_trd.plan.memory import GpuMemory, training_memory
from nemo_trd.plan.shapes import has_shape


@dataclass
class Plan:
    """Estimates for a run before it starts. Without models, only `findings` are set."""

    config: Config
    findings: Findings
    student: Model | None = None
    teacher: Model | None = None
    memory: list[GpuMemory] = field(default_factory=list)
    fallback: Config | None = None  # layouts that divide the GPUs, where the settings' do not
    advice: Advice | None = None
    flops: StepFlops | None = None  # with all below: None where the teacher's shape is unknown
    split: Split | None = None
    fastest: Split | None = None  # best split of the same nodes by the time of a step
    evenest: Split | None = None  # split with the shortest maximum of generation and training
    evening: Evening | None = None  # server nodes that even out the training nodes
    savings: list[Saving] = field(default_factory=list)  # changes that save time, the best first
    disk: int = 0

    @property
    def fits(self) -> bool:
        """Whether the fullest GPU has room for the run."""
        return bool(self.memory) and peak(self.memory).total <= capacity(self.config)

    @property
    def exit_code(self) -> int:
        """Exit code of `nemo_trd.plan`: 0 fits, 1 does not fit, 2 a rule is broken."""
        if self.findings.problems:
            return 2
        return 0 if self.fits else 1


def make_plan(config: Config) -> Plan:
    """Compute everything that `nemo_trd.plan` shows. Broken rules are in it, not raised."""
    student, teacher, findings = check(config)
    plan = Plan(config, findings, student, teacher)
    if student is None or teacher is None:
        return plan
    layouts = [config.parallel.student]
    if config.teacher.scoring == "megatron":
        layouts.append(config.parallel.teacher)
    if not all(layout.divides(config.cluster.world_size) for layout in layouts):
        plan.fallback = on_fewer_gpus(config)
        if plan.fallback is None:
            return plan
        config = plan.fallback
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
    on_servers = config.generation.vllm is not None and config.generation.stored is None
    if on_servers and not config.teacher_on_student_servers:
        plan.evening = evening_servers(config, student.hf, teacher.hf)
    plan.savings = savings(config, student.hf, teacher.hf)
    return plan
