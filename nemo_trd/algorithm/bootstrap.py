"""Resampling of problems: how sure a figure over problems is."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

MAX_COUNTS = 10**7  # that exist at one time


def resampled(rows: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Draw `rows` rows with replacement, `resamples` times: the percentile bootstrap's samples.

    Efron and Tibshirani, An Introduction to the Bootstrap, section 13.3.

    Yields:
        float64 [some of the resamples, rows]: how often each row was drawn; blocks of `MAX_COUNTS`.
    """
    random = np.random.default_rng(seed)
    block = max(1, MAX_COUNTS // rows)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        yield random.multinomial(rows, np.full(rows, 1 / rows), size=size).astype(float)
