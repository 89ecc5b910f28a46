"""What LoRA-Pro alone promises: its theorems, and its algorithm reimplemented here."""

import pytest
import torch
from torch import nn

from eckart import Recipe, attach
from eckart.methods.update.lora_pro import LoRAPro, adjusted
from eckart.methods.weights.lora import LoRA
from eckart.optim import LowRankOptimizer
from tests import tiny
from tests.methods.pairs import (
    F64,
    M,
    N,
    R,
    S,
    check_cost,
    check_experts,
    check_learns,
    check_resume,
    factors,
    feed,
    gradients,
    optimizer_of,
    train,
)


def problem(seed=0, r=R, m=M, n=N):
    g = torch.Generator().manual_seed(seed)
    B, A, G = (torch.randn(s, generator=g, dtype=F64) for s in ((m, r), (r, n), (m, n)))
    s = torch.tensor(S, dtype=F64)
    return B, A, G, s, s * G @ A.T, s * B.T @ G  # with gB, gA


def moved(B, A, hB, hA, s):
    """E, the change of W."""
    return s * (B @ hA + hB @ A)


def projector(X):
    """The projector on the column space of X."""
    Q = torch.linalg.qr(X)[0]
    return Q @ Q.T


@pytest.mark.parametrize("choice", ["sylvester", "zero", "symmetric"])
def test_the_matrix_moves_by_the_tangent_projection_whatever_x_is(choice):
    B, A, G, s, gB, gA = problem()
    E = moved(B, A, *adjusted(B, A, gB, gA, s, choice), s)
    eye_m, eye_n = torch.eye(M, dtype=F64), torch.eye(N, dtype=F64)
    wanted = G - (eye_m - projector(B)) @ G @ (eye_n - projector(A.T))
    torch.testing.assert_close(E, wanted, rtol=0, atol=1e-6)  # damped by 1e-8
    torch.testing.assert_close((G * E).sum(), (E * E).sum(), rtol=1e-6, atol=0)  # descent


def test_no_other_move_of_the_factors_is_nearer_to_the_gradient():
    B, A, G, s, gB, gA = problem()
    E = moved(B, A, *adjusted(B, A, gB, gA, s), s)
    # least squares over all (hB, hA): columns are the moves of W by each of their entries
    basis = [moved(B, A, e.view(M, R), torch.zeros_like(A), s) for e in torch.eye(M * R, dtype=F64)]
    basis += [
        moved(B, A, torch.zeros_like(B), e.view(R, N), s) for e in torch.eye(R * N, dtype=F64)
    ]
    J = torch.stack([b.flatten() for b in basis], 1)
    best = J @ torch.linalg.lstsq(J, G.flatten(), driver="gelsd").solution
    torch.testing.assert_close(E.flatten(), best, rtol=0, atol=1e-6)


def test_x_solves_its_equation_and_stays_nearest_to_the_factors_gradients():
    B, A, G, s, gB, gA = problem()
    zero, best = adjusted(B, A, gB, gA, s, "zero"), adjusted(B, A, gB, gA, s)
    X = (best[1] - zero[1]) @ torch.linalg.pinv(A)
    C = -torch.linalg.inv(B.T @ B) @ gA @ A.T / s**2
    residual = B.T @ B @ X + X @ A @ A.T - C
    assert residual.norm() < 1e-7 * C.norm()  # damping 1e-8 over eigenvalues near 1

    def distance(X):
        return ((zero[1] + X @ A - gA) ** 2).sum() + ((zero[0] - B @ X - gB) ** 2).sum()

    g = torch.Generator().manual_seed(3)
    for _ in range(20):
        other = X + 0.1 * torch.randn(R, R, generator=g, dtype=F64)
        assert distance(other) > distance(X)


def test_the_move_does_not_depend_on_how_the_product_is_split():
    B, A, G, s, gB, gA = problem()
    E = moved(B, A, *adjusted(B, A, gB, gA, s), s)
    T = torch.eye(R, dtype=F64) + 0.3 * torch.randn(R, R, dtype=F64)
    B2, A2 = B @ T, torch.linalg.inv(T) @ A
    E2 = moved(B2, A2, *adjusted(B2, A2, s * G @ A2.T, s * B2.T @ G, s), s)
    torch.testing.assert_close(E2, E, rtol=0, atol=1e-5)


def test_at_full_rank_it_is_full_fine_tuning_to_first_order():
    B, A, G, s, gB, gA = problem(r=6, m=6, n=6)
    hB, hA = adjusted(B, A, gB, gA, s)
    torch.testing.assert_close(moved(B, A, hB, hA, s), G, rtol=0, atol=1e-5)
    gaps = []
    for lr in (1e-3, 1e-4):
        dW = s * (B - lr * hB) @ (A - lr * hA) - s * B @ A
        gaps.append((dW + lr * G).norm())
    assert gaps[0] / gaps[1] == pytest.approx(100, rel=0.05)  # O(lr^2)


