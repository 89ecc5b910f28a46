"""Attention by polynomials is what it says: exact features, true gradients, errors by reach."""

import math

import pytest
import torch

from eckart.decompose.bounds import feature_count, logit_reach
from eckart.decompose.polynomial import (
    features,
    gradient_errors,
    gradients,
    polynomial_attention,
    series,
)

NAMES = ("O", "dQ", "dK", "dV")


def qkv(length=20, h=4, reach=1.0, seed=0):
    """Q, K, V, dO in fp64 whose logits, at scale 1 / sqrt(h), reach this far."""
    g = torch.Generator().manual_seed(seed)
    Q, K, V, dO = (torch.randn(2, length, h, generator=g, dtype=torch.float64) for _ in range(4))
    return Q * (reach / logit_reach(Q, K, h**-0.5).max()), K, V, dO


@pytest.mark.parametrize(("h", "degree"), [(1, 0), (1, 5), (3, 2), (4, 3), (2, 6)])
def test_features_multiply_to_the_series(h, degree):
    Q, K, *_ = qkv(h=h, reach=3.0)
    phi = features(Q, degree, 0.7)
    assert phi.shape[-1] == feature_count(h, degree)
    wanted = sum((0.7 * Q @ K.mT) ** t / math.factorial(t) for t in range(degree + 1))
    torch.testing.assert_close(phi @ features(K, degree, 0.7).mT, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(series(0.7 * Q @ K.mT, degree), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [20, 300])  # within one chunk, and over three
def test_the_linear_form_and_its_autograd_are_the_dense_formulas(causal, length):
    Q, K, V, dO = qkv(length)
    wanted = gradients(Q, K, V, dO, 0.5, 2, causal)
    leaves = [t.clone().requires_grad_() for t in (Q, K, V)]
    out = polynomial_attention(*leaves, 0.5, 2, causal)
    found = dict(zip(NAMES, (out, *torch.autograd.grad(out, leaves, dO)), strict=True))
    for name in NAMES:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_exact_formulas_are_autograd_through_softmax(causal):
    Q, K, V, dO = qkv(reach=4.0)
    leaves = [t.clone().requires_grad_() for t in (Q, K, V)]
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=causal, scale=0.5)
    found = dict(zip(NAMES, (out, *torch.autograd.grad(out, leaves, dO)), strict=True))
    wanted = gradients(Q, K, V, dO, 0.5, None, causal)
    for name in NAMES:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-10, atol=1e-10)


def test_errors_fall_with_the_degree_and_rise_with_the_reach():
    """At reach 2 degree 10 is enough for 1e-2 by the bound; measured it is far below."""
    by_degree = [
        max(float(e.max()) for e in gradient_errors(*qkv(reach=2.0), 0.5, g).values())
        for g in (2, 4, 6, 10)
    ]
    assert by_degree == sorted(by_degree, reverse=True) and by_degree[-1] < 1e-4
    by_reach = [
        float(gradient_errors(*qkv(reach=reach), 0.5, 2)["dQ"].max()) for reach in (0.1, 0.5, 2, 5)
    ]
    assert by_reach == sorted(by_reach) and by_reach[0] < 1e-2 < by_reach[-1]


def test_errors_depend_on_the_norms_and_not_on_the_length():
    g = torch.Generator().manual_seed(0)
    found = []
    for length in (64, 1024):
        Q, K = (2 * torch.rand(length, 8, generator=g, dtype=torch.float64) - 1 for _ in range(2))
        V, dO = (torch.randn(length, 8, generator=g, dtype=torch.float64) for _ in range(2))
        errors = gradient_errors(Q, K, V, dO, 8**-0.5, 2)
        found.append([float(errors[name]) for name in NAMES])
    for few, many in zip(*found, strict=True):  # sixteen times the tokens; other draws
        assert 0.5 < many / few < 2


def test_without_logits_degree_zero_is_exact():
    _, K, V, dO = qkv()
    errors = gradient_errors(torch.zeros_like(K), K, V, dO, 0.5, 0)
    assert float(errors["O"].max()) < 1e-12 and float(errors["dV"].max()) < 1e-12
