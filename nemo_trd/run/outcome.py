"""Tells whether a run has anything left to do, and where its results are."""

from __future__ import annotations

import json
from pathlib import Path

from nemo_trd.config.schema import Config
from nemo_trd.models.directory import ADAPTER_NAME
from nemo_trd.records import latest
from nemo_trd.records.checkpoint_dir import read_state

MERGED = "export_merged"  # beside export/: weights and adapter in one model


def nothing_left(config: Config, checkpoint: Path | None) -> str | None:
    """Line for a run that has all its steps, its last evaluation and its export.

    None where something is left to do, or where `checkpoint` is not the run's current one.
    """
    if checkpoint is None:
        return None
    step, num_steps, run_dir = read_state(checkpoint).step, config.train.num_steps, config.run_dir
    if checkpoint != latest.read(run_dir / "checkpoints"):
        return None
    try:
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    done = step >= num_steps and summary.get("steps") == step
    evaluated = summary.get("after") is not None
    file = "config.json" if config.student.adapter is None else ADAPTER_NAME
    exported = (run_dir / "export" / file).is_file()
    merged = (run_dir / MERGED / "config.json").is_file()
    if (
        not done
        or (config.evaluation.at_end and not evaluated)
        or (config.checkpoint.export_hf and not exported)
        or (config.checkpoint.export_merged and not merged)
    ):
        return None
    endings = [name for name, there in (("evaluated", evaluated), ("exported", exported)) if there]
    return (
        f"nothing left to do: step {step} is done ({', '.join(endings) or 'not evaluated'}) and "
        f"train.num_steps is {num_steps}; {where_to_look(run_dir, exported)}"
    )


def where_to_look(run_dir: Path, exported: bool) -> str:
    """Text with the files of a finished run, and the command that shows them."""
    model = f", the model in {run_dir / 'export'}" if exported else ""
    return (
        f"see {run_dir / 'summary.json'}{model}; python -m nemo_trd.report {run_dir} "
        "makes a page of it"
    )


def stopped_line(config: Config, step: int) -> str:
    """The last line of a run that was asked to stop after `step` steps."""
    missing = []
    if step >= config.train.num_steps:
        evaluated = config.evaluation.at_end and config.data.validation is not None
        missing += ["last evaluation"] if evaluated else []
        exports = config.checkpoint.export_hf or config.checkpoint.export_merged
        missing += ["export"] if exports else []
    before = f", the last, without its {' and '.join(missing)}" if missing else ""
    return (
        f"stopped on request after step {step}{before}; the run can be resumed: start again with "
        f"run.dir={config.run_dir}"
    )
