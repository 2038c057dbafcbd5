"""Results of an evaluation, as figures and as a table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from nemo_trd.config.evaluation import EvaluationConfig
from nemo_trd.evaluate.accuracy import Estimate, Score, estimates
from nemo_trd.evaluate.sample_store import Sample


def figures(
    samples: Sequence[Sample], left_out: Mapping[str, int], config: EvaluationConfig
) -> dict[str, Any]:
    """Everything that is counted of the samples of one benchmark, NaN as None.

    `left_out` are problems of the dataset that were not asked, by reason.
    """
    problems: dict[int, list[Sample]] = {}
    for sample in sorted(samples, key=lambda sample: sample.key):
        problems.setdefault(sample.problem, []).append(sample)
    scores = []
    for problem, drawn in problems.items():
        verdicts = [sample.correct for sample in drawn]
        scores.append(Score(problem, *(verdicts.count(v) for v in (True, False, None))))
    n, bootstrap = config.samples_per_problem, config.bootstrap
    estimated = estimates(scores, n, bootstrap.resamples, bootstrap.confidence, config.seed)
    undecided = [sample for sample in samples if sample.correct is None]
    return {
        "problems": len(problems),
        "samples": len(samples),
        "left_out_problems": dict(left_out),
        "estimates": {name: _plain(asdict(figure)) for name, figure in estimated.items()},
        "undecided_samples": len(undecided),
        "undecided_problems": sum(score.decided == 0 for score in scores),
        "timeouts": sum(sample.reason == "timeout" for sample in undecided),
        "truncated_samples": sum(sample.finish_reason == "length" for sample in samples),
        "reasons": dict(sorted(Counter(sample.reason for sample in samples).items())),
        "mean_tokens": sum(sample.tokens for sample in samples) / len(samples),
        "weight_versions": sorted({sample.weight_version for sample in samples}),
    }


def _plain(figure: dict[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in figure.items()}


def table(results: Mapping[str, Any], n: int, confidence: float) -> str:
    """For a terminal: a row a benchmark, figures in percent with their intervals."""
    ks = sorted({2**power for power in range(n.bit_length()) if 2**power <= n} | {n})
    names = [f"avg@{n}", *(f"pass@{k}" for k in ks if k > 1)]
    rows = [["benchmark", "problems", *names, "undecided", "timeouts", "truncated"]]
    for benchmark, result in results.items():
        cells = [_percent(Estimate(**_numbers(result["estimates"][name]))) for name in names]
        counts = [result[key] for key in ("undecided_samples", "timeouts", "truncated_samples")]
        rows.append(
            [benchmark, str(result["problems"]), *cells]
            + [f"{count} of {result['samples']}" for count in counts]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines.append(
        f"percent; in brackets the {confidence:.0%} bootstrap interval over problems. A sample "
        "without a verdict (undecided) counts neither way."
    )
    return "\n".join(lines)


def _numbers(figure: Mapping[str, float | None]) -> dict[str, float]:
    return {name: float("nan") if value is None else value for name, value in figure.items()}


def _percent(figure: Estimate) -> str:
    if math.isnan(figure.value):
        return "-"
    return f"{100 * figure.value:.1f} [{100 * figure.low:.1f}, {100 * figure.high:.1f}]"
