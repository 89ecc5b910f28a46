"""Whether attention, and with it LoRA's gradient, can be computed in subquadratic time.

With logits S = c Q K^T of range R = max |S|, exp(S) is a polynomial of degree g up to a
relative error e^2R R^(g+1) / (g+1)!, and a polynomial of degree g in q . k is an inner product
of F = C(h + g, g) features of q and k: attention then costs L F instead of L^2. Whether that is
less depends on R, which an adapter can change. Centring the keys first does not change the
softmax.

Source: J. Hu, M. Su, E. Kuo, Z. Song, H. Liu, "Computational Limits of Low-Rank Adaptation
Fine-Tuning for Transformer Models", 2024, which has the threshold without its constant,
max |Q|, |K| = o(sqrt(log L)). The degree and the break-even length are ours to compute.

L tokens, h numbers in a head, c the scale of the logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

HIGHEST = 200  # largest degree tried: there are more features than tokens long before
CHUNK = 256  # queries whose logits are in memory at once


def required_degree(reach: float, eps: float = 1e-2) -> int:
    """The least degree g with relative error e^2R R^(g+1) / (g+1)! <= eps for |x| <= R = reach.

    HIGHEST + 1 where no degree up to HIGHEST is enough.
    """
    if reach == 0:
        return 0
    for degree in range(HIGHEST + 1):
        log = 2 * reach + (degree + 1) * math.log(reach) - math.lgamma(degree + 2)
        if log <= math.log(eps):
            return degree
    return HIGHEST + 1


def feature_count(h: int, degree: int) -> int:
    """F = C(h + g, g), the number of monomials of h numbers up to a degree; also the number of
    tokens above which polynomial attention is cheaper."""
    return math.comb(h + degree, degree)


def regime(reach: float, h: int, length: int, eps: float = 1e-2) -> str:
    """Returns "easy" where the required degree has fewer features than there are tokens, else
    "hard"."""
    degree = required_degree(reach, eps)
    return "easy" if degree <= HIGHEST and feature_count(h, degree) < length else "hard"


def centred(K: Tensor) -> Tensor:
    """Keys [*, L, h] minus their mean over tokens, which leaves the softmax unchanged."""
    return K - K.mean(-2, keepdim=True)


def logit_reach(Q: Tensor, K: Tensor, scale: float) -> Tensor:
    """max |c q . k| over all pairs of tokens, [*]; computes at most CHUNK rows of S at once.

    Q, K [*, L, h]. Masked pairs are included, so with a mask it is an upper bound.
    """
    found = Q.new_zeros(Q.shape[:-2], dtype=torch.float32)
    for rows in Q.float().split(CHUNK, dim=-2):
        logits = (rows @ K.float().mT).abs() * scale  # [*, chunk, L]
        found = torch.maximum(found, logits.flatten(-2).amax(-1))
    return found


def largest_easy_scale(reach_without: float, reach_with: float, h: int, length: int) -> float:
    """The largest factor on an adapter with which a head stays easy; 0 where it is hard without.

    The reach is taken to be linear in the factor, from `reach_without` (0, adapter off) to
    `reach_with` (1); infinite where the adapter does not increase it.
    """
    if regime(reach_without, h, length) == "hard":
        return 0.0
    growth = reach_with - reach_without
    if growth <= 0:
        return math.inf
    low, high = 0.0, 1.0
    while regime(reach_without + high * growth, h, length) == "easy":
        low, high = high, 2 * high
        if high > 1e6:
            return math.inf
    for _ in range(40):  # bisection to 1e-12 of the scale
        middle = (low + high) / 2
        easy = regime(reach_without + middle * growth, h, length) == "easy"
        low, high = (middle, high) if easy else (low, middle)
    return low
