"""What Dion alone promises, against its algorithm reimplemented here."""

from zlib import crc32

import pytest
import torch

from eckart.methods.update.dion import Dion
from eckart.optim import LowRankOptimizer
from eckart.optim.project import gaussian
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
    """Q [n, r] as columns, as the paper has it; the first from the parameter's name."""
    (m, n), mu, r = W.shape, method.momentum, min(method.rank, *W.shape)
    Q = gaussian(r, n, crc32(b"0/w/0")).double().T
    B = torch.zeros_like(W)
    by = {"ratio": m / n, "tall": max(1, m / n), "rms": 0.04 * max(m, n), "one": 1}
    for G in grads:
        B = B + G
        P = torch.linalg.qr(B @ Q)[0]
        R = B.T @ P
        B = B - (1 - mu) * P @ R.T
        Q = R / R.norm(dim=0, keepdim=True)
        W = (1 - lr * method.weight_decay) * W - lr * by[method.step_scale] ** 0.5 * P @ Q.T
    return W, B, Q


@pytest.mark.parametrize("step_scale", ["ratio", "tall", "rms", "one"])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (6, 6)])
def test_follows_the_papers_algorithm(shape, step_scale):
    method = Dion(rank=3, step_scale=step_scale, weight_decay=0.1)
    grads = spectrum(shape, 12)
    path, states = train(method.rule(), start(shape), grads)
    W, B, Q = by_the_paper(start(shape), grads, method, 0.05)
    torch.testing.assert_close(path[-1], W, rtol=0, atol=1e-9)  # fp64, 12 steps
    torch.testing.assert_close(states[-1]["buffer"], B, rtol=0, atol=1e-10)
    # signs of the columns of P, and so of Q, are the decomposition's
    torch.testing.assert_close(states[-1]["warm"].abs(), Q.T.abs(), rtol=0, atol=1e-10)


def test_the_state_is_a_momentum_and_a_thin_factor():
    assert check_state(Dion(rank=3), 9, 6) == {"warm": (3, 6), "buffer": (9, 6)}
    assert check_state(Dion(rank=3), 6, 9) == {"warm": (3, 9), "buffer": (6, 9)}
    assert Dion(rank=99).cost(9, 6).state == 54 + 6 * 6


def test_a_resumed_run_is_the_uninterrupted_one():
    check_resume(Dion(rank=3).rule(), stop=7)


def test_zero_gradients_do_no_harm():
    check_zero(Dion(rank=3, weight_decay=0.1).rule())


def test_its_directions_become_the_leading_ones():
    """Of a gradient that stays, in the subspace that power iteration finds."""
    (G,) = spectrum((9, 6), 1)
    _, states = train(Dion(rank=2, momentum=0.0).rule(), start((9, 6)), [G] * 30)
    Q = torch.linalg.qr(states[-1]["warm"].T)[0]
    V = torch.linalg.svd(G)[2][:2].T
    # B keeps what is not used, so weaker directions take their turn; the first two lead still
    assert torch.linalg.svdvals(Q.T @ V).max() > 0.9


def test_what_is_not_used_stays_in_the_momentum():
    G = spectrum((9, 6), 1)[0]
    _, states = train(Dion(rank=2, momentum=0.9).rule(), start((9, 6)), [G])
    s = torch.linalg.svdvals(G - states[0]["buffer"])
    assert (s > 1e-12).sum() == 2  # a tenth of a part of rank 2 is gone, nothing else


def test_experts_move_one_by_one():
    rule, grads = Dion(rank=2).rule(), spectrum((3, 8, 5), 4)
    path, states = train(rule, start((3, 8, 5)), grads, leading=1)
    assert states[-1]["warm"].shape == (3, 2, 5)
    for i in range(3):
        alone, _ = train(rule, start((3, 8, 5))[i], [G[i] for G in grads])
        torch.testing.assert_close(path[-1][i], alone[-1], rtol=0, atol=1e-12)


def test_an_expert_without_tokens_rests_and_wakes():
    rule, grads = Dion(rank=2).rule(), spectrum((2, 8, 5), 4)
    for G in grads[:2]:
        G[0] = 0
    path, _ = train(rule, start((2, 8, 5)), grads, leading=1)
    assert torch.equal(path[1][0], start((2, 8, 5))[0])
    assert not torch.equal(path[3][0], path[1][0]) and path[3].isfinite().all()


def test_it_learns_a_small_map():
    assert regression(Dion(rank=4).rule(), 0.1) < 1e-3


def test_vectors_follow_adamw():
    p = torch.nn.Parameter(start((7,)))
    q = torch.nn.Parameter(start((7,)))
    ours = LowRankOptimizer([("b", p)], 0.05, rule=Dion().rule())
    torchs = torch.optim.AdamW([q], 0.05, (0.9, 0.95), weight_decay=0.0)
    p.grad = q.grad = torch.ones(7, dtype=F64)
    ours.step()
    torchs.step()
    assert torch.equal(p, q) and Dion(rest_lr=0.3).plain_lr() == 0.3
