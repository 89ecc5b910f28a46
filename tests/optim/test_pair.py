"""Helpers of the rules for factor pairs: inverses of Gram matrices, stacked pairs."""

import pytest
import torch
from torch import nn

from eckart.methods.update.altlora import AltLoRA
from eckart.methods.update.lora_pro import LoRAPro, adjusted
from eckart.methods.update.lora_rite import LoRARITE
from eckart.methods.update.riemannian import Riemannian
from eckart.optim import LowRankOptimizer, inverse, pair, spectrum

F64 = torch.float64
UPDATES = [
    AltLoRA(),
    AltLoRA(plus=True, weight_decay=0.1),
    LoRAPro(weight_decay=0.1),
    LoRAPro(moment_space="factored"),
]


def gram(*singular_values, n=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=F64))[0]
    s = torch.tensor(singular_values, dtype=F64)
    return Q * torch.cat([s, torch.zeros(n - len(s), dtype=F64)]) @ Q.T


@pytest.mark.parametrize("relative", [False, True])
def test_an_inverse_is_that_of_the_damped_matrix(relative):
    C = torch.stack([gram(1.0, 2.0, 3.0, 4.0, 5.0), 100 * gram(1.0, 1e-3, 1e-4, 1.0, 2.0, seed=1)])
    shift = 1e-3 * (C.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] if relative else 1)
    wanted = torch.linalg.inv(C + shift * torch.eye(5, dtype=F64))
    # condition numbers of up to 1e6
    torch.testing.assert_close(inverse(C, 1e-3, relative), wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(spectrum(C).inverse(1e-3, relative), wanted, rtol=1e-9, atol=1e-9)


def test_what_is_zero_stays_zero_without_damping():
    C = torch.stack([torch.zeros(5, 5, dtype=F64), gram(1.0, 2.0, 3.0, 4.0, 5.0)])
    found = inverse(C, 0.0)
    assert torch.equal(found[0], C[0])
    torch.testing.assert_close(found[1], torch.linalg.inv(C[1]), rtol=0, atol=1e-12)


def test_nan_goes_on_as_nan():
    C = torch.full((5, 5), torch.nan, dtype=F64)
    assert inverse(C, 1e-5).isnan().all()


def problems(sizes, dtype=F64, bad=1.0):
    """B, A and gradients s B^T G, s G A^T, with one direction of B `bad` times shorter."""
    g = torch.Generator().manual_seed(0)
    for m, r, n in sizes:
        B, A = torch.randn(m, r, generator=g), torch.randn(r, n, generator=g) / n**0.5
        B[:, -1] /= bad
        G = torch.randn(m, n, generator=g).to(dtype)
        yield B.to(dtype), A.to(dtype), 2 * G @ A.mT.to(dtype), 2 * B.mT.to(dtype) @ G


def stepped(update, made, steps=3, lr=1e-2):
    params, pairs = [], []
    for i, (B, A, gB, gA) in enumerate(made):
        p, q = nn.Parameter(B.clone()), nn.Parameter(A.clone())
        p.grad, q.grad = gB.clone(), gA.clone()
        params += [(f"{i}.B", p), (f"{i}.A", q)]
        pairs.append((f"{i}.B", f"{i}.A", 2.0))
    optimizer = LowRankOptimizer([{"params": params, "pairs": pairs}], lr=lr, rule=update.rule())
    for _ in range(steps):
        optimizer.step()
    return [p.detach() for _, p in params], optimizer


@pytest.mark.parametrize("update", UPDATES, ids=str)
def test_stacked_pairs_move_as_single_ones(update, monkeypatch):
    made = list(problems([(9, 3, 7)] * 4 + [(5, 3, 7)]))
    together, optimizer = stepped(update, made)
    monkeypatch.setattr(pair, "CACHED", 1)
    alone, other = stepped(update, made)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    kept, others = optimizer.named_state_dict(), other.named_state_dict()
    for name, value in kept.items():
        torch.testing.assert_close(value, others[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "update",
    [LoRAPro(), LoRAPro(inner="sgd"), LoRAPro(moment_space="factored"), Riemannian(), LoRARITE()],
    ids=str,
)
def test_of_a_transposed_matrix_the_factors_change_places(update):
    """W^T = A^T B^T, with the gradients of one G. Not for AltLoRA, which updates A first."""
    made = list(problems([(9, 3, 7)]))
    (B, A), _ = stepped(update, made, steps=1)
    turned = [(A.T, B.T, gA.T, gB.T) for B, A, gB, gA in made]
    (C, D), _ = stepped(update, turned, steps=1)
    torch.testing.assert_close(C.T, A, rtol=0, atol=1e-8)  # damped by 1e-8
    torch.testing.assert_close(D.T, B, rtol=0, atol=1e-8)


@pytest.mark.parametrize("update", UPDATES, ids=str)
def test_gradients_stay_as_they_are(update, monkeypatch):
    monkeypatch.setattr(pair, "CACHED", 1)  # where values, gradients and state are views
    made = list(problems([(9, 3, 7)]))
    p, q = (nn.Parameter(t.clone()) for t in made[0][:2])
    p.grad, q.grad = made[0][2].clone(), made[0][3].clone()
    groups = [{"params": [("B", p), ("A", q)], "pairs": [("B", "A", 2.0)]}]
    LowRankOptimizer(groups, lr=1e-2, rule=update.rule()).step()
    assert torch.equal(p.grad, made[0][2]) and torch.equal(q.grad, made[0][3])


@pytest.mark.parametrize("bad, gap", [(1.0, 1e-5), (100.0, 1e-3)])
def test_fp32_moves_the_matrix_as_fp64_does(bad, gap):
    """E of LoRA-Pro: Gram matrices in fp32 lose kappa^2 times its rounding, 6e-8."""
    moves = []
    for dtype in (torch.float32, F64):
        (B, A, gB, gA), = problems([(64, 8, 48)], dtype, bad)  # fmt: skip
        s = torch.tensor(2.0, dtype=F64)
        hB, hA = adjusted(B, A, gB, gA, s)
        moves.append((B @ hA + hB @ A).double())
    assert (moves[0] - moves[1]).norm() < gap * moves[1].norm()


def test_bf16_factors_move_by_what_fp32_says_rounded_once():
    made = list(problems([(9, 3, 7)], torch.bfloat16))
    (p, q), _ = stepped(AltLoRA(), made, steps=1)
    assert p.dtype == torch.bfloat16
    wide, _ = stepped(AltLoRA(), [tuple(t.float() for t in made[0])], steps=1)
    assert torch.equal(q, wide[1].bfloat16())
