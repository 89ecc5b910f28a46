"""What Riemannian preconditioning alone promises: a factor's size does not set its speed."""

import pytest
import torch

from eckart.methods.update.altlora import AltLoRA
from eckart.methods.update.riemannian import Riemannian, preconditioned
from eckart.optim import LowRankOptimizer, Stacks
from tests import tiny
from tests.methods.pairs import (
    F64,
    M,
    N,
    R,
    S,
    check_cost,
    check_experts,
    check_resume,
    problem,
    train,
)

SHAPES = ((M, R), (R, N), (M, N), (R, R))  # of B, A, G and a change T of how B A is split


def moved(B, A, G, lr, method):
    """The change of B A in one step."""
    p, q, _ = train(method, B, A, [G / S], lr)
    return p @ q - B @ A, p, q


def test_to_first_order_the_matrix_moves_by_both_projections():
    B, A, G, _ = problem(shapes=SHAPES)
    F, gB = (Stacks([t[None]], tall=True) for t in (B, G @ A.T))
    E, gA = (Stacks([t[None]], tall=False) for t in (A, B.T @ G))
    (hB,), (hA,) = (h.tensors[0] for h in preconditioned(F, E, gB, gA, 0.0))
    Q_B, Q_A = torch.linalg.qr(B)[0], torch.linalg.qr(A.T)[0]
    wanted = Q_B @ Q_B.T @ G + G @ Q_A @ Q_A.T
    torch.testing.assert_close(B @ hA + hB @ A, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("inner, invariant", [("sgd", True), ("adam", False)])
def test_the_split_does_not_matter_with_sgd(inner, invariant):
    B, A, G, T = problem(shapes=SHAPES)
    T = torch.eye(R, dtype=F64) + 0.3 * T
    method = Riemannian(damping=0.0, inner=inner)
    one = moved(B, A, G, 1e-2, method)[0]
    other = moved(B @ T, torch.linalg.inv(T) @ A, G, 1e-2, method)[0]
    assert ((one - other).abs().max() < 1e-10) == invariant


def test_altlora_without_momentum_is_this_but_for_the_new_a():
    """The same A; B differs by lr times what lr did to A, so to second order."""
    B, A, G, _ = problem(shapes=SHAPES)
    alt = AltLoRA(betas=(0.0, 0.999), damping=1e-3, scale_grad=False)
    gaps = []
    for lr in (1e-3, 1e-4):
        _, p, q = moved(B, A, G, lr, Riemannian(damping=1e-3, inner="sgd"))
        _, p2, q2 = moved(B, A, G, lr, alt)
        torch.testing.assert_close(q, q2, rtol=0, atol=1e-12)
        gaps.append((p - p2).norm())
    assert gaps[0] / gaps[1] == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize("inner", ["adam", "sgd"])
def test_steps_are_those_of_peft(inner):
    """PEFT's wrapper on the same adapters, gradients and inner rule; biases are none."""
    peft = pytest.importorskip("peft")
    riemannian = pytest.importorskip("peft.optimizers.riemannian")
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        model = peft.get_peft_model(tiny.llama(), config).double()
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.manual_seed(len(name))
                p.data.normal_(0, 0.1)
        models.append(model)
    ours, theirs = models
    named = [(n, p) for n, p in ours.named_parameters() if p.requires_grad]
    pairs = [(n, n.replace("lora_B", "lora_A"), 2.0) for n, _ in named if "lora_B" in n]
    rule = Riemannian(inner=inner, weight_decay=0.1 if inner == "adam" else 0.0).rule()
    optimizer = LowRankOptimizer([{"params": named, "pairs": pairs}], lr=1e-2, rule=rule)
    cls, extra = torch.optim.SGD, {}
    if inner == "adam":
        cls, extra = torch.optim.AdamW, {"weight_decay": 0.1}
    other = riemannian.create_riemannian_optimizer(theirs, cls, lr=1e-2, **extra)
    ids = torch.randint(tiny.VOCAB, (2, 8), generator=torch.Generator().manual_seed(0))
    for _ in range(4):
        for model, o in ((ours, optimizer), (theirs, other)):
            o.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            o.step()
    values = dict(theirs.named_parameters())
    for name, p in named:  # a Cholesky solve against a pseudo-inverse, condition near 1e2
        torch.testing.assert_close(p, values[name], rtol=0, atol=1e-9)


def test_from_b_zero_a_stays():
    B, A, G, _ = problem(shapes=SHAPES)
    _, p, q = moved(torch.zeros_like(B), A, G, 1e-2, Riemannian(damping=0.0))
    assert torch.equal(q, A) and p.isfinite().all() and p.abs().max() > 0


@pytest.mark.parametrize("inner", ["adam", "sgd"])
def test_it_costs_what_it_says_resumes_and_moves_experts_one_by_one(inner):
    method = Riemannian(inner=inner)
    check_cost(method, (M, R), (R, N))
    check_resume(method)
    check_experts(method)
