"""Reads out of a run's records what a plan assumes otherwise: lengths, speed, accepted drafts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_trd.config.errors import rule_broken
from nemo_trd.config.load import validate
from nemo_trd.config.schema import Config
from nemo_trd.plan.cost import replicas_and_tp
from nemo_trd.records.read import RunRecords, read_runs


def measured_assumptions(run_dir: Path) -> dict[str, float]:
    """Values of `cluster.assumptions` that a run has measured, by name.

    Raises:
        ConfigError: the directory is none of a run, or no step of it is recorded.
    """
    (run,) = read_runs([run_dir])
    if not run.steps or not run.settings:
        raise rule_broken(
            "--from",
            str(run_dir),
            "config.yaml and metrics.jsonl tell what a run has measured: " + "; ".join(run.missing),
            "give the run.dir of a run with a step",
        )
    config = validate(run.settings)
    found = {
        "mean_length": _mean_length(run, config),
        "student_tokens_per_second": _tokens_per_second(run, config, "rollout", "student_pool"),
        "teacher_tokens_per_second": _tokens_per_second(run, config, "refinement", "teacher_pool"),
        "tokens_per_decode_step": _mean(run.values("tokens_per_decode_step")),
    }
    return {name: float(f"{value:.4g}") for name, value in found.items() if value}


def _mean_length(run: RunRecords, config: Config) -> float | None:
    """Mean length of answers over the longest allowed, of those that were rewritten."""
    generation = config.generation
    mean = sum(_mean(run.values(f"{name}_tokens")) or 0.0 for name in ("rollout", "refinement"))
    return mean / (generation.rollout.max_tokens + generation.refinement.max_tokens)


def _tokens_per_second(run: RunRecords, config: Config, role: str, pool: str) -> float | None:
    """Tokens that one GPU of a pool has generated in a second in which the pool had work."""
    tokens = seconds = 0.0
    for step in run.steps:
        if step.get(f"seconds/{pool}") and step.get(f"{role}_tokens") is not None:
            asked = step["rollouts"] if role == "rollout" else _rewritten(step)
            tokens += step[f"{role}_tokens"] * asked
            seconds += step[f"seconds/{pool}"]
    replicas, tp = replicas_and_tp(config, role)
    gpus = replicas * tp
    return tokens / (seconds * gpus) if seconds and gpus else None


def _rewritten(step: dict[str, Any]) -> float:
    """Rollouts of a step that the teacher was asked to rewrite."""
    unasked = ("rejected_subset", "rejected_context_overflow")
    return step["rollouts"] - sum(step.get(name, 0) for name in unasked)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
