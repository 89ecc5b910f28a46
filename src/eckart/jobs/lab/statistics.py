"""Confidence intervals of paired differences, their statistical power, and verdicts.

The sample unit is the seed: one difference each, between arms that saw the same data in the same
order. With three to twenty seeds a percentile bootstrap alone is too narrow: on three numbers it
finds a difference in a quarter of all ties. So each end of an interval is the wider of Student's
t and the bootstrap's: the first is right for few seeds, the second for skewed numbers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from eckart.errors import MissingExtra

try:
    from scipy import optimize, stats
except ModuleNotFoundError as fault:
    raise MissingExtra(
        "comparisons need scipy", [("scipy", "not installed")], "Type pip install 'eckart[claims]'."
    ) from fault

ALPHA = 0.05  # familywise error rate
POWER = 0.8  # probability of detecting a difference that is called visible
DRAWS = 10_000

Verdict = Literal["confirmed", "not seen", "refuted"]


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences over seeds, with its interval, p-value and power."""

    mean: float
    low: float
    high: float
    p: float  # two-sided, for a mean of 0
    sd: float
    seeds: int
    comparisons: int = 1  # size of the family that p is corrected for

    @cached_property
    def visible(self) -> float:
        """The smallest true difference that 80 % of such experiments would detect.

        With Bonferroni's correction, the strictest step of Holm's.
        """
        if math.isnan(self.sd):
            return math.nan
        return visible(self.sd, self.seeds, ALPHA / self.comparisons)

    def verdict(self, p: float | None = None, alpha: float = ALPHA) -> Verdict:
        """The side of 0 on which the interval lies, if any; `p` is the corrected p-value."""
        if not (self.p if p is None else p) < alpha:  # a NaN is not below
            return "not seen"
        return "confirmed" if self.low > 0 else "refuted" if self.high < 0 else "not seen"


def difference(values: Sequence[float], alpha: float = ALPHA, comparisons: int = 1) -> Difference:
    """The mean of paired differences with its interval at level 1 - alpha.

    Equal values (a count of bytes) give an interval of one point. Values that are not finite, or
    fewer than two, give NaN, which leads to "not seen".
    """
    d = np.asarray(values, dtype=float)
    n = len(d)
    if n < 2 or not np.isfinite(d).all():
        nan = math.nan
        return Difference(float(d.mean()) if n else nan, nan, nan, nan, nan, n)
    mean, sd = float(d.mean()), float(d.std(ddof=1))
    if np.ptp(d) <= 1e-12 * np.abs(d).max():  # equal up to rounding
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0, 0.0, n)
    half = float(stats.t.ppf(1 - alpha / 2, n - 1)) * sd / math.sqrt(n)
    low, high = bootstrap_interval(d, alpha)
    p = float(stats.ttest_1samp(d, 0.0).pvalue)
    return Difference(mean, min(mean - half, low), max(mean + half, high), p, sd, n, comparisons)


def bootstrap_interval(values: np.ndarray[Any, Any], alpha: float = ALPHA) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean; deterministic, by a fixed generator."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # resamples of one repeated value
        found = stats.bootstrap(
            (np.sort(values),),  # sorted, so that the order of seeds does not matter
            np.mean,
            confidence_level=1 - alpha,
            n_resamples=DRAWS,
            method="percentile",
            vectorized=True,
            rng=np.random.default_rng(0),
        ).confidence_interval
    return float(found.low), float(found.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected by Holm, in the order given. NaN stays NaN and counts as a comparison."""
    order = sorted(range(len(p_values)), key=lambda i: (math.isnan(p_values[i]), p_values[i]))
    corrected, highest = [math.nan] * len(p_values), 0.0
    for place, i in enumerate(order):
        if not math.isnan(p_values[i]):
            highest = max(highest, min(1.0, (len(p_values) - place) * p_values[i]))
            corrected[i] = highest
    return corrected


def power(delta: float, sd: float, n: int, alpha: float = ALPHA) -> float:
    """The power of a paired t-test over n seeds for a true mean difference `delta`."""
    shift, critical = delta / sd * math.sqrt(n), float(stats.t.ppf(1 - alpha / 2, n - 1))
    above = stats.nct.sf(critical, n - 1, shift)
    below = stats.nct.cdf(-critical, n - 1, shift)
    return float(np.nan_to_num(above, nan=1.0) + np.nan_to_num(below, nan=0.0))


def visible(sd: float, n: int, alpha: float = ALPHA, wanted: float = POWER) -> float:
    """The smallest true difference that is detected with power `wanted`."""
    if sd == 0:
        return 0.0
    unit = sd / math.sqrt(n)
    top = unit
    while power(top, sd, n, alpha) < wanted:
        top *= 2
    return float(optimize.brentq(lambda x: power(x, sd, n, alpha) - wanted, 0.0, top))


def seeds_needed(delta: float, sd: float, alpha: float = ALPHA, most: int = 1000) -> int:
    """The number of seeds that detects a difference `delta` with power 0.8; at most `most`."""
    n = 2
    while n < most and power(delta, sd, n, alpha) < POWER:
        n += 1
    return n
