"""Is there a difference? Intervals of paired differences, what could have been seen, verdicts.

The unit is the seed: one number each, a difference between arms that saw the same data in
the same order. Three to twenty seeds are few, and a percentile bootstrap of three numbers
finds a difference in a quarter of all ties (its interval is then from the least to the
greatest). So an interval is the wider, at each end, of Student's and the bootstrap's: the
first is right for few seeds, the second speaks up where the numbers are skewed.
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

ALPHA = 0.05  # families of comparisons err this often
POWER = 0.8  # how often a difference called visible would have been seen
DRAWS = 10_000

Verdict = Literal["confirmed", "not seen", "refuted"]


@dataclass(frozen=True)
class Difference:
    """Paired differences over seeds: their mean with its interval, and what could be seen."""

    mean: float
    low: float
    high: float
    p: float  # two-sided, for a mean of 0
    sd: float
    seeds: int
    comparisons: int = 1  # in the family that is corrected

    @cached_property
    def visible(self) -> float:
        """The smallest true difference that is seen in 80 % of such experiments.

        As it survives Bonferroni's correction, the worst that Holm's can ask.
        """
        if math.isnan(self.sd):
            return math.nan
        return visible(self.sd, self.seeds, ALPHA / self.comparisons)

    def verdict(self, p: float | None = None, alpha: float = ALPHA) -> Verdict:
        """Which side of 0 it lies on, if any; `p` as corrected for several comparisons."""
        if not (self.p if p is None else p) < alpha:  # a NaN is not below
            return "not seen"
        return "confirmed" if self.low > 0 else "refuted" if self.high < 0 else "not seen"


def difference(values: Sequence[float], alpha: float = ALPHA, comparisons: int = 1) -> Difference:
    """The interval of a mean of paired differences at level 1 - alpha.

    Equal values are exact (a count of bytes): the interval is a point. Values that are not
    finite give NaN, which is never a verdict.
    """
    d = np.asarray(values, dtype=float)
    n = len(d)
    if n < 2 or not np.isfinite(d).all():
        nan = math.nan
        return Difference(float(d.mean()) if n else nan, nan, nan, nan, nan, n)
    mean, sd = float(d.mean()), float(d.std(ddof=1))
    if np.ptp(d) <= 1e-12 * np.abs(d).max():  # rounding of equal numbers
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0, 0.0, n)
    half = float(stats.t.ppf(1 - alpha / 2, n - 1)) * sd / math.sqrt(n)
    low, high = bootstrap_interval(d, alpha)
    p = float(stats.ttest_1samp(d, 0.0).pvalue)
    return Difference(mean, min(mean - half, low), max(mean + half, high), p, sd, n, comparisons)


def bootstrap_interval(values: np.ndarray[Any, Any], alpha: float = ALPHA) -> tuple[float, float]:
    """The percentile interval of the mean; the generator is fixed, so it repeats."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of resamples that are all one value
        found = stats.bootstrap(
            (np.sort(values),),  # sorted: the order of seeds changes no number
            np.mean,
            confidence_level=1 - alpha,
            n_resamples=DRAWS,
            method="percentile",
            vectorized=True,
            rng=np.random.default_rng(0),
        ).confidence_interval
    return float(found.low), float(found.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction, in the order given. NaN stays NaN and counts."""
    order = sorted(range(len(p_values)), key=lambda i: (math.isnan(p_values[i]), p_values[i]))
    corrected, highest = [math.nan] * len(p_values), 0.0
    for place, i in enumerate(order):
        if not math.isnan(p_values[i]):
            highest = max(highest, min(1.0, (len(p_values) - place) * p_values[i]))
            corrected[i] = highest
    return corrected


def power(delta: float, sd: float, n: int, alpha: float = ALPHA) -> float:
    """How often a true mean difference is seen by a paired t-test over n seeds."""
    shift, critical = delta / sd * math.sqrt(n), float(stats.t.ppf(1 - alpha / 2, n - 1))
    above = stats.nct.sf(critical, n - 1, shift)
    below = stats.nct.cdf(-critical, n - 1, shift)
    return float(np.nan_to_num(above, nan=1.0) + np.nan_to_num(below, nan=0.0))


def visible(sd: float, n: int, alpha: float = ALPHA, wanted: float = POWER) -> float:
    """The smallest true difference that is seen with the wanted power."""
    if sd == 0:
        return 0.0
    unit = sd / math.sqrt(n)
    top = unit
    while power(top, sd, n, alpha) < wanted:
        top *= 2
    return float(optimize.brentq(lambda x: power(x, sd, n, alpha) - wanted, 0.0, top))


def seeds_needed(delta: float, sd: float, alpha: float = ALPHA, most: int = 1000) -> int:
    """Seeds with which a difference of this size would be seen with power 0.8; at most `most`."""
    n = 2
    while n < most and power(delta, sd, n, alpha) < POWER:
        n += 1
    return n
