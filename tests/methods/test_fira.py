"""What Fira alone promises, against its formulas reimplemented here."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from eckart.errors import UsageError
from eckart.methods.update.fira import Fira
from eckart.methods.update.galore import GaLore
from eckart.optim import SGD, SVD, LowRankOptimizer, Refresh, Rescaled, Rule
from tests.methods import updates
from tests.methods.updates import F64, check_experts, check_hooks, check_resume, spectrum, start


def train(rule, W, grads):
    path, states = updates.train(rule, W, grads)
    return path, [float(state.get("limiter", 0.0)) for state in states]


def by_the_paper(W, grads, method, lr):
    """Fira on the right side, the residual formed in full, with its code's epsilon."""
    W, M, V, s = W.clone(), 0.0, 0.0, None
    (b1, b2), path, limits = method.betas, [], []
    c = method.scale if method.center == "scaled" else 1.0
    for t, G in enumerate(grads):
        if t % method.every == 0:
            Vh = torch.linalg.svd(G, full_matrices=False)[2][: method.rank]
            P = Vh * Vh.gather(1, Vh.abs().argmax(1, keepdim=True)).sign()
        R = G @ P.T
        M = b1 * M + (1 - b1) * R
        V = b2 * V + (1 - b2) * R**2
        c1, c2 = 1 - b1 ** (t + 1), 1 - b2 ** (t + 1)
        eps = method.eps * (c2**0.5 if method.eps_mode == "torch" else 1.0)
        N = M / (V.sqrt() + eps)
        axis = 1 if method.phi == "line" else (0, 1)
        phi = N.norm(dim=axis, keepdim=True) / (R.norm(dim=axis, keepdim=True) + 1e-8)
        S = phi * (G - c * R @ P)
        n = S.norm()
        if method.gamma is not None:
            q = 1.0 if s is None else max(n / (s + 1e-8), method.gamma) / method.gamma
            S, s = S / q, n / q
            limits.append(float(s))
        if method.eps_mode == "torch":
            W = W - lr * method.weight_decay * W
        W = W - lr * c2**0.5 / c1 * (method.scale * N @ P + S)
        if method.eps_mode == "hf":
            W = W - lr * method.weight_decay * W
        path.append(W)
    return path, limits


@pytest.mark.parametrize("eps_mode", ["hf", "torch"])
@pytest.mark.parametrize("phi", ["line", "matrix"])
@pytest.mark.parametrize("center", ["scaled", "exact"])
@pytest.mark.parametrize("gamma", [1.01, None])
def test_follows_the_papers_algorithm(eps_mode, phi, center, gamma):
    """The fused form, which never forms the residual, against the explicit residual."""
    method = Fira(
        rank=3, every=7, stagger=False, weight_decay=0.1, scale=0.3,
        eps_mode=eps_mode, phi=phi, center=center, gamma=gamma,
    )  # fmt: skip
    grads = spectrum((9, 6), 23)
    path, limits = train(method.rule(), start((9, 6)), grads)
    wanted, wanted_limits = by_the_paper(start((9, 6)), grads, method, 0.05)
    torch.testing.assert_close(path[-1], wanted[-1], rtol=0, atol=1e-10)  # fp64, 23 steps
    if gamma:
        assert limits == pytest.approx(wanted_limits, rel=1e-10)


def test_the_fused_form_holds_in_float32():
    method = Fira(rank=3, every=7, stagger=False)
    grads = spectrum((9, 6), 23)
    exact, _ = train(method.rule(), start((9, 6)), grads)
    single, _ = train(method.rule(), start((9, 6)).float(), [G.float() for G in grads])
    # fp32: 1e-7 relative per step on weights up to 3, over 23 steps and norms of differences
    torch.testing.assert_close(single[-1].double(), exact[-1], rtol=0, atol=1e-5)


def test_without_the_residual_it_is_galore():
    grads = spectrum((9, 6), 20)
    fira = Fira(rank=6, every=7, center="exact")  # full rank: the residual is rounding
    path, _ = train(fira.rule(), start((9, 6)), grads)
    wanted, _ = train(GaLore(rank=6, every=7).rule(), start((9, 6)), grads)
    torch.testing.assert_close(path[-1], wanted[-1], rtol=0, atol=1e-12)


def test_at_alpha_one_both_centers_agree():
    grads = spectrum((9, 6), 20)
    paths = [
        train(Fira(rank=3, every=7, scale=1.0, center=c).rule(), start((9, 6)), grads)[0]
        for c in ("scaled", "exact")
    ]
    torch.testing.assert_close(paths[0][-1], paths[1][-1], rtol=0, atol=1e-12)


def test_the_residual_grows_by_one_percent_at_most():
    grads = spectrum((9, 6), 40)
    grads[20] = 30 * grads[20]
    _, limits = train(Fira(rank=3, every=7).rule(), start((9, 6)), grads)
    _, free = train(Fira(rank=3, every=7, gamma=1e9).rule(), start((9, 6)), grads)
    assert all(b <= 1.01 * a + 1e-6 for a, b in itertools.pairwise(limits))
    assert free[20] > 1.2 * free[19]  # what the limiter held back


