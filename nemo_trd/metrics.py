"""What people see of a run: one line a step, its metrics as files, readable samples.

RUN_DIR/metrics.jsonl      one line per step, each step once
        evaluation.jsonl   one line per evaluation, likewise
        samples/step_000020.md     for people; .jsonl beside it has the same and more for programs
        tensorboard/
        config.yaml        the settings, without credentials
        log.txt            what the console showed
        summary.json       the figures of the whole run
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from nemo_trd.config import Config
from nemo_trd.evaluation.accuracy import Accuracy
from nemo_trd.last_line import LOG_FORMAT
from nemo_trd.samples import Decode, Sample, sample_record, samples_page
from nemo_trd.step_lines import StepLines, write_atomically
from nemo_trd.trackers import Tracker, open_trackers, public_settings

log = logging.getLogger(__name__)

Figures = Mapping[str, float | int | None]


class Timers:
    """Wall-clock seconds of a step by phase: rollout, refinement, teacher, student, ..."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._step_start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time of the block to `phase`; work that it left to the GPU is waited for."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.add({phase: time.perf_counter() - start})

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add what was measured elsewhere, by phase."""
        for phase, elapsed in seconds.items():
            self._seconds[phase] = self._seconds.get(phase, 0.0) + elapsed

    def phases(self) -> dict[str, float]:
        """Seconds by phase since the last `take`, in order of first use."""
        return dict(self._seconds)

    def take(self) -> dict[str, float]:
        """Begin a new step. Seconds by phase of the one that ends; "step" is all of it."""
        now = time.perf_counter()
        taken = {**self._seconds, "step": now - self._step_start}
        self._seconds, self._step_start = {}, now
        return taken


class RunLogger:
    """Writes the files of a run and its console lines. On ranks other than the writer, nothing.

    While it is open, the `nemo_trd` loggers go to the console (around progress bars) and to
    log.txt. Use it as a context manager. `trackers` get the figures beside those of the config.

    Raises:
        ConfigError: a tracker's package is missing.
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
        self._handlers = _attach_handlers(self._dir / "log.txt")

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(succeeded=kind is None)

    def step(self, step: int, metrics: Figures, seconds: Mapping[str, float]) -> None:
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

    def evaluation(self, step: int, accuracy: Accuracy) -> None:
        """Record the accuracy of the student after `step` steps."""
        if not self._writer:
            return
        figures = finite(accuracy.summary(), f"evaluation after step {step}")
        self._evaluations.append(step, {**figures, "time": time.time()})
        self._track(step, {f"evaluation/{name}": value for name, value in figures.items()})
        log.info("evaluation after step %d: %s", step, accuracy)

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
        _detach_handlers(self._handlers)
        self._trackers, self._handlers = [], []

    def _track(self, step: int, figures: Figures) -> None:
        values = {name: float(value) for name, value in figures.items() if value is not None}
        for tracker in self._trackers:
            _guarded(tracker, partial(tracker.log, step, values))


def _guarded(tracker: Tracker, action: Callable[[], None]) -> None:
    """A tracking server that is down must not take a run with it; the files have everything."""
    try:
        action()
    except Exception as error:
        log.warning("%s failed: %s: %s", type(tracker).__name__, type(error).__name__, error)


def step_line(step: int, num_steps: int, figures: Figures, eta_seconds: float) -> str:
    """The console line of one step, from the names in metrics.jsonl."""
    width = len(str(num_steps))
    parts = [f"step {step:>{width}}/{num_steps}"]
    loss = figures.get("loss")
    parts.append("skipped: nothing to train on" if "loss" not in figures else f"loss {_g(loss)}")
    if "label_tokens" in figures:
        parts.append(f"{figures['label_tokens'] or 0:,.0f} tokens")
    if "accepted" in figures:
        failed = sum(
            value or 0
            for name, value in figures.items()
            if name.startswith("rejected_") and name != "rejected_subset"
        )
        parts.append(f"refinements {figures['accepted']:.0f} accepted {failed:.0f} failed")
    if "grad_norm" in figures:
        parts.append(f"grad norm {_g(figures['grad_norm'])}")
    if "lr" in figures:
        parts.append(f"lr {_g(figures['lr'], 3)}")
    if figures.get("staleness"):
        parts.append(f"staleness {_g(figures['staleness'], 2)}")
    if "logprob_difference" in figures:
        parts.append(f"log-probs off by {_g(figures['logprob_difference'], 2)}")
    parts.append(f"{figures['tokens_per_second'] or 0:,.0f} tok/s")
    phases = [
        f"{name.removeprefix('seconds/')} {value:.1f}"
        for name, value in figures.items()
        if name.startswith("seconds/") and value is not None
    ]
    parts.append(f"seconds: {' '.join(phases)}")
    parts.append(f"left {timedelta(seconds=round(eta_seconds))}")
    return " | ".join(parts)


def _g(value: float | int | None, digits: int = 4) -> str:
    return "not finite" if value is None else f"{value:.{digits}g}"


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


class _ConsoleHandler(logging.Handler):
    """Writes above the progress bars that are open, instead of through them."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)


def _attach_handlers(log_file: Path) -> list[logging.Handler]:
    package = logging.getLogger("nemo_trd")
    file = logging.FileHandler(log_file, encoding="utf-8")
    file.setFormatter(logging.Formatter(LOG_FORMAT))
    console = _ConsoleHandler()
    console.setFormatter(logging.Formatter("%(message)s"))
    handlers: list[logging.Handler] = [console, file]
    for handler in handlers:
        package.addHandler(handler)
    package.setLevel(logging.INFO)
    package.propagate = False  # whatever handles the root logger would print every line again
    return handlers


def _detach_handlers(handlers: Sequence[logging.Handler]) -> None:
    package = logging.getLogger("nemo_trd")
    for handler in handlers:
        package.removeHandler(handler)
        handler.close()
    if handlers:
        package.setLevel(logging.NOTSET)
        package.propagate = True
