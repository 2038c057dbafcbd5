"""The records of runs, as far as there are any: what is missing is put in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from nemo_trd.config.errors import rule_broken
from nemo_trd.records.prefix_failure import FILE, PrefixFailure
from nemo_trd.records.step_lines import read_lines

Record = dict[str, Any]


@dataclass
class RunRecords:
    """Contents of a run directory."""

    path: Path
    name: str
    settings: Record = field(default_factory=dict)  # config.yaml
    steps: list[Record] = field(default_factory=list)  # metrics.jsonl
    evaluations: list[Record] = field(default_factory=list)  # evaluation.jsonl
    samples: list[Record] = field(default_factory=list)  # samples/*.jsonl, newest first
    prefix_failure: PrefixFailure | None = None
    missing: list[str] = field(default_factory=list)  # for people

    def setting(self, path: str) -> Any:
        """The value of a dotted key of config.yaml; None where it is not known."""
        value: Any = self.settings
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric; NaN where a step has none or one that is not finite."""
        values = [number(record.get(name)) for record in self.steps]
        return [record["step"] for record in self.steps], values

    def values(self, name: str) -> list[float]:
        """The finite values of a metric."""
        return [value for value in self.series(name)[1] if value == value]

    def total(self, name: str) -> int:
        return round(sum(self.values(name)))


def number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def read_runs(directories: Sequence[Path]) -> list[RunRecords]:
    """The records of every run.

    Raises:
        ConfigError: a directory that is none of a run.
    """
    names = [path.resolve().name for path in directories]
    unique = len(set(names)) == len(names)
    return [
        _read_run(path, name if unique else str(path))
        for path, name in zip(directories, names, strict=True)
    ]


def _read_run(path: Path, name: str) -> RunRecords:
    if not path.is_dir():
        raise rule_broken("RUN_DIR", str(path), "there is no such directory", "correct the path")
    if not (path / "config.yaml").is_file() and not (path / "metrics.jsonl").is_file():
        raise rule_broken(
            "RUN_DIR",
            str(path),
            "a run's directory holds config.yaml and metrics.jsonl, and this one neither",
            "give the run.dir of a run",
        )
    run = RunRecords(path, name)
    try:
        settings = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        run.settings = settings if isinstance(settings, dict) else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        run.missing.append(f"config.yaml cannot be read ({type(error).__name__})")
    run.steps = _lines(run, path / "metrics.jsonl", "no step was recorded")
    run.evaluations = _lines(
        run, path / "evaluation.jsonl", "no evaluation (evaluation.at_start, interval, at_end)"
    )
    _read_samples(run)
    run.prefix_failure = _prefix_failure(run)
    _note_the_end(run)
    return run


def _lines(run: RunRecords, path: Path, otherwise: str) -> list[Record]:
    records, broken = read_lines(path) if path.is_file() else ([], 0)
    if broken:
        run.missing.append(f"{path.name}: {broken} incomplete line{'s'[: broken != 1]} left out")
    if not records:
        run.missing.append(otherwise)
    return sorted(records, key=lambda record: record["step"])


def _read_samples(run: RunRecords) -> None:
    directory = run.path / "samples"
    broken = 0
    for file in sorted(directory.glob("step_*.jsonl"), reverse=True):
        records, left_out = read_lines(file)
        usable = [record for record in records if _is_sample(record)]
        broken += left_out + len(records) - len(usable)
        run.samples += [{**record, "file": f"samples/{file.name}"} for record in usable]
    if broken:
        run.missing.append(f"samples: {broken} incomplete line{'s'[: broken != 1]} left out")
    if not run.samples:
        only_pages = any(directory.glob("step_*.md"))
        run.missing.append(
            "samples exist as Markdown only, without token ids"
            if only_pages
            else "no samples (logging.samples_interval)"
        )


def _is_sample(record: Record) -> bool:
    """Whether a line has what the page needs: equally long lists of ids, texts and figures."""
    needed = {"prompt_index", "sample_index", "problem", "rollout", "refinement", "trained_on"}
    if not needed | {"labels"} <= record.keys():
        return False
    parts = {"rollout": record.get("rollout"), "refinement": record.get("refinement")}
    for name, part in parts.items():
        if part is None and name == "refinement":
            continue
        if not isinstance(part, dict):
            return False
        if len(part.get("token_ids", [])) != len(part.get("tokens", [])):
            return False
        if not _are_numbers(part.get("logprobs", [])):
            return False
    trained, labels = parts.get(record.get("trained_on") or ""), record.get("labels")
    if labels is None:
        return True
    return trained is not None and all(
        len(labels.get(name, [])) == len(trained.get("token_ids", []))
        and _are_numbers(labels[name])
        for name in ("divergence", "student_nll", "teacher_nll")
    )


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _prefix_failure(run: RunRecords) -> PrefixFailure | None:
    path = run.path / FILE
    if not path.is_file():
        return None
    try:
        return PrefixFailure.model_validate_json(path.read_bytes())
    except ValidationError:
        run.missing.append(f"{FILE} is not one that this version of nemo_trd.prefix_failure writes")
        return None


def _note_the_end(run: RunRecords) -> None:
    planned = run.setting("train.num_steps")
    done = run.steps[-1]["step"] if run.steps else 0
    if planned is not None and done < planned:
        run.missing.append(f"it has not ended: {done} of {planned} steps are recorded")
    elif not (run.path / "summary.json").is_file():
        run.missing.append("no summary.json: it was interrupted after its last step")
