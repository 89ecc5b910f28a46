"""Every search finds orthonormal directions that hold most of the gradient."""

import pytest
import torch
from tests.optim.trainings import gradients, parameters, run
from torch import nn

from eckart.optim import (
    SGD,
    SVD,
    Gram,
    Iteration,
    Leading,
    LowRankOptimizer,
    Randomised,
    Refresh,
    Rule,
)


def widely(*args):
    """The randomised projector that `Leading` uses for wide matrices."""
    return Leading(*args, wide=1)


SEARCHES = [SVD, Gram, Randomised, Iteration]
SHAPES = [(30, 20), (20, 30)]


def captured(state, G):
    """The share of G's energy in the projected directions, and their deviation from
    orthonormality."""
    if "left" in state:
        G, P = G.T, state["left"].T
    else:
        P = state["right"]
    eye = torch.eye(len(P), dtype=P.dtype)
    return ((G @ P.T) ** 2).sum() / (G**2).sum(), (P @ P.T - eye).abs().max()


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finds_nearly_the_best_subspace(search, dtype):
    grads = gradients(SHAPES, 9, dtype)
    named = parameters(SHAPES, dtype)
    optimizer = LowRankOptimizer(named, rule=Rule(SGD(), search(5), Refresh(1)))
    for row in grads:
        run(optimizer, named, [row])
        for (_, p), G in zip(named, row, strict=True):
            share, skew = captured(optimizer.state[p], G)
            s = torch.linalg.svdvals(G)
            best = (s[:5] ** 2).sum() / (s**2).sum()
            # one power step from last step's unrelated basis has found less
            assert share >= best * (0.5 if search is Iteration else 0.99)
            assert skew < (1e-6 if dtype == torch.float32 else 1e-12)


def test_gram_and_svd_are_the_same_subspace():
    grads = gradients(SHAPES, 1)
    found = []
    for search in (SVD, Gram):
        named = parameters(SHAPES)
        optimizer = LowRankOptimizer(named, rule=Rule(SGD(), search(5)))
        run(optimizer, named, grads)
        found.append([optimizer.state[p] for _, p in named])
    for a, b in zip(*found, strict=True):
        side = "left" if "left" in a else "right"
        # fp64, condition 1e2 squared: 1e-12; signs are fixed, so the vectors agree
        torch.testing.assert_close(a[side], b[side], rtol=0, atol=1e-10)


def test_a_decomposition_is_left_to_narrow_matrices():
    sides = {(64, 1023): SVD, (1023, 64): SVD, (1024, 2000): Randomised, (2000, 1024): Randomised}
    assert all(type(Leading(8).way(size)) is way for size, way in sides.items())
    assert type(Leading(8, "reverse").way((64, 1024))) is Randomised


@pytest.mark.parametrize("fall, least", [(1.0, 0.998), (0.5, 0.96)])
def test_three_random_products_capture_most_of_what_the_best_basis_does(fall, least):
    """Singular values i^-fall of 256 x 192, rank 48; the figures are those of 2736 x 1024."""
    U, s, Vh = torch.linalg.svd(gradients([(256, 192)], 1)[0][0], full_matrices=False)
    s = torch.arange(1, 193, dtype=s.dtype) ** -fall
    named = parameters([(256, 192)])
    optimizer = LowRankOptimizer(named, rule=Rule(SGD(), widely(48)))
    run(optimizer, named, [[U * s @ Vh]])
    share, skew = captured(optimizer.state[named[0][1]], U * s @ Vh)
    assert share >= least * (s[:48] ** 2).sum() / (s**2).sum()
    assert skew < 1e-12


def test_iteration_follows_a_gradient_that_stays():
    G = gradients([(30, 20)], 1)[0]
    named = parameters([(30, 20)])
    optimizer = LowRankOptimizer(named, rule=Rule(SGD(), Iteration(5), Refresh(1)))
    run(optimizer, named, gradients([(30, 20)], 2, seed=9)[:1] + [G] * 12)
    share, _ = captured(optimizer.state[named[0][1]], G[0])
    s = torch.linalg.svdvals(G[0])
    assert share >= 0.9999 * (s[:5] ** 2).sum() / (s**2).sum()


def test_random_directions_depend_on_name_seed_and_step_alone():
    G = gradients([(30, 20)], 1)[0][0]

    def basis(name, seed, before):
        p = nn.Parameter(torch.zeros(30, 20, dtype=torch.float64))
        params = [*before, (name, p)]
        rule = Rule(SGD(), Randomised(5, oversample=0, products=2))
        optimizer = LowRankOptimizer(params, rule=rule, seed=seed)
        for _, q in params:
            q.grad = G.clone()
        optimizer.step()
        return optimizer.state[p]["right"]

    other = [("other", nn.Parameter(torch.zeros(30, 20, dtype=torch.float64)))]
    torch.testing.assert_close(basis("w", 0, []), basis("w", 0, other), rtol=0, atol=1e-12)
    assert not torch.allclose(basis("w", 0, []), basis("v", 0, []))
    assert not torch.allclose(basis("w", 0, []), basis("w", 1, []))


@pytest.mark.parametrize("search", [*SEARCHES, widely])
def test_experts_are_searched_one_by_one(search):
    each = [gradients([(8, 6)], 1, seed=i)[0][0] for i in range(3)]
    rule = Rule(SGD(), search(2, "both"))
    p = nn.Parameter(torch.zeros(3, 8, 6, dtype=torch.float64))
    optimizer = LowRankOptimizer([{"params": [("w", p)], "leading": 1}], rule=rule)
    p.grad = torch.stack(each)
    optimizer.step()
    for i, G in enumerate(each):
        q = nn.Parameter(torch.zeros(8, 6, dtype=torch.float64))
        alone = LowRankOptimizer([("w", q)], rule=rule)
        q.grad = G
        alone.step()
        for side in ("left", "right"):
            a, b = optimizer.state[p][side][i], alone.state[q][side]
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
