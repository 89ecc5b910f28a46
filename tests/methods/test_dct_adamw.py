"""What DCT-AdamW alone promises, against its algorithm reimplemented here."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from eckart.errors import UsageError
from eckart.methods.update.dct_adamw import DCTAdamW
from eckart.optim import SGD, Adam, ErrorFeedback, LowRankOptimizer, Refresh, Rule, Selected
from tests.methods import updates
from tests.methods.updates import F64, check_experts, check_hooks, check_resume, start


def gradients(shape, steps, seed=0, dtype=F64):
    """A slowly changing gradient, so that some directions stay and others come and go."""
    g = torch.Generator().manual_seed(seed)
    trend = torch.randn(shape, generator=g, dtype=F64)
    return [(trend + torch.randn(shape, generator=g, dtype=F64)).to(dtype) for _ in range(steps)]


def train(rule, W, grads):
    path, states = updates.train(rule, W, grads)
    return path[-1], states


def dct(n):
    """C [n, n] entry by entry."""
    i, j = torch.meshgrid(torch.arange(n, dtype=F64), torch.arange(n, dtype=F64), indexing="ij")
    C = (2 / n) ** 0.5 * torch.cos(torch.pi * i * (2 * j + 1) / (2 * n))
    C[0] /= 2**0.5
    return C


def by_the_paper(W, grads, method, lr=0.05):
    """On the right side; the moments live in dicts, a direction's index their key."""
    (b1, b2), n = method.betas, W.shape[1]
    Q = dct(n).T if method.basis == "dct2" else dct(n)
    W, E, M, V, age = W.clone(), torch.zeros_like(W), {}, {}, {}
    for t, G in enumerate(grads, 1):
        W = W * (1 - lr * method.weight_decay)
        A = G + E if method.error_feedback else G
        if (t - 1) % method.every == 0:
            S = A @ Q
            score = S.abs().sum(0) if method.ell_norm == 1 else (S**2).sum(0)
            index = sorted(score.argsort(descending=True)[: method.rank].tolist())
            M = {j: M.get(j, torch.zeros(len(W), dtype=F64)) for j in index}
            V = {j: V.get(j, torch.zeros(len(W), dtype=F64)) for j in index}
            age = {j: age.get(j, 0) for j in index}
        E = A.clone()
        for j in index:
            R = A @ Q[:, j]
            E -= torch.outer(R, Q[:, j])
            age[j] += 1
            k = age[j] if method.age_correct else t
            M[j] = b1 * M[j] + (1 - b1) * R
            V[j] = b2 * V[j] + (1 - b2) * R**2
            U = M[j] / (1 - b1**k) / ((V[j] / (1 - b2**k)).sqrt() + method.eps)
            W = W - lr * torch.outer(U, Q[:, j])
    return W, E


@pytest.mark.parametrize("basis", ["dct2", "dct3"])
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("ell_norm", [1, 2])
@pytest.mark.parametrize(
    "error_feedback, age_correct", [(False, False), (True, False), (True, True)]
)
def test_follows_the_papers_algorithm(basis, every, ell_norm, error_feedback, age_correct):
    method = DCTAdamW(
        rank=4, basis=basis, every=every, ell_norm=ell_norm,
        error_feedback=error_feedback, age_correct=age_correct, weight_decay=0.1,
    )  # fmt: skip
    grads, rule = gradients((9, 7), 15), method.rule()
    if every > 1:  # the algorithm starts its periods at the first step, not by name
        rule = Rule(
            rule.inner, rule.projector, Refresh(every, "rotate", stagger=False), rule.source,
            weight_decay=0.1,
        )  # fmt: skip
    W, states = train(rule, start((9, 7)), grads)
    wanted, E = by_the_paper(start((9, 7)), grads, method)
    torch.testing.assert_close(W, wanted, rtol=0, atol=1e-12)  # fp64, 15 steps
    if error_feedback:
        torch.testing.assert_close(states[-1]["error"], E, rtol=0, atol=1e-12)
    chosen = [set(state["index"].tolist()) for state in states]
    assert any(a & b and a != b for a, b in pairwise(chosen))  # else alignment was not tried


