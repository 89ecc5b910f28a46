"""What LoRA-RITE alone promises: W moves the same way however the product is split."""

import pytest
import torch

from eckart.methods.update.adamw import AdamW
from eckart.methods.update.lora_rite import LoRARITE, escaped, inverse_root
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
    gradients,
    problem,
    train,
)


class Half:
    """One factor X [n, r] beside another Y [m, r], by Alg. 1 with a QR of Y, in dense algebra."""

    def __init__(self, method, X):
        self.method, self.t = method, 0
        self.M, self.V, self.rho, self.U = (
            torch.zeros_like(X),
            torch.zeros(R, R, dtype=F64),
            0.0,
            None,
        )

    def step(self, Y, g):
        (b1, b2), self.t = self.method.betas, self.t + 1
        b1, b2 = (b * (1 - b ** (self.t - 1)) / (1 - b**self.t) for b in (b1, b2))
        U, T = torch.linalg.qr(Y)
        g = g @ torch.linalg.inv(T)
        P = U.T @ (torch.zeros_like(U) if self.U is None else self.U)
        carried = P @ self.V @ P.T
        if self.method.escape:
            falls = (torch.linalg.eigvalsh(self.V) - torch.linalg.eigvalsh(carried)).max()
            lost = min(falls, torch.trace(self.V - carried)).clamp(min=0)
            self.rho = b2 * (self.rho + lost)
        self.V = b2 * carried + (1 - b2) * g.T @ g / len(g)
        values, vectors = torch.linalg.eigh(self.V)
        scale = 1 / ((values.clamp(min=0) + self.rho).sqrt() + self.method.eps)
        u = g @ vectors @ torch.diag(scale) @ vectors.T
        self.M, self.U = b1 * self.M @ P.T + (1 - b1) * u, U
        return self.M @ torch.linalg.inv(T).T


@pytest.mark.parametrize("escape", [True, False])
def test_follows_the_papers_algorithm(escape):
    """In another basis, that of a QR: the moments differ, W does not."""
    method, lr = LoRARITE(escape=escape, weight_decay=0.1), 0.02
    B, A = problem()
    found = train(method, B, A, gradients(8), lr)
    ofA, ofB = Half(method, A.T), Half(method, B)
    for G in gradients(8):
        dA, dB = ofA.step(B, S * G.T @ B).T, ofB.step(A.T, S * G @ A.T)
        B, A = (1 - 0.1 * lr) * B - lr * dB, (1 - 0.1 * lr) * A - lr * dA
    # square roots of Gram matrices against QR, and eps of 1e-6 under roots
    torch.testing.assert_close(found[0], B, rtol=0, atol=1e-8)
    torch.testing.assert_close(found[1], A, rtol=0, atol=1e-8)


@pytest.mark.parametrize("method, invariant", [(LoRARITE(), True), (AdamW(), False)])
def test_the_matrix_moves_the_same_way_however_it_is_split(method, invariant):
    """Both moments included."""
    B, A = problem()
    T = torch.eye(R, dtype=F64) + 0.3 * problem(5)[0][:R]
    one = train(method, B, A, gradients(10))
    other = train(method, B @ T, torch.linalg.inv(T) @ A, gradients(10))
    gap = (one[0] @ one[1] - other[0] @ other[1]).abs().max()
    assert (gap < 1e-6) == invariant


def test_a_root_is_zero_along_what_a_factor_does_not_reach():
    B, _ = problem()
    B[:, 2] = B[:, 0] - B[:, 1]
    root = inverse_root(B.mT @ B)
    U = B @ root
    values = torch.linalg.eigvalsh(U.T @ U)
    torch.testing.assert_close(values, torch.tensor([0.0, 1.0, 1.0], dtype=F64), rtol=0, atol=1e-9)
    assert torch.equal(inverse_root(torch.zeros(R, R, dtype=F64)), torch.zeros(R, R, dtype=F64))


def test_what_escapes_is_what_a_turn_takes_away():
    V = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=F64))
    away = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=F64))  # loses the third direction
    # eigenvalues 1, 2, 5 become 0, 1, 2: the largest fall is 3, of the trace 5
    assert float(escaped(V, away @ V @ away)) == pytest.approx(3.0)
    assert float(escaped(V, V)) == 0.0
    Q = torch.linalg.qr(problem()[0][:R])[0]
    assert float(escaped(V, Q @ V @ Q.T)) == pytest.approx(0.0, abs=1e-12)


def test_from_b_zero_only_b_moves_at_first():
    B, A = problem()
    p, q, _ = train(LoRARITE(), torch.zeros_like(B), A, gradients(1))
    assert torch.equal(q, A) and p.abs().max() > 0
    p, q, _ = train(LoRARITE(), torch.zeros_like(B), A, gradients(4))
    assert p.isfinite().all() and q.isfinite().all() and not torch.equal(q, A)


def test_resumes_bit_for_bit_and_costs_what_it_says():
    check_resume(LoRARITE())
    check_cost(LoRARITE(), (M, R), (R, N))


def test_experts_move_one_by_one():
    check_experts(LoRARITE())


def test_trains_an_adapter_from_zero():
    check_learns(LoRARITE(), lr=1e-2, by=0.1)