def test_the_update_has_full_rank():
    G = spectrum((9, 6), 1)
    fira, _ = train(Fira(rank=2).rule(), start((9, 6)), G)
    galore, _ = train(GaLore(rank=2).rule(), start((9, 6)), G)
    for path, rank in ((fira, 6), (galore, 2)):
        s = torch.linalg.svdvals(path[-1] - start((9, 6)))
        assert (s > 1e-9 * s[0]).sum() == rank


@pytest.mark.parametrize("phi", ["line", "matrix"])
def test_a_transposed_run_is_the_run_transposed(phi):
    grads = spectrum((9, 6), 20)
    rule = Fira(rank=3, every=6, weight_decay=0.1, phi=phi).rule()
    path, limits = train(rule, start((9, 6)), grads)
    turned, others = train(rule, start((9, 6)).T, [G.T for G in grads])
    torch.testing.assert_close(path[-1], turned[-1].T, rtol=0, atol=1e-10)
    assert limits == pytest.approx(others, rel=1e-10)


def test_with_sgd_inside_it_is_sgd():
    """N = R, so phi is 1 up to 1e-8 / |R_j| and the two parts are G again."""
    grads = spectrum((9, 6), 20)
    rule = Rule(SGD(), SVD(3), Refresh(7), residual=Rescaled("exact"))
    path, _ = train(rule, start((9, 6)), grads)
    W = start((9, 6)) - 0.05 * sum(grads)
    torch.testing.assert_close(path[-1], W, rtol=0, atol=1e-6)


def test_a_zero_gradient_leaves_the_limiter():
    grads = spectrum((9, 6), 12)
    grads[6] = torch.zeros(9, 6, dtype=F64)
    _, limits = train(Fira(rank=3, every=50).rule(), start((9, 6)), grads)
    assert limits[6] == limits[5] and limits[7] > 0.5 * limits[5]


def test_phi_max_holds_lines_without_a_gradient():
    grads = spectrum((9, 6), 3)
    grads[2][4] = 1e-9 * grads[2][4]  # momentum stays, the gradient vanishes
    grads[2][4, 0] += 1e-3
    method = Fira(rank=2, every=50, gamma=None)
    free, _ = train(method.rule(), start((9, 6)), grads)
    held, _ = train(Fira(rank=2, every=50, gamma=None, phi_max=1.0).rule(), start((9, 6)), grads)
    assert (free[2] - free[1])[4].norm() > 3 * (held[2] - held[1])[4].norm()


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_state_is_galores_and_one_number(shape):
    p = nn.Parameter(start(shape))
    optimizer = LowRankOptimizer([p], rule=Fira(rank=3).rule())
    p.grad = spectrum(shape, 1)[0]
    optimizer.step()
    state = {k: v for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}
    assert state["limiter"].shape == ()
    measured = sum(v.numel() for v in state.values())
    assert Fira(rank=3).cost(*shape).state == measured == GaLore(rank=3).cost(*shape).state + 1


@pytest.mark.parametrize("stop", [7, 10])
def test_a_resumed_run_is_the_uninterrupted_one(stop):
    check_resume(Fira(rank=3, every=7).rule(), stop)


def test_hooks_make_the_same_steps():
    check_hooks(Fira(rank=3, every=5).rule(), 12)


def test_hooks_refuse_what_needs_all_gradients():
    model = nn.Linear(6, 9, dtype=F64)
    rule = Fira(rank=3).rule()
    with pytest.raises(UsageError, match="cannot be clipped layer by layer"):
        LowRankOptimizer(model.named_parameters(), rule=rule, clip=1.0, layerwise=True)
    with pytest.raises(UsageError, match="cannot wait for the step layer by layer"):
        LowRankOptimizer(model.named_parameters(), rule=rule, layerwise=True)
    optimizer = LowRankOptimizer(model.named_parameters(), rule=rule)
    optimizer.attach_layerwise("first")
    model(torch.ones(1, 6, dtype=F64)).sum().backward()
    with pytest.raises(UsageError, match="cannot accumulate micro-batches layer by layer"):
        model(torch.ones(1, 6, dtype=F64)).sum().backward()


@pytest.mark.parametrize("search", ["auto", "gram", "randomised", "iteration", "dct"])
def test_any_search_will_do(search):
    """At full rank all searches span the same space, and SGD does not depend on the basis."""
    grads = spectrum((9, 6), 8)
    rules = (Fira(rank=6, every=3, search=way).rule() for way in ("svd", search))
    paths = [train(replace(rule, inner=SGD()), start((9, 6)), grads)[0] for rule in rules]
    torch.testing.assert_close(paths[0][-1], paths[1][-1], rtol=0, atol=1e-10)


def test_both_sides_are_refused():
    with pytest.raises(UsageError, match="a residual needs one side that is not projected"):
        Rule(SGD(), SVD(3, "both"), residual=Rescaled())


def test_experts_are_limited_one_by_one():
    check_experts(Fira(rank=2, every=3).rule(), [spectrum((8, 5), 8, seed=i) for i in range(3)])
