"""What LDAdam alone promises, against its algorithm reimplemented here."""

import pytest
import torch

from eckart.errors import UsageError
from eckart.methods.update.ldadam import LDAdam
from eckart.optim import SGD, Adam, EightBit, ErrorFeedback, Iteration, Refresh, Rule
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


def by_the_paper(W, grads, method, lr):
    """Right side; every product in full. Bases may differ from ours by a sign each, which the
    rotation carries through."""
    (b1, b2), rho, r = method.betas, method.rho, method.rank
    W, M, V = W.clone(), torch.zeros(len(W), r, dtype=F64), torch.zeros(len(W), r, dtype=F64)
    E, P = torch.zeros_like(W), None
    for t, G in enumerate(grads):
        A = G + E
        if P is None:
            P = torch.linalg.svd(A, full_matrices=False)[2][:r]
            lost = 0.0
        else:
            B = rho * M @ P / (1 - b1**t) + (1 - rho) * A
            new = torch.linalg.qr(B.T @ (B @ P.T))[0].T
            X = P @ new.T
            c1, c2 = 1 - b1**t, 1 - b2**t
            V = c2 * ((V / c2 - (M / c1) ** 2) @ X**2 + (M @ X / c1) ** 2).abs()
            lost = b1 / (1 - b1) * (M @ P - M @ X @ new)
            M, P = M @ X, new
        R = A @ P.T
        E = A - R @ P + lost
        M, V = b1 * M + (1 - b1) * R, b2 * V + (1 - b2) * R**2
        c1, c2 = 1 - b1 ** (t + 1), 1 - b2 ** (t + 1)
        W = (1 - lr * method.weight_decay) * W
        W = W - lr * (M / c1) / ((V / c2).sqrt() + method.eps) @ P
    return W, E


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_follows_the_papers_algorithm(shape):
    method = LDAdam(rank=3, weight_decay=0.1)
    grads = spectrum(shape, 12)
    path, states = train(method.rule(), start(shape), grads)
    tall = shape[0] > shape[1]
    turned = [G if tall else G.T for G in grads]
    W, E = by_the_paper(start(shape) if tall else start(shape).T, turned, method, 0.05)
    torch.testing.assert_close(path[-1], W if tall else W.T, rtol=0, atol=1e-9)  # fp64, 12 steps
    torch.testing.assert_close(states[-1]["error"], E if tall else E.T, rtol=0, atol=1e-9)


def test_nothing_is_lost():
    """Applied updates plus the momentum and E that remain add up to all gradients."""
    method, b1 = LDAdam(rank=2), 0.908
    grads = spectrum((9, 6), 10)
    _, states = train(method.rule(), start((9, 6)), grads)
    applied = [s["exp_avg"] @ s["right"] for s in states]
    to_come = states[-1]["error"] + b1 / (1 - b1) * applied[-1]
    torch.testing.assert_close(sum(applied) + to_come, sum(grads), rtol=0, atol=1e-10)


def test_at_full_rank_there_is_no_error():
    _, states = train(LDAdam(rank=6).rule(), start((9, 6)), spectrum((9, 6), 8))
    torch.testing.assert_close(
        states[-1]["error"], torch.zeros(9, 6, dtype=F64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_the_state_is_of_the_size_it_says(bits):
    found = check_state(LDAdam(rank=3, error_bits=bits), 9, 6)
    assert found["right"] == (3, 6) and found["exp_avg"] == (9, 3)
    assert found["error"] == ((9, 3) if bits == 4 else (9, 6))


@pytest.mark.parametrize("bits", [32, 8])
def test_a_resumed_run_is_the_uninterrupted_one(bits):
    check_resume(LDAdam(rank=3, error_bits=bits).rule(), stop=7)


def test_zero_gradients_do_no_harm():
    check_zero(LDAdam(rank=3, weight_decay=0.1).rule())


def test_a_transposed_run_is_the_run_transposed():
    rule, grads = LDAdam(rank=3, weight_decay=0.1).rule(), spectrum((9, 6), 12)
    path, _ = train(rule, start((9, 6)), grads)
    turned, _ = train(rule, start((9, 6)).T, [G.T for G in grads])
    torch.testing.assert_close(path[-1], turned[-1].T, rtol=0, atol=1e-10)


def test_errors_in_eight_bits_come_close():
    grads = spectrum((9, 6), 12)
    exact, _ = train(LDAdam(rank=3).rule(), start((9, 6)), grads)
    few, _ = train(LDAdam(rank=3, error_bits=8).rule(), start((9, 6)), grads)
    # rounding of E is 1/510 of a row's range, and E is a few times G
    assert (few[-1] - exact[-1]).norm() < 0.05 * (exact[-1] - start((9, 6))).norm()


def test_it_learns_a_small_map():
    assert regression(LDAdam(rank=2).rule(), 0.1) < 1e-2


@pytest.mark.parametrize("inner", [SGD(0.9), EightBit(Adam((0.9, 0.99))), Adam((0.8, 0.99))])
def test_losses_of_another_moment_are_not_known(inner):
    with pytest.raises(UsageError, match="feeds back what Adam's first moment loses"):
        Rule(inner, Iteration(3), Refresh(1, "rotate"), source=ErrorFeedback(beta=0.9))
