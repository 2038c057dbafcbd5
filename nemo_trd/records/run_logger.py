"""Records of a run for people: one line a step, its metrics as files, readable samples.

RUN_DIR/metrics.jsonl      one line per step, each step once
        evaluation.jsonl   one line per evaluation, likewise
        samples/step_000020.md     for people; .jsonl beside it has the same and more for programs
        tensorboard/
        config.yaml        the settings, without credentials
        log.txt            what the console showed
        summary.json       the figures of the whole run

Beside them are checkpoints/ and, of a run that is not finished, under_way/ (`under_way.py`).
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from nemo_trd.config.schema import Config
from nemo_trd.records.console import Metrics, attach_handlers, detach_handlers, step_line
from nemo_trd.records.samples import Decode, Sample, sample_record, samples_page
from nemo_trd.records.step_lines import StepLines, write_atomically
from nemo_trd.records.trackers import Tracker, open_trackers, public_settings

log = logging.getLogger(__name__)


class RunLogger:
    """Writes the files of a run and its console lines. On ranks other than the writer, nothing.

    While it is open, the `nemo_trd` loggers go to the console (around progress bars) and to
    log.txt. Use it as a context manager. `trackers` get the figures beside those of the config.
    """

    def __init__(
        self,
        config: Config,
        writer: bool,
        resumed_step: int = 0,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self._config = config
        self._writer = writer
        self._trackers: list[Tracker] = []
        self._handlers: list[logging.Handler] = []
        self._durations: list[float] = []  # of the steps of this process, in seconds
        if not writer:
            return
        self._dir = config.run_dir
        self._dir.mkdir(parents=True, exist_ok=True)
        settings = yaml.safe_dump(public_settings(config), sort_keys=False, allow_unicode=True)
        write_atomically(self._dir / "config.yaml", settings)
        self._steps = StepLines(self._dir / "metrics.jsonl", resumed_step)
        self._evaluations = StepLines(self._dir / "evaluation.jsonl", resumed_step)
        self._trackers = [*open_trackers(config, resumed_step), *trackers]
        self._handlers = attach_handlers(self._dir / "log.txt")

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(succeeded=kind is None)

    def step(self, step: int, metrics: Metrics, seconds: Mapping[str, float]) -> None:
        """Record one step.

        Args:
            step: steps done, this one included.
            metrics: `loss`, `label_tokens`, `grad_norm`, `lr`, the counts of
                `refinement_counts`, and anything else. No `loss`: the step was skipped.
            seconds: what `Timers.take` returned.
        """
        if not self._writer:
            return
        tokens = metrics.get("label_tokens") or 0
        figures = finite(
            {
                **metrics,
                "tokens_per_second": tokens / seconds["step"],
                **{f"seconds/{phase}": value for phase, value in seconds.items()},
            },
            f"step {step}",
        )
        self._durations.append(seconds["step"])
        self._steps.append(step, {**figures, "time": time.time()})
        self._track(step, figures)
        left = self._config.train.num_steps - step
        eta = left * sum(self._durations) / len(self._durations)
        log.info("%s", step_line(step, self._config.train.num_steps, figures, eta))

    def evaluation(self, step: int, accuracy: Mapping[str, float], sentence: str) -> None:
        """Record the accuracy of the student after `step` steps; `sentence` tells it to people."""
        if not self._writer:
            return
        figures = finite(accuracy, f"evaluation after step {step}")
        self._evaluations.append(step, {**figures, "time": time.time()})
        self._track(step, {f"evaluation/{name}": value for name, value in figures.items()})
        log.info("evaluation after step %d: %s", step, sentence)

    def wants_samples(self, step: int) -> bool:
        """The same on all ranks."""
        return step % self._config.logging.samples_interval == 0

    def samples(self, step: int, samples: Sequence[Sample], decode: Decode) -> None:
        """Write the first `logging.samples_count` samples, as a page and as lines of JSON."""
        if not self._writer:
            return
        shown = samples[: self._config.logging.samples_count]
        path = self._dir / "samples" / f"step_{step:06d}"
        path.parent.mkdir(exist_ok=True)
        page = samples_page(step, shown, lambda token_id: decode([token_id]))
        write_atomically(path.with_suffix(".md"), page)
        records = [finite(sample_record(step, sample, decode), path.name) for sample in shown]
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_atomically(path.with_suffix(".jsonl"), lines)

    def total(self, names: Sequence[str]) -> dict[str, float]:
        """Sums of metrics over all steps of the run, those before a resume included.

        Known to the writer only.
        """
        lines = self._steps.read()
        return {name: sum(line.get(name) or 0 for line in lines) for name in names}

    def evaluations(self) -> dict[int, dict[str, Any]]:
        """All evaluations of the run by step, as recorded. Known to the writer only."""
        return {line.pop("step"): line for line in self._evaluations.read()}

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Write summary.json."""
        if self._writer:
            text = json.dumps(finite(figures, "summary"), indent=2, ensure_ascii=False)
            write_atomically(self._dir / "summary.json", text + "\n")

    def close(self, succeeded: bool = True, last_line: str | None = None) -> None:
        """End the records. `last_line` comes after what trackers have to say of their end."""
        for tracker in self._trackers:
            _guarded(tracker, partial(tracker.close, succeeded))
        if last_line is not None:
            log.info("%s", last_line)
        detach_handlers(self._handlers)
        self._trackers, self._handlers = [], []

    def _track(self, step: int, figures: Metrics) -> None:
        values = {name: float(value) for name, value in figures.items() if value is not None}
        for tracker in self._trackers:
            _guarded(tracker, partial(tracker.log, step, values))


def _guarded(tracker: Tracker, action: Callable[[], None]) -> None:
    """A tracking server that is down must not take a run with it; the files have everything."""
    try:
        action()
    except Exception as error:
        log.warning("%s failed: %s: %s", type(tracker).__name__, type(error).__name__, error)


def finite(value: Any, where: str) -> Any:
    """The same data with null for NaN and infinities, which JSON has no words for.

    Each of them is reported once per call with its name: a silent null would hide a divergence.
    """
    if isinstance(value, Mapping):
        return {str(key): finite(inner, f"{where}: {key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner, where) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        log.warning("%s is %s, recorded as null", where, value)
        return None
    return str(value) if isinstance(value, Path) else value
