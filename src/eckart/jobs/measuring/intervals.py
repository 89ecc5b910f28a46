"""Bootstrap confidence intervals of means over rows.

Rows are resampled, not tokens. Needs scipy (see `available`).
"""

from __future__ import annotations

import math
from importlib.util import find_spec

import numpy as np

DRAWS = 2000
AT_ONCE = 2**22  # numbers in one batch of resamples
FEW = 20  # below this number of rows a percentile interval is clearly too narrow


def available() -> bool:
    """Is scipy installed?"""
    return find_spec("scipy") is not None


def interval(sums: np.ndarray, counts: np.ndarray, alpha: float = 0.05) -> tuple[float, float]:
    """The percentile interval of sum(sums) / sum(counts) over resampled rows; deterministic.

    sums, counts [rows]. NaN for fewer than two rows.
    """
    if len(sums) < 2:
        return math.nan, math.nan
    from scipy import stats

    def ratio(s: np.ndarray, c: np.ndarray, axis: int = -1) -> np.ndarray:
        return s.sum(axis) / c.sum(axis)

    if np.ptp(sums / counts) == 0:  # degenerate: scipy would warn
        return float(sums[0] / counts[0]), float(sums[0] / counts[0])
    found = stats.bootstrap(
        (sums, counts),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=DRAWS,
        batch=max(1, AT_ONCE // len(sums)),
        confidence_level=1 - alpha,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)