def test_the_fft_route_takes_the_same_steps():
    grads = gradients((9, 7), 15)
    a, _ = train(DCTAdamW(rank=3).rule(), start((9, 7)), grads)
    b, _ = train(DCTAdamW(rank=3, route="fft").rule(), start((9, 7)), grads)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_each_length_has_a_basis_of_its_own():
    """Matrices of several short sides in one optimizer move as each does alone."""
    shapes, rule = [(9, 7), (6, 9), (8, 4)], DCTAdamW(rank=3).rule()
    params = [nn.Parameter(start(shape)) for shape in shapes]
    optimizer = LowRankOptimizer([(f"w{i}", p) for i, p in enumerate(params)], 0.05, rule=rule)
    for row in zip(*(gradients(shape, 5) for shape in shapes), strict=True):
        for p, G in zip(params, row, strict=True):
            p.grad = G
        optimizer.step()
    for p, shape in zip(params, shapes, strict=True):
        alone, _ = train(rule, start(shape), gradients(shape, 5))
        torch.testing.assert_close(p.detach(), alone, rtol=0, atol=1e-13)


@pytest.mark.parametrize("age_correct", [False, True])
def test_a_transposed_run_is_the_run_transposed(age_correct):
    grads = gradients((9, 7), 15)
    rule = DCTAdamW(rank=3, error_feedback=True, age_correct=age_correct, weight_decay=0.1).rule()
    W, _ = train(rule, start((9, 7)), grads)
    turned, _ = train(rule, start((9, 7)).T, [G.T for G in grads])
    torch.testing.assert_close(W, turned.T, rtol=0, atol=1e-10)


def test_at_full_rank_it_is_adam_in_rotated_coordinates_and_nothing_is_left():
    grads = gradients((9, 7), 15)
    W, states = train(DCTAdamW(rank=7, error_feedback=True).rule(), start((9, 7)), grads)
    C = dct(7)
    p = nn.Parameter(start((9, 7)) @ C.T)
    reference = torch.optim.AdamW([p], lr=0.05, weight_decay=0)
    for G in grads:
        p.grad = G @ C.T
        reference.step()
    torch.testing.assert_close(W @ C.T, p.detach(), rtol=0, atol=1e-10)
    assert states[-1]["error"].abs().max() < 1e-12


def test_with_sgd_inside_nothing_is_lost():
    """What was applied and what is kept add up to all gradients."""
    grads = gradients((9, 7), 15)
    rule = Rule(SGD(), Selected(2), Refresh(1), ErrorFeedback())
    W, states = train(rule, start((9, 7)), grads)
    applied = (start((9, 7)) - W) / 0.05
    torch.testing.assert_close(applied + states[-1]["error"], sum(grads), rtol=0, atol=1e-10)


@pytest.mark.parametrize("bits, most", [(8, 0.05), (4, 0.4)])
def test_error_feedback_in_few_bits_stays_near(bits, most):
    """Adam's steps are of one size, so the runs differ by the rounding and no more."""
    grads = gradients((64, 48), 20)
    runs = [
        train(DCTAdamW(rank=8, error_feedback=True, error_bits=b).rule(), start((64, 48)), grads)
        for b in (32, bits)
    ]
    exact, few = (W - start((64, 48)) for W, _ in runs)
    none, _ = train(DCTAdamW(rank=8).rule(), start((64, 48)), grads)
    gap = (few - exact).norm() / exact.norm()
    assert gap < most and gap < (none - start((64, 48)) - exact).norm() / exact.norm()


def test_a_zero_gradient_keeps_directions_and_moments():
    grads = gradients((9, 7), 5)
    grads[3] = torch.zeros(9, 7, dtype=F64)
    _, states = train(DCTAdamW(rank=3).rule(), start((9, 7)), grads)
    assert torch.equal(states[3]["index"], states[2]["index"])
    torch.testing.assert_close(states[3]["exp_avg"], 0.9 * states[2]["exp_avg"])


def test_a_new_direction_is_too_long_unless_its_age_counts():
    grads = gradients((9, 7), 150, seed=3)
    longest = []
    for age_correct in (False, True):
        p = nn.Parameter(start((9, 7)))
        rule = DCTAdamW(rank=3, age_correct=age_correct, betas=(0.5, 0.99)).rule()
        optimizer = LowRankOptimizer([p], lr=1.0, rule=rule)
        steps = []
        for G in grads:
            before, p.grad = p.detach().clone(), G
            optimizer.step()
            coordinates = (before - p.detach()) @ dct(7).T
            steps.append(coordinates.abs().max())
        longest.append(max(steps[100:]))
    # (1 - b1) / sqrt(1 - b2) = 5 times as long, less what the second moment's own bias takes
    assert longest[0] > 3 and longest[1] < 2


