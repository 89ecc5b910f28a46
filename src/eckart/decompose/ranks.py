"""The rank needed for a given error, or to pass a given test."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def tail_errors(s: Tensor) -> Tensor:
    """Relative Frobenius error of the best approximation at every rank 0..k, fp64 [k + 1].

    s [*, k] are the singular values, largest first. Leading dimensions (experts) share one rank
    and have one joint error. An all-zero matrix has error 0 at any rank.
    """
    squares = s.double().square().reshape(-1, s.shape[-1]).sum(0)  # [k]
    left = squares.flip(0).cumsum(0).flip(0)  # [k], squared errors of ranks 0..k-1
    left = torch.cat([left, left.new_zeros(1)])
    return (left / left[0].clamp_min(torch.finfo(torch.float64).tiny)).sqrt()


def rank_for_energy(s: Tensor, energy: float) -> int:
    """The smallest rank whose singular values hold at least the share `energy` of the squared
    sum of s [k]; 0 where all are zero."""
    held = s.double().square().cumsum(-1)
    if not held[-1]:
        return 0
    return int((held / held[-1] < energy - 1e-12).sum()) + 1


def smallest_rank(good: Callable[[int], bool], most: int) -> int | None:
    """The smallest rank from 1 to `most` with good(rank), which must be monotonic in the rank.

    Doubles until one is good, then bisects: 2 log2(rank) tests. None where `most` is not good.
    """
    low, high = 0, 1  # low is not good
    while not good(high):
        if high >= most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle, high)
    return high
