"""What Muon alone promises, against its algorithm reimplemented here."""

import pytest
import torch
from torch import nn

from eckart import Recipe, attach
from eckart.methods.update.muon import Muon
from eckart.methods.weights.dense import Dense
from eckart.optim import LowRankOptimizer
from tests import tiny
from tests.methods.updates import (
    F64,
    check_hooks,
    check_resume,
    check_state,
    check_zero,
    regression,
    spectrum,
    start,
    train,
)


def newton_schulz(X):
    X = X / (X.norm() + 1e-7)
    for _ in range(5):
        C = X @ X.T
        X = 3.4445 * X - 4.7750 * C @ X + 2.0315 * C @ C @ X
    return X


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("step_scale", ["rms", "tall", "ratio", "one"])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_follows_its_algorithm(shape, step_scale, nesterov):
    (m, n), lr = shape, 0.05
    method = Muon(step_scale=step_scale, nesterov=nesterov, weight_decay=0.1)
    grads = spectrum(shape, 12)
    path, states = train(method.rule(), start(shape), grads, lr)
    W, B = start(shape), torch.zeros(shape, dtype=F64)
    s = {"rms": 0.04 * max(m, n), "tall": max(1, m / n), "ratio": m / n, "one": 1}[step_scale]
    for G in grads:
        B = 0.95 * B + G
        W = (1 - lr * 0.1) * W - lr * s**0.5 * newton_schulz(G + 0.95 * B if nesterov else B)
    torch.testing.assert_close(path[-1], W, rtol=0, atol=1e-9)  # fp64, 12 steps
    torch.testing.assert_close(states[-1]["momentum"], B, rtol=0, atol=1e-12)


def test_all_directions_count_alike():
    """The gradient's singular values go from 1 to 0.01, the step's lie near 1."""
    (G,) = spectrum((9, 6), 1)
    path, _ = train(Muon(step_scale="one").rule(), start((9, 6)), [G], lr=1.0)
    s = torch.linalg.svdvals(start((9, 6)) - path[0])
    assert s.min() > 0.6 and s.max() < 1.3


def test_the_state_is_one_momentum():
    assert check_state(Muon(), 9, 6) == {"momentum": (9, 6)}
    assert Muon().cost(9, 6).state == 54


def test_a_resumed_run_is_the_uninterrupted_one():
    check_resume(Muon().rule(), stop=7)


def test_zero_gradients_do_no_harm():
    check_zero(Muon(weight_decay=0.1).rule())


@pytest.mark.parametrize("step_scale", ["rms", "one"])
def test_a_transposed_run_is_the_run_transposed(step_scale):
    rule, grads = Muon(step_scale=step_scale).rule(), spectrum((9, 6), 10)
    path, _ = train(rule, start((9, 6)), grads)
    turned, _ = train(rule, start((9, 6)).T, [G.T for G in grads])
    torch.testing.assert_close(path[-1], turned[-1].T, rtol=0, atol=1e-10)


def test_experts_and_filters_are_matrices():
    rule = Muon(step_scale="one").rule()
    grads = spectrum((3, 8, 5), 4)
    path, _ = train(rule, start((3, 8, 5)), grads, leading=1)
    for i in range(3):
        alone, _ = train(rule, start((3, 8, 5))[i], [G[i] for G in grads])
        torch.testing.assert_close(path[-1][i], alone[-1], rtol=0, atol=1e-12)
    filters, _ = train(
        rule, start((8, 5, 3, 1)), [G.view(8, 5, 3, 1) for G in spectrum((8, 15), 4)]
    )
    flat, _ = train(rule, start((8, 5, 3, 1)).view(8, 15), spectrum((8, 15), 4))
    assert torch.equal(filters[-1].view(8, 15), flat[-1])


def test_vectors_follow_adamw():
    p, q = (nn.Parameter(start((7,))) for _ in "ab")
    ours = LowRankOptimizer([("b", p)], 0.05, rule=Muon(weight_decay=0.1).rule())
    torchs = torch.optim.AdamW([q], 0.05, (0.9, 0.95), weight_decay=0.1)
    for step in range(5):
        p.grad = q.grad = start((7,), seed=step)
        ours.step()
        torchs.step()
    assert torch.equal(p, q)


def test_layers_of_one_shape_move_as_each_alone():
    each = [spectrum((9, 6), 6, seed=i) for i in range(3)]
    named = [(f"w{i}", nn.Parameter(start((9, 6), seed=i))) for i in range(3)]
    optimizer = LowRankOptimizer(named, 0.05, rule=Muon().rule())
    for row in zip(*each, strict=True):
        for (_, p), G in zip(named, row, strict=True):
            p.grad = G.clone()
        optimizer.step()
    for i, (_, p) in enumerate(named):
        path, _ = train(Muon().rule(), start((9, 6), seed=i), each[i])
        # fp64: products of a stack may be summed in another order
        torch.testing.assert_close(p.detach(), path[-1], rtol=0, atol=1e-12)


def test_embedding_head_and_norms_have_their_own_rate():
    handle = attach(tiny.llama(), Recipe(weights=Dense(), update=Muon(rest_lr=0.1)))
    optimizer = handle.optimizer(lr=0.02)
    for group in optimizer.param_groups:
        for name in group["param_names"]:
            matrix = "layers" in name and "norm" not in name
            assert group["lr"] == pytest.approx(0.02 if matrix else 0.002), name
            assert bool(group["rule"].projector.identity) == (not matrix), name


def test_hooks_make_the_same_steps():
    check_hooks(Muon().rule(), 6)


def test_it_learns_a_small_map():
    assert regression(Muon().rule(), 0.1) < 1e-5