def test_from_b_zero_only_b_moves():
    B, A, G, s, _, _ = problem()
    B = torch.zeros_like(B)
    hB, hA = adjusted(B, A, s * G @ A.T, s * B.T @ G, s)
    assert hA.abs().max() == 0 and hB.isfinite().all()
    wanted = s * G @ A.T @ torch.linalg.inv(A @ A.T) / s**2
    torch.testing.assert_close(hB, wanted, rtol=0, atol=1e-6)


def test_relative_damping_bounds_the_move_where_b_is_tiny():
    B, A, G, s, _, _ = problem()
    B = 1e-9 * B
    noise = 1e-12 * torch.ones_like(A)  # rounding in gA
    for relative, most in ((False, 1e-3), (True, 1e8)):
        hA = adjusted(B, A, s * G @ A.T, noise, s, relative=relative, damping=1e-8)[1]
        assert hA.isfinite().all() and hA.norm() < most


def by_the_paper(B, A, s, grads, lr, adam, wd, delta=1e-8):
    """Alg. 1 with dense inverses and a Kronecker solve for X."""

    def solve(B, A, gB, gA, with_x):
        eye = torch.eye(len(A), dtype=F64)
        PB, PA = torch.linalg.inv(B.T @ B + delta * eye), torch.linalg.inv(A @ A.T + delta * eye)
        hA = PB @ gA / s**2
        hB = (gB - B @ PB @ B.T @ gB) @ PA / s**2
        if with_x:
            K = torch.kron(B.T @ B, eye) + torch.kron(eye, A @ A.T)
            X = torch.linalg.lstsq(K, (-hA @ A.T).flatten(), driver="gelsd").solution
            X = X.reshape(eye.shape)
            hA, hB = hA + X @ A, hB - B @ X
        return hB, hA

    mean = square = 0.0
    for t, G in enumerate(grads, 1):
        gB, gA = s * G @ A.T, s * B.T @ G
        if adam:
            E = moved(B, A, *solve(B, A, gB, gA, False), s)
            mean, square = 0.9 * mean + 0.1 * E, 0.999 * square + 0.001 * E**2
            D = (mean / (1 - 0.9**t)) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)
            gB, gA = s * D @ A.T, s * B.T @ D
        hB, hA = solve(B, A, gB, gA, True)
        B, A = (1 - lr * wd) * B - lr * hB, (1 - lr * wd) * A - lr * hA
    return B, A


@pytest.mark.parametrize("inner", ["adam", "sgd"])
@pytest.mark.parametrize("zero", [True, False])
def test_follows_the_papers_algorithm(inner, zero, monkeypatch):
    monkeypatch.setattr("eckart.methods.update.lora_pro.CACHED", 4 * N)  # more than one piece
    B, A, _, s, _, _ = problem()
    B = torch.zeros_like(B) if zero else B
    p, q, _ = train(LoRAPro(inner=inner, weight_decay=0.1), B, A, gradients(4))
    wanted = by_the_paper(B, A, s, gradients(4), 0.01, inner == "adam", 0.1)
    # eigendecompositions against dense inverses of matrices near 1e-4 I where B left zero
    torch.testing.assert_close(p, wanted[0], rtol=0, atol=1e-8)
    torch.testing.assert_close(q, wanted[1], rtol=0, atol=1e-8)


