"""What Riemannian preconditioning alone promises: a factor's size does not set its speed."""

import pytest
import torch
from torch import nn

from eckart.methods.update.altlora import AltLoRA
from eckart.methods.update.riemannian import Riemannian, preconditioned
from eckart.optim import LowRankOptimizer, Stacks
from tests import tiny

F64 = torch.float64
M, N, R = 9, 7, 3


def problem(seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((M, R), (R, N), (M, N), (R, R))
    return tuple(torch.randn(s, generator=g, dtype=F64) for s in shapes)


def moved(B, A, G, lr, method):
    """How B A changes in one step."""
    p, q = nn.Parameter(B.clone()), nn.Parameter(A.clone())
    groups = [{"params": [("B", p), ("A", q)], "pairs": [("B", "A", 1.0)]}]
    optimizer = LowRankOptimizer(groups, lr=lr, rule=method.rule())
    p.grad, q.grad = G @ A.T, B.T @ G
    optimizer.step()
    return p.detach() @ q.detach() - B @ A, p.detach(), q.detach()


def test_to_first_order_the_matrix_moves_by_both_projections():
    B, A, G, _ = problem()
    F, gB = (Stacks([t[None]], tall=True) for t in (B, G @ A.T))
    E, gA = (Stacks([t[None]], tall=False) for t in (A, B.T @ G))
    (hB,), (hA,) = (h.tensors[0] for h in preconditioned(F, E, gB, gA, 0.0))
    Q_B, Q_A = torch.linalg.qr(B)[0], torch.linalg.qr(A.T)[0]
    wanted = Q_B @ Q_B.T @ G + G @ Q_A @ Q_A.T
    torch.testing.assert_close(B @ hA + hB @ A, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("inner, invariant", [("sgd", True), ("adam", False)])
def test_the_split_does_not_matter_with_sgd(inner, invariant):
    B, A, G, T = problem()
    T = torch.eye(R, dtype=F64) + 0.3 * T
    method = Riemannian(damping=0.0, inner=inner)
    one = moved(B, A, G, 1e-2, method)[0]
    other = moved(B @ T, torch.linalg.inv(T) @ A, G, 1e-2, method)[0]
    assert ((one - other).abs().max() < 1e-10) == invariant


def test_altlora_without_momentum_is_this_but_for_the_new_a():
    """The same A; B differs by lr times what lr did to A, so to second order."""
    B, A, G, _ = problem()
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
    B, A, G, _ = problem()
    _, p, q = moved(torch.zeros_like(B), A, G, 1e-2, Riemannian(damping=0.0))
    assert torch.equal(q, A) and p.isfinite().all() and p.abs().max() > 0


def test_cost_is_what_is_stored():
    B, A, G, _ = problem()
    for inner in ("adam", "sgd"):
        method = Riemannian(inner=inner)
        p, q = nn.Parameter(B.clone()), nn.Parameter(A.clone())
        groups = [{"params": [("B", p), ("A", q)], "pairs": [("B", "A", 1.0)]}]
        optimizer = LowRankOptimizer(groups, lr=1e-2, rule=method.rule())
        p.grad, q.grad = G @ A.T, B.T @ G
        optimizer.step()
        held = [v for state in optimizer.state.values() for v in state.values()]
        measured = sum(v.numel() for v in held if isinstance(v, torch.Tensor))
        assert measured == method.cost(M, R).state + method.cost(R, N).state
