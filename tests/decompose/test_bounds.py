"""The limits of fast attention against numbers worked out elsewhere, and against attention."""

import math

import torch

from eckart.decompose.bounds import (
    centred,
    feature_count,
    largest_easy_scale,
    logit_reach,
    regime,
    required_degree,
)


def test_degrees_are_those_of_the_formula():
    """Worked out by hand from e^2R R^(g+1) / (g+1)! <= 1e-2."""
    assert [required_degree(r) for r in (0.5, 1, 2, 5)] == [3, 6, 10, 23]
    assert required_degree(0) == 0 and required_degree(1e3) > 200


def test_features_are_counted_as_monomials():
    assert [feature_count(64, g) for g in (1, 2, 3, 4)] == [65, 2145, 47_905, 814_385]


def test_the_polynomial_of_the_required_degree_is_as_near_as_promised():
    for reach in (0.3, 1.0, 3.0):
        degree = required_degree(reach, 1e-2)
        x = torch.linspace(-reach, reach, 401, dtype=torch.float64)
        series = sum(x**t / math.factorial(t) for t in range(degree + 1))
        assert float(((series - x.exp()) / x.exp()).abs().max()) <= 1e-2


def qk(length=600, h=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, length, h, generator=g), torch.randn(2, length, h, generator=g) + 3


def test_the_reach_is_that_of_all_logits():
    Q, K = qk()
    whole = (Q @ K.mT).abs().flatten(1).amax(-1) / 8**0.5
    torch.testing.assert_close(logit_reach(Q, K, 8**-0.5), whole, rtol=1e-6, atol=0)


def test_centred_keys_change_no_softmax_and_shorten_the_reach():
    Q, K = (t.double() for t in qk())
    scale = 8**-0.5
    before = (Q @ K.mT * scale).softmax(-1)
    torch.testing.assert_close((Q @ centred(K).mT * scale).softmax(-1), before, rtol=0, atol=1e-12)
    assert (logit_reach(Q, centred(K), scale) < logit_reach(Q, K, scale)).all()


def test_longer_texts_and_smaller_reaches_are_easier():
    assert regime(0.1, 64, 1_000) == "easy" and regime(10, 64, 10**6) == "hard"
    assert regime(0.3, 64, 1_000) == "hard" and regime(0.3, 64, 10**6) == "easy"


def test_the_largest_scale_is_where_the_regime_turns():
    scale = largest_easy_scale(0.05, 0.15, 64, 3_000)
    assert 0 < scale < math.inf
    assert regime(0.05 + 0.999 * scale * 0.1, 64, 3_000) == "easy"
    assert regime(0.05 + 1.001 * scale * 0.1, 64, 3_000) == "hard"
    assert largest_easy_scale(9, 10, 64, 1_000) == 0
    assert largest_easy_scale(0.05, 0.05, 64, 3_000) == math.inf
