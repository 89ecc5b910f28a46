"""What SUMO alone promises, against its algorithm reimplemented here."""

import pytest
import torch
from torch import nn

from eckart.methods.update.sumo import SUMO
from eckart.optim import LowRankOptimizer
from tests.methods.updates import (
    F64,
    check_resume,
    check_state,
    check_zero,
    regression,
    spectrum,
    start,
    train,
)


def by_the_paper(W, grads, bases, method, lr):
    """SUMO on the right side with our bases; the moment is rotated and orthogonalised in full."""
    (m, n), M, P, s = W.shape, 0.0, bases[0], None
    by = {"rms": 0.04 * max(m, n), "one": 1, "tall": max(1, m / n), "ratio": m / n}
    for G, new in zip(grads, bases, strict=True):
        M = M @ (P @ new.T) if not isinstance(M, float) else M
        P = new
        M = method.momentum * M + G @ P.T
        U, _, Vh = torch.linalg.svd(M, full_matrices=False)
        N = U @ Vh
        if method.gamma is not None:
            size = N.norm()
            q = 1.0 if s is None else max(size / (s + 1e-8), method.gamma) / method.gamma
            N, s = N / q, size / q
        W = (1 - lr * method.weight_decay) * W
        W = W - lr * method.scale * by[method.step_scale] ** 0.5 * N @ P
    return W


@pytest.mark.parametrize("gamma", [1.01, None])
@pytest.mark.parametrize("step_scale", ["rms", "one", "tall", "ratio"])
def test_follows_the_papers_algorithm(step_scale, gamma):
    method = SUMO(
        rank=3, every=4, scale=0.5, step_scale=step_scale, gamma=gamma, stagger=False,
        weight_decay=0.1,
    )  # fmt: skip
    grads = spectrum((9, 6), 13)
    path, states = train(method.rule(), start((9, 6)), grads)
    wanted = by_the_paper(start((9, 6)), grads, [s["right"] for s in states], method, 0.05)
    torch.testing.assert_close(path[-1], wanted, rtol=0, atol=1e-9)  # fp64, 13 steps


def test_the_basis_holds_the_leading_directions():
    grads = spectrum((40, 30), 1)
    _, states = train(SUMO(rank=4).rule(), start((40, 30)), grads)
    P = states[0]["right"]
    best = torch.linalg.svdvals(grads[0])[:4].square().sum()
    assert (grads[0] @ P.T).square().sum() > 0.99 * best


def test_the_step_is_exactly_orthogonal():
    grads = spectrum((9, 6), 1)
    path, _ = train(SUMO(rank=3, step_scale="one").rule(), start((9, 6)), grads, lr=1.0)
    s = torch.linalg.svdvals(start((9, 6)) - path[0])
    torch.testing.assert_close(s[:3], torch.ones(3, dtype=F64), rtol=0, atol=1e-12)
    assert s[3] < 1e-12


def test_directions_that_the_momentum_lacks_do_not_move():
    G = spectrum((9, 6), 1)[0]
    U, s, Vh = torch.linalg.svd(G, full_matrices=False)
    low = U[:, :2] * s[:2] @ Vh[:2]  # rank 2, below that of the subspace
    path, _ = train(SUMO(rank=4, step_scale="one").rule(), start((9, 6)), [low], lr=1.0)
    s = torch.linalg.svdvals(start((9, 6)) - path[0])
    torch.testing.assert_close(s[:2], torch.ones(2, dtype=F64), rtol=0, atol=1e-10)
    assert s[2] < 1e-10


def test_a_momentum_that_grows_in_rank_is_held_back():
    G = spectrum((9, 6), 2)
    U, s, Vh = torch.linalg.svd(G[0], full_matrices=False)
    rank_one = U[:, :1] * s[:1] @ Vh[:1]
    rule = SUMO(rank=4, step_scale="one").rule()
    path, states = train(rule, start((9, 6)), [rank_one, G[1]], lr=1.0)
    assert states[0]["limiter"] == pytest.approx(1.0, rel=1e-12)
    assert states[1]["limiter"] == pytest.approx(1.01, rel=1e-7)  # free: 2, of four directions
    assert (path[1] - path[0]).norm() == pytest.approx(1.01, rel=1e-7)


def test_the_state_is_one_moment_and_a_basis():
    assert check_state(SUMO(rank=3), 9, 6) == {"right": (3, 6), "momentum": (9, 3), "limiter": ()}
    assert check_state(SUMO(rank=3), 6, 9) == {"left": (6, 3), "momentum": (3, 9), "limiter": ()}


def test_a_resumed_run_is_the_uninterrupted_one():
    check_resume(SUMO(rank=3, every=5).rule(), stop=7)


def test_zero_gradients_do_no_harm():
    check_zero(SUMO(rank=3, every=4, weight_decay=0.1).rule())


def test_a_transposed_run_is_the_run_transposed():
    rule, grads = SUMO(rank=3, every=4, weight_decay=0.1).rule(), spectrum((9, 6), 12)
    path, _ = train(rule, start((9, 6)), grads)
    turned, _ = train(rule, start((9, 6)).T, [G.T for G in grads])
    torch.testing.assert_close(path[-1], turned[-1].T, rtol=0, atol=1e-9)


def test_a_gradient_that_is_not_finite_is_seen_in_the_weights():
    """It does not raise inside a decomposition, and NaN reaches the weights."""
    grads = spectrum((9, 6), 3)
    grads[1][0, 0] = torch.nan
    path, _ = train(SUMO(rank=3).rule(), start((9, 6)), grads)
    assert path[1].isnan().any()


def test_projected_gradients_of_micro_batches_add_up():
    """It is linear in the gradient between two bases, so hooks need no more than R."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(6, 9, dtype=F64), nn.Linear(9, 7, dtype=F64)) for _ in "ab"]
    models[1].load_state_dict(models[0].state_dict())
    rule = SUMO(rank=3, every=4).rule()
    a, b = (LowRankOptimizer(m.named_parameters(), 0.02, rule=rule) for m in models)
    b.attach_layerwise()
    for step in range(10):
        for micro in range(2):
            x = torch.randn(
                8, 6, dtype=F64, generator=torch.Generator().manual_seed(2 * step + micro)
            )
            for model in models:
                (model(x) ** 2).sum().backward()
        for optimizer in (a, b):
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10)


def test_it_learns_a_small_map():
    assert regression(SUMO(rank=4, every=20).rule(), 0.1) < 1e-4
