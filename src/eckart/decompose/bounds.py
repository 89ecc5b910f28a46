"""When can attention, and with it LoRA's gradient, be had in less than quadratic time?

With logits S = c Q K^T of range R = max |S|, exp(S) is a polynomial of degree g up to a
relative error e^2R R^(g+1) / (g+1)!, and a polynomial of degree g in q . k is a product of
F = C(h + g, g) features of q and k: attention costs L F instead of L^2. So the range of the
logits, which an adapter can move, decides; keys may be centred first, which changes no softmax.

Source: J. Hu, M. Su, E. Kuo, Z. Song, H. Liu, "Computational Limits of Low-Rank Adaptation
Fine-Tuning for Transformer Models", 2024, which has the threshold without its constant,
max |Q|, |K| = o(sqrt(log L)). The degree and the break-even length are ours to compute.

L tokens, h numbers in a head, c the scale of the logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

HIGHEST = 200  # degrees looked at: features are beyond all lengths long before
CHUNK = 256  # queries whose logits live at once


def required_degree(reach: float, eps: float = 1e-2) -> int:
    """The least g with e^2R R^(g+1) / (g+1)! <= eps: every exp(x), |x| <= R, is that near.

    HIGHEST + 1 where no degree up to HIGHEST will do.
    """
    if reach == 0:
        return 0
    for degree in range(HIGHEST + 1):
        log = 2 * reach + (degree + 1) * math.log(reach) - math.lgamma(degree + 2)
        if log <= math.log(eps):
            return degree
    return HIGHEST + 1


def feature_count(h: int, degree: int) -> int:
    """F = C(h + g, g): monomials of h numbers up to a degree; also the break-even length."""
    return math.comb(h + degree, degree)


def regime(reach: float, h: int, length: int, eps: float = 1e-2) -> str:
    """easy where the features of the required degree are fewer than the tokens, else hard."""
    degree = required_degree(reach, eps)
    return "easy" if degree <= HIGHEST and feature_count(h, degree) < length else "hard"


def centred(K: Tensor) -> Tensor:
    """Keys [*, L, h] without their mean over the tokens: the softmax stays as it is."""
    return K - K.mean(-2, keepdim=True)


def logit_reach(Q: Tensor, K: Tensor, scale: float) -> Tensor:
    """max |c q . k| over all pairs of tokens, [*]; never more than CHUNK rows of S at once.

    Q, K [*, L, h]. All pairs count, those that a mask leaves out too: an upper bound there.
    """
    found = Q.new_zeros(Q.shape[:-2], dtype=torch.float32)
    for rows in Q.float().split(CHUNK, dim=-2):
        logits = (rows @ K.float().mT).abs() * scale  # [*, chunk, L]
        found = torch.maximum(found, logits.flatten(-2).amax(-1))
    return found


def largest_easy_scale(reach_without: float, reach_with: float, h: int, length: int) -> float:
    """How much louder an adapter may become before a head is hard; 0 where it is hard without.

    The reach is taken to grow in proportion from `reach_without` (adapter off) to
    `reach_with` (as it is); infinite where the adapter does not make it grow.
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
