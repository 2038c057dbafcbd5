"""The console: the line of a step, handlers."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

from tqdm import tqdm

from nemo_trd.records.last_line import LOG_FORMAT

Metrics = Mapping[str, float | int | None]


def step_line(step: int, num_steps: int, metrics: Metrics, eta_seconds: float) -> str:
    """The console line of one step, from the names in metrics.jsonl."""
    width = len(str(num_steps))
    parts = [f"step {step:>{width}}/{num_steps}"]
    loss = metrics.get("loss")
    parts.append("skipped: nothing to train on" if "loss" not in metrics else f"loss {_g(loss)}")
    if "label_tokens" in metrics:
        parts.append(f"{metrics['label_tokens'] or 0:,.0f} tokens")
    if "accepted" in metrics:
        failed = sum(
            value or 0
            for name, value in metrics.items()
            if name.startswith("rejected_") and name != "rejected_subset"
        )
        parts.append(f"refinements {metrics['accepted']:.0f} accepted {failed:.0f} failed")
    if "grad_norm" in metrics:
        parts.append(f"grad norm {_g(metrics['grad_norm'])}")
    if "max_expert_load" in metrics:
        parts.append(
            f"load balancing {_g(metrics['load_balancing_loss'])}, "
            f"fullest expert {_g(metrics['max_expert_load'], 3)} times the mean"
        )
    if "lr" in metrics:
        parts.append(f"lr {_g(metrics['lr'], 3)}")
    if metrics.get("staleness"):
        parts.append(f"staleness {_g(metrics['staleness'], 2)}")
    if "logprob_difference" in metrics:
        parts.append(f"log-probs off by {_g(metrics['logprob_difference'], 2)}")
    parts.append(f"{metrics['tokens_per_second'] or 0:,.0f} tok/s")
    phases = [
        f"{name.removeprefix('seconds/')} {value:.1f}"
        for name, value in metrics.items()
        if name.startswith("seconds/") and value is not None
    ]
    parts.append(f"seconds: {' '.join(phases)}")
    parts.append(f"left {timedelta(seconds=round(eta_seconds))}")
    return " | ".join(parts)


def _g(value: float | int | None, digits: int = 4) -> str:
    return "not finite" if value is None else f"{value:.{digits}g}"


class _ConsoleHandler(logging.Handler):
    """Writes above the progress bars that are open, instead of through them."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)


def attach_handlers(log_file: Path) -> list[logging.Handler]:
    """Let the package log into a file and to the console; return what `detach_handlers` takes."""
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


def detach_handlers(handlers: Sequence[logging.Handler]) -> None:
    """Close handlers, and take them off the package's logger."""
    package = logging.getLogger("nemo_trd")
    for handler in handlers:
        package.removeHandler(handler)
        handler.close()
    if handlers:
        package.setLevel(logging.NOTSET)
        package.propagate = True
