"""Attention with a polynomial in place of exp, in linear time, and the error of its gradient.

    exp(S) ~ p_g(S) = sum_{t <= g} S^t / t!     S = c Q K^T
    p_g(c q . k) = phi(q) . phi(k)              phi: all monomials up to degree g, F of them
    O = phi(Q) (phi(K)^T V) / D                 D = phi(Q) (phi(K)^T 1): linear in L

The gradient is the exact derivative of this approximate forward pass. D is always positive for
even degrees, not for odd ones.

Source: J. Hu, M. Su, E. Kuo, Z. Song, H. Liu, "Computational Limits of Low-Rank Adaptation
Fine-Tuning for Transformer Models", 2024. There the polynomial replaces exp in the gradient of
exact attention, which costs h times as much for the same degree of O and dV.

L tokens, h numbers in a head, c the scale of the logits, F = C(h + g, g) features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from eckart.decompose.bounds import feature_count

CHUNK = 128  # tokens whose logits are in memory at once in a causal pass


@lru_cache(maxsize=16)
def monomials(h: int, degree: int) -> tuple[list[tuple[list[int], list[int]]], list[float]]:
    """How to build all monomials of h numbers, degree by degree, and their weights.

    Each monomial is one of the degree below times one number: for each degree, the indices of
    both. A monomial x^a has weight 1 / prod a_i!.
    """
    levels, weights = [], [1.0]
    below: dict[tuple[int, ...], int] = {(): 0}
    for t in range(1, degree + 1):
        here = list(combinations_with_replacement(range(h), t))
        levels.append(([below[key[:-1]] for key in here], [key[-1] for key in here]))
        weights += [1 / math.prod(math.factorial(key.count(i)) for i in set(key)) for key in here]
        below = {key: i for i, key in enumerate(here)}
    return levels, weights


def features(x: Tensor, degree: int, scale: float) -> Tensor:
    """phi(x), [*, L, h] -> [*, L, F], with phi(q) . phi(k) = p_g(scale q . k) exactly."""
    levels, weights = monomials(x.shape[-1], degree)
    x = x * math.sqrt(scale)
    found = [torch.ones_like(x[..., :1])]
    for known, last in levels:
        found.append(found[-1][..., known] * x[..., last])
    return torch.cat(found, -1) * torch.tensor(weights, dtype=x.dtype, device=x.device).sqrt()


def series(S: Tensor, degree: int) -> Tensor:
    """p_g(S), entry by entry; zero for degree -1, which is the derivative of degree 0."""
    if degree < 0:
        return torch.zeros_like(S)
    found = torch.ones_like(S)
    for t in range(degree, 0, -1):  # Horner
        found = 1 + found * S / t
    return found


def polynomial_attention(
    Q: Tensor, K: Tensor, V: Tensor, scale: float, degree: int, causal: bool = False
) -> Tensor:
    """O [*, L, h]: attention with p_g in place of exp, without L x L matrices.

    Q, K, V [*, L, h]. Causal attention uses logits within a chunk and accumulated moments of
    features for earlier tokens.
    """
    V1 = torch.cat([V, torch.ones_like(V[..., :1])], -1)  # the last column becomes D
    if not causal:
        moments = features(K, degree, scale).mT @ V1  # [*, F, h + 1]
        return divided(features(Q, degree, scale) @ moments)
    shape = (*V.shape[:-2], feature_count(Q.shape[-1], degree), V1.shape[-1])
    moments, parts = V.new_zeros(shape), []
    for q, k, v in zip(Q.split(CHUNK, -2), K.split(CHUNK, -2), V1.split(CHUNK, -2), strict=True):
        near = series(q @ k.mT * scale, degree).tril() @ v
        parts.append(divided(near + features(q, degree, scale) @ moments))
        moments = moments + features(k, degree, scale).mT @ v
    return torch.cat(parts, -2)


def divided(summed: Tensor) -> Tensor:
    """Sums [*, L, h + 1] divided by their last column, [*, L, h]."""
    return summed[..., :-1] / summed[..., -1:]


def gradients(
    Q: Tensor, K: Tensor, V: Tensor, dO: Tensor, scale: float, degree: int | None, causal: bool
) -> dict[str, Tensor]:
    """O, dQ, dK, dV of attention with p_degree, or with exp where the degree is None; by L x L
    matrices and without autograd.

    With W = p(S) / D:  dS = (p'(S) / D) * (dO V^T - rowsum(dO * O)), dQ = c dS K,
    dK = c dS^T Q, dV = W^T dO. All [*, L, h].
    """
    S = Q @ K.mT * scale
    if degree is None:
        p = (S - S.amax(-1, keepdim=True)).exp()  # a constant of a row cancels
        slope = p
    else:
        p, slope = series(S, degree), series(S, degree - 1)
    if causal:
        p, slope = p.tril(), slope.tril()
    D = p.sum(-1, keepdim=True)
    found = p @ V / D
    dS = slope / D * (dO @ V.mT - (dO * found).sum(-1, keepdim=True)) * scale
    return {"O": found, "dQ": dS @ K, "dK": dS.mT @ Q, "dV": (p / D).mT @ dO}


def gradient_errors(
    Q: Tensor, K: Tensor, V: Tensor, dO: Tensor, scale: float, degree: int, causal: bool = False
) -> Mapping[str, Tensor]:
    """|approximate - exact| / |exact| of O, dQ, dK, dV, each [*]; in the inputs' dtype."""
    exact = gradients(Q, K, V, dO, scale, None, causal)
    near = gradients(Q, K, V, dO, scale, degree, causal)
    return {
        name: (near[name] - value).norm(dim=(-2, -1)) / value.norm(dim=(-2, -1)).clamp_min(1e-30)
        for name, value in exact.items()
    }
