"""What APOLLO and APOLLO-Mini promise, against their formulas reimplemented here."""

import itertools

import pytest
import torch

from eckart.errors import UsageError
from eckart.methods.update.apollo import APOLLO
from eckart.methods.update.apollo_mini import APOLLOMini
from eckart.optim import Adam, Gaussian, LowRankOptimizer, Refresh, Rescaled, Rule
from eckart.optim.drawn import normals
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


def by_the_paper(W, grads, seeds, method, rank, lr):
    """The right side, P and the scaled gradient formed in full, with the code's epsilon."""
    W, M, V, s = W.clone(), 0.0, 0.0, None
    (b1, b2), path = method.betas, []
    phi_of = getattr(method, "phi", "matrix")
    for t, (G, seed) in enumerate(zip(grads, seeds, strict=True)):
        R = G @ (normals(seed, rank, G.shape[1]).double() / rank**0.5).T
        M, V = b1 * M + (1 - b1) * R, b2 * V + (1 - b2) * R**2
        c1, c2 = 1 - b1 ** (t + 1), 1 - b2 ** (t + 1)
        N = M / (V.sqrt() + method.eps)
        axis = 1 if phi_of == "line" else (0, 1)
        phi = N.norm(dim=axis, keepdim=True) / (R.norm(dim=axis, keepdim=True) + 1e-8)
        S = phi * G
        if method.gamma is not None:
            n = S.norm()
            q = 1.0 if s is None else max(n / (s + 1e-8), method.gamma) / method.gamma
            S, s = S / q, n / q
        W = W - lr * c2**0.5 / c1 * method.scale**0.5 * S
        W = W - lr * method.weight_decay * W
        path.append(W)
    return path


@pytest.mark.parametrize("gamma", [1.01, None])
@pytest.mark.parametrize("phi", ["line", "matrix"])
def test_follows_the_papers_algorithm(phi, gamma):
    method = APOLLO(
        rank=3, every=5, scale=2.0, phi=phi, gamma=gamma, stagger=False, weight_decay=0.1
    )
    grads = spectrum((9, 6), 13)
    path, states = train(method.rule(), start((9, 6)), grads)
    seeds = [s["seed"] for s in states]
    wanted = by_the_paper(start((9, 6)), grads, seeds, method, 3, 0.05)
    torch.testing.assert_close(path[-1], wanted[-1], rtol=0, atol=1e-10)  # fp64, 13 steps
    assert len({int(s) for s in seeds}) == 3  # a new draw at steps 0, 5 and 10


def test_mini_is_the_rank_one_form():
    method = APOLLOMini(every=5, weight_decay=0.1)
    grads = spectrum((9, 6), 13)
    path, states = train(method.rule(), start((9, 6)), grads)
    wanted = by_the_paper(start((9, 6)), grads, [s["seed"] for s in states], method, 1, 0.05)
    torch.testing.assert_close(path[-1], wanted[-1], rtol=0, atol=1e-10)
    same = APOLLO(rank=1, every=5, scale=128.0, phi="matrix", weight_decay=0.1)
    assert same.rule() == method.rule()


def test_no_basis_is_stored():
    assert check_state(APOLLO(rank=3), 9, 6) == {
        "seed": (), "exp_avg": (9, 3), "exp_avg_sq": (9, 3), "limiter": (),
    }  # fmt: skip
    assert check_state(APOLLO(rank=3), 6, 9)["exp_avg"] == (3, 9)
    assert check_state(APOLLOMini(), 9, 6)["exp_avg"] == (9, 1)
    assert APOLLOMini().cost(9, 6).state == 2 * 9 + 2


@pytest.mark.parametrize("method", [APOLLO(rank=3, every=5), APOLLOMini(every=5)])
def test_a_resumed_run_is_the_uninterrupted_one(method):
    check_resume(method.rule(), stop=7)


def test_zero_gradients_do_no_harm():
    check_zero(APOLLO(rank=3, every=4, weight_decay=0.1).rule())


@pytest.mark.parametrize("phi", ["line", "matrix"])
def test_a_transposed_run_is_the_run_transposed(phi):
    rule = APOLLO(rank=3, every=6, phi=phi, weight_decay=0.1).rule()
    grads = spectrum((9, 6), 14)
    path, _ = train(rule, start((9, 6)), grads)
    turned, _ = train(rule, start((9, 6)).T, [G.T for G in grads])
    torch.testing.assert_close(path[-1], turned[-1].T, rtol=0, atol=1e-10)


def test_the_update_is_the_gradient_line_by_line():
    """Each line of the long side keeps its direction; with one factor all of it does."""
    (G,) = spectrum((9, 6), 1)
    path, _ = train(APOLLO(rank=2).rule(), start((9, 6)), [G])
    moved = start((9, 6)) - path[0]
    cosine = torch.cosine_similarity(moved, G, dim=1)
    torch.testing.assert_close(cosine, torch.ones(9, dtype=F64), rtol=0, atol=1e-12)
    path, _ = train(APOLLOMini().rule(), start((9, 6)), [G])
    moved = start((9, 6)) - path[0]
    assert torch.cosine_similarity(moved.flatten(), G.flatten(), dim=0) > 1 - 1e-12


def test_the_update_grows_by_one_percent_at_most():
    grads = spectrum((9, 6), 30)
    grads[20] = 30 * grads[20]
    _, states = train(APOLLO(rank=3, every=50).rule(), start((9, 6)), grads)
    limits = [float(s["limiter"]) for s in states]
    assert all(b <= 1.01 * (a + 1e-8) + 1e-12 for a, b in itertools.pairwise(limits))
    _, states = train(APOLLO(rank=3, every=50, gamma=1e9).rule(), start((9, 6)), grads)
    assert states[20]["limiter"] > 1.2 * states[19]["limiter"]  # what was held back


def test_it_learns_a_small_map():
    assert regression(APOLLO(rank=4, every=20).rule(), 0.1) < 1e-6
    assert regression(APOLLOMini(every=20).rule(), 0.03) < 1e-6


def test_experts_are_measured_one_by_one():
    """Each expert has its own directions: the seeds differ, and so do the factors."""
    rule = APOLLO(rank=2, every=3, gamma=None).rule()
    grads = spectrum((3, 8, 5), 5)
    path, states = train(rule, start((3, 8, 5)), grads, leading=1)
    assert len(set(states[-1]["seed"].tolist())) == 3
    moved = (path[0] - start((3, 8, 5))) / grads[0]  # one factor for each line
    torch.testing.assert_close(moved, moved[..., :1].expand_as(moved), rtol=1e-9, atol=0)


def test_bases_that_are_not_orthonormal_serve_no_other_residual_and_no_rotation():
    with pytest.raises(UsageError, match="needs a projector with an orthonormal basis"):
        Rule(Adam(), Gaussian(3), residual=Rescaled())
    with pytest.raises(UsageError, match="cannot be rotated between bases that are not"):
        Rule(Adam(), Gaussian(3), Refresh(7, "rotate"))


def test_layer_by_layer_it_needs_the_whole_gradient():
    model = torch.nn.Linear(6, 9)
    with pytest.raises(UsageError, match="cannot wait for the step layer by layer"):
        LowRankOptimizer(model.named_parameters(), rule=APOLLO(rank=3).rule(), layerwise=True)