@pytest.mark.parametrize("shape", [(9, 7), (7, 9)])
@pytest.mark.parametrize("error_bits", [32, 8, 4])
def test_cost_is_what_is_stored(shape, error_bits):
    method = DCTAdamW(rank=3, error_feedback=True, error_bits=error_bits, age_correct=True)
    _, states = train(method.rule(), start(shape), gradients(shape, 2))
    tensors = {k: v for k, v in states[-1].items() if isinstance(v, torch.Tensor)}
    assert tensors["index"].dtype == torch.int32 and tensors["index"].shape == (3,)
    assert method.cost(*shape).state == sum(v.numel() for v in tensors.values())


@pytest.mark.parametrize("error_bits", [32, 4])
def test_a_resumed_run_is_the_uninterrupted_one(error_bits):
    fields = {"error_feedback": True, "error_bits": error_bits, "age_correct": True}
    check_resume(DCTAdamW(rank=3, **fields).rule(), stop=6)


def test_hooks_make_the_same_steps():
    check_hooks(DCTAdamW(rank=3, error_feedback=True).rule(), 8)


def test_experts_choose_one_by_one():
    rule = DCTAdamW(rank=2, error_feedback=True, age_correct=True).rule()
    check_experts(rule, [gradients((8, 5), 6, seed=i) for i in range(3)])


@pytest.mark.parametrize("shape", [(9, 7), (7, 9)])
@pytest.mark.parametrize("step_scale", ["one", "ratio", "tall", "rms"])
def test_trion_follows_its_algorithm(shape, step_scale):
    (m, n), lr, mu = shape, 0.05, 0.95
    method = DCTAdamW(rank=3, inner="trion", step_scale=step_scale, weight_decay=0.1)
    grads = gradients(shape, 10)
    W, states = train(method.rule(), start(shape), grads)
    wanted, B = start(shape), torch.zeros(shape, dtype=F64)
    by = {"one": 1, "ratio": m / n, "tall": max(1, m / n), "rms": 0.04 * max(m, n)}
    for G in grads:
        B = B + G
        S = B @ dct(7).T if m > n else (dct(7) @ B).T
        index = sorted(S.abs().sum(0).argsort(descending=True)[:3].tolist())
        R, Q = S[:, index], dct(7)[index]
        back = R @ Q if m > n else (R @ Q).T
        B = B - (1 - mu) * back
        X = R / (R.norm() + 1e-7)
        for _ in range(5):
            C = X @ X.T
            X = 3.4445 * X - 4.7750 * C @ X + 2.0315 * C @ C @ X
        step = X @ Q if m > n else (X @ Q).T
        wanted = (1 - lr * 0.1) * wanted - lr * by[step_scale] ** 0.5 * step
    torch.testing.assert_close(W, wanted, rtol=0, atol=1e-11)
    torch.testing.assert_close(states[-1]["buffer"], B, rtol=0, atol=1e-12)
    tensors = [v for v in states[-1].values() if isinstance(v, torch.Tensor)]
    assert method.cost(*shape).state == sum(t.numel() for t in tensors) == m * n + 3
    s = torch.linalg.svdvals(X)
    assert s.min() > 0.6 and s.max() < 1.3


def test_trion_refuses_a_second_error_feedback():
    with pytest.raises(UsageError, match="trion has its error feedback in its momentum"):
        DCTAdamW(inner="trion", error_feedback=True).rule()


def test_vectors_follow_adamw_beside_trion():
    p, q = (nn.Parameter(start((7,))) for _ in "ab")
    ours = LowRankOptimizer([("b", p)], lr=0.05, rule=DCTAdamW(inner="trion").rule())
    torchs = torch.optim.AdamW([q], lr=0.05, weight_decay=0.0)
    p.grad = q.grad = start((7,), seed=1)
    ours.step()
    torchs.step()
    assert torch.equal(p, q)


def test_plain_parameters_are_torchs_adamw_bit_for_bit():
    grads = gradients((9, 7), 12)
    W, _ = train(DCTAdamW(weight_decay=0.1).plain(), start((9, 7)), grads)
    p = nn.Parameter(start((9, 7)))
    reference = torch.optim.AdamW([p], lr=0.05, weight_decay=0.1)
    for G in grads:
        p.grad = G
        reference.step()
    assert torch.equal(W, p.detach())
    assert isinstance(DCTAdamW().plain().inner, Adam)