def test_factored_moments_are_adam_on_adjusted_gradients():
    B, A, _, s, _, _ = problem()
    p, q, _ = train(LoRAPro(moment_space="factored"), B, A, gradients(5))
    r1, r2 = factors(B, A)
    reference = torch.optim.AdamW([r1, r2], 0.01, weight_decay=0)
    for G in gradients(5):
        feed(r1, r2, G)
        r1.grad, r2.grad = adjusted(r1.detach(), r2.detach(), r1.grad, r2.grad, s)
        reference.step()
    torch.testing.assert_close(p, r1.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(q, r2.detach(), rtol=0, atol=1e-12)


def test_pairs_of_many_shapes_move_as_if_alone():
    shapes = [(9, 3, 7), (9, 3, 7), (5, 2, 8)]
    made = [problem(seed=i, r=r, m=m, n=n) for i, (m, r, n) in enumerate(shapes)]
    together = [factors(B, A) for B, A, *_ in made]
    params = [
        (f"{i}.{k}", p) for i, pair in enumerate(together) for k, p in zip("BA", pair, strict=True)
    ]
    scales = [0.5, 2.0, 1.0]
    pairs = [(f"{i}.B", f"{i}.A", s) for i, s in enumerate(scales)]
    optimizer = LowRankOptimizer([{"params": params, "pairs": pairs}], 0.01, rule=LoRAPro().rule())
    for G in range(3):
        for i, (p, q) in enumerate(together):
            feed(p, q, gradients(3, (len(p), q.shape[1]))[G], scales[i])
        optimizer.step()
    for i, (B, A, *_) in enumerate(made):
        p, q = factors(B, A)
        alone = optimizer_of(p, q, LoRAPro(), scale=scales[i])
        for G in gradients(3, (len(B), A.shape[1])):
            feed(p, q, G, scales[i])
            alone.step()
        torch.testing.assert_close(together[i][0], p, rtol=0, atol=1e-12)
        torch.testing.assert_close(together[i][1], q, rtol=0, atol=1e-12)


def test_experts_move_one_by_one():
    check_experts(LoRAPro())


def test_factors_of_two_groups_have_their_own_rates():
    B, A, _, s, _, _ = problem()
    found = []
    for lr_B in (0.01, 0.04):
        p, q = factors(B, A)
        groups = [
            {"params": [("B", p)], "pairs": [("B", "A", float(s))], "lr": lr_B},
            {"params": [("A", q)]},
        ]
        optimizer = LowRankOptimizer(groups, 0.01, rule=LoRAPro().rule())
        feed(p, q, gradients(1)[0])
        optimizer.step()
        found.append((p.detach() - B, q.detach() - A))
    torch.testing.assert_close(found[1][0], 4 * found[0][0], rtol=0, atol=1e-12)
    assert torch.equal(found[1][1], found[0][1])


def test_a_factor_without_a_partner_follows_adamw():
    B, A, _, s, _, _ = problem()
    p, q = factors(B, A)
    q.requires_grad_(False)
    optimizer = optimizer_of(p, q, LoRAPro())
    r = nn.Parameter(B.clone())
    reference = torch.optim.AdamW([r], 0.01, weight_decay=0)
    for G in gradients(3):
        p.grad = r.grad = s * G @ A.T
        optimizer.step()
        reference.step()
    assert torch.equal(p, r) and torch.equal(q, A)


@pytest.mark.parametrize("moment_space", ["full", "factored"])
def test_resumes_bit_for_bit(moment_space):
    check_resume(LoRAPro(moment_space=moment_space))


def test_cost_is_what_is_stored():
    check_cost(LoRAPro(), (M, N))
    for method in (LoRAPro(moment_space="factored"), LoRAPro(inner="sgd")):
        check_cost(method, (M, R), (R, N))


def test_it_moves_nearer_to_the_gradient_than_lora_does():
    """cos(E, G): by definition no less than that of the plain gradients. And it learns."""
    check_learns(LoRAPro(inner="sgd"), lr=0.05, by=0)
    for seed in range(5):
        B, A, G, s, gB, gA = problem(seed)
        plain, full = moved(B, A, gB, gA, s), moved(B, A, *adjusted(B, A, gB, gA, s), s)
        cosine = [(E * G).sum() / E.norm() for E in (plain, full)]
        assert cosine[1] > cosine[0]


@pytest.mark.parametrize("scaling, scale", [("lora", 2.0), ("rslora", 4.0)])
def test_every_pair_is_given_its_own_scale(scaling, scale):
    """alpha 8 and rank 4; under rslora alpha / sqrt(r). The code has 2 whatever the run has."""
    weights = LoRA(rank=4, alpha=8.0, scaling=scaling, overrides=({"match": "attn.q", "rank": 1},))
    model = tiny.llama()
    optimizer = attach(model, Recipe(weights, LoRAPro())).optimizer(lr=0.01)
    found = {B: s for group in optimizer.param_groups for B, _, s in group["pairs"]}
    assert {s for name, s in found.items() if "q_proj" not in name} == {scale}
    assert {s for name, s in found.items() if "q_proj" in name} == {8.0}


def test_moments_of_bf16_factors_are_fp32():
    """They equal those of fp32 factors: only the factors are rounded."""
    B, A, _, s, _, _ = problem()
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        p, q = factors(B.bfloat16().to(dtype), A.bfloat16().to(dtype))
        optimizer = optimizer_of(p, q, LoRAPro())
        G = gradients(1)[0]
        p.grad, q.grad = (t.bfloat16().to(dtype) for t in (s * G @ A.T, s * B.T @ G))
        optimizer.step()
        held = [v for state in optimizer.state.values() for v in state.values()]
        found.append([t for t in held if isinstance(t, torch.Tensor)])
    assert {t.dtype for t in found[0]} == {torch.float32} and len(found[0]) == 2
    assert all(map(torch.equal, *found))
