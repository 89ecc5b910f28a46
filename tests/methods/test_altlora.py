"""What AltLoRA alone promises: its projections, and its algorithms reimplemented here."""

import pytest
import torch
from torch import nn

from eckart import Recipe, attach
from eckart.errors import UsageError
from eckart.jobs.methods import rates
from eckart.jobs.settings.config import resolve
from eckart.methods.update.altlora import AltLoRA, carrier, projection
from eckart.methods.weights.lora import LoRA
from eckart.optim import LowRankOptimizer, Stacks
from eckart.recipe import registry
from eckart.recipe.groups import default_lr
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
    gradients,
    optimizer_of,
    problem,
    train,
)


def by_the_paper(B, A, grads, method, lr):
    """Alg. 1 and 2 with dense inverses, one factor after the other."""
    b1, b2, d = *method.betas, method.damping
    eye, c = torch.eye(R, dtype=F64), S**2 if method.scale_grad else 1.0
    MA, MB, VA, VB = (torch.zeros_like(t) for t in (A, B, A, B))
    B_old, A_old, tA, tB = torch.zeros_like(B), torch.zeros_like(A), 0, 0
    keep = 1 - lr * method.weight_decay
    for step, G in enumerate(grads):
        gB, gA = S * G @ A.T, S * B.T @ G
        turn = step // method.turn % 2 if method.schedule == "alternate" else None
        if turn != 1:
            P = torch.linalg.inv(B.T @ B + d * eye)
            h, tA = P @ gA / c, tA + 1
            used = b1 * P @ B.T @ B_old @ MA + (1 - b1) * h
            MA = b1 * MA + (1 - b1) * h if method.store_unaligned else used
            VA = b2 * VA + (1 - b2) * h**2
            move = used / (1 - b1**tA)
            A = keep * (A - lr * (move / (VA.sqrt() + method.eps) if method.plus else move))
            B_old = B
        if turn != 0:
            P = torch.linalg.inv(A @ A.T + d * eye)
            h, tB = gB @ P / c, tB + 1
            used = b1 * MB @ A_old @ A.T @ P + (1 - b1) * h
            MB = b1 * MB + (1 - b1) * h if method.store_unaligned else used
            VB = b2 * VB + (1 - b2) * h**2
            move = used / (1 - b1**tB)
            B = keep * (B - lr * (move / (VB.sqrt() + method.eps) if method.plus else move))
            A_old = A
    return B, A


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("schedule, turn", [("joint", 1), ("alternate", 1), ("alternate", 3)])
@pytest.mark.parametrize("parity", [False, True])
@pytest.mark.parametrize("zero", [False, True])
def test_follows_the_papers_algorithms(plus, schedule, turn, parity, zero):
    method = AltLoRA(
        plus=plus, schedule=schedule, turn=turn, scale_grad=not parity,
        store_unaligned=parity and plus, weight_decay=0.1,
    )  # fmt: skip
    B, A = problem()
    B = torch.zeros_like(B) if zero else B
    found = train(method, B, A, gradients(8))
    wanted = by_the_paper(B, A, gradients(8), method, 0.01)
    # an eigendecomposition against dense inverses that reach 1e5 where B has left zero
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-8, atol=1e-8)


def test_each_move_is_the_gradient_projected_on_the_fixed_factor():
    B, A = problem()
    G, s = gradients(1)[0], torch.tensor(S, dtype=F64)
    hA = projection(Stacks([B[None]], tall=True), s, 0.0, False)[1][0] @ (S * B.T @ G)
    hB = (S * G @ A.T) @ projection(Stacks([A[None]], tall=False), s, 0.0, False)[1][0]
    Q_B, Q_A = torch.linalg.qr(B)[0], torch.linalg.qr(A.T)[0]
    torch.testing.assert_close(S * B @ hA, Q_B @ Q_B.T @ G, rtol=0, atol=1e-10)
    torch.testing.assert_close(S * hB @ A, G @ Q_A @ Q_A.T, rtol=0, atol=1e-10)


def test_momentum_is_carried_to_where_it_means_nearly_the_same():
    (B_old, A), (B, _) = problem(0), problem(1)
    F, F_old = (Stacks([t[None]], tall=True) for t in (B, B_old))
    P = projection(F, torch.ones(()), 0.0, False)[0]
    wanted = torch.linalg.lstsq(B, B_old @ A).solution
    torch.testing.assert_close(carrier(P, F, F_old)[0] @ A, wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(carrier(P, F, F)[0] @ A, A)


@pytest.mark.parametrize("plus, invariant", [(False, True), (True, False)])
def test_the_matrix_moves_the_same_way_however_it_is_split(plus, invariant):
    """Momentum included, without damping; not with an element-wise second moment."""
    B, A = problem()
    T = torch.eye(R, dtype=F64) + 0.3 * problem(5, ((R, R),))[0]
    method = AltLoRA(plus=plus, damping=0.0)
    one = train(method, B, A, gradients(10))
    other = train(method, B @ T, torch.linalg.inv(T) @ A, gradients(10))
    gap = (one[0] @ one[1] - other[0] @ other[1]).abs().max()
    assert (gap < 1e-6) == invariant


def test_a_badly_balanced_start_changes_nothing():
    B, A = problem()
    method = AltLoRA(damping=0.0)
    one, other = train(method, B, A, gradients(10)), train(method, B / 10, 10 * A, gradients(10))
    torch.testing.assert_close(one[0] @ one[1], other[0] @ other[1], rtol=0, atol=1e-6)


def test_without_momentum_it_is_scaled_gradient_descent():
    """Riemannian LoRA, with the new A in B's step."""
    B, A = problem()
    G, lr = gradients(1)[0], 0.01
    found = train(AltLoRA(betas=(0.0, 0.999)), B, A, [G], lr)
    eye = 1e-5 * torch.eye(R, dtype=F64)
    A_new = A - lr * torch.linalg.inv(B.T @ B + eye) @ B.T @ G / S
    B_new = B - lr * G @ A.T @ torch.linalg.inv(A_new @ A_new.T + eye) / S
    torch.testing.assert_close(found[1], A_new, rtol=0, atol=1e-12)
    torch.testing.assert_close(found[0], B_new, rtol=0, atol=1e-12)


def test_with_a_square_b_the_a_step_is_full_gradient_descent():
    B, A = problem(0, ((R, R), (R, N)))
    G = gradients(1, (R, N))[0]
    method = AltLoRA(schedule="alternate", damping=0.0)
    B1, A1, _ = train(method, B, A, [G])
    torch.testing.assert_close(S * (B1 @ A1 - B @ A), -0.01 * G, rtol=0, atol=1e-12)


def test_the_resting_factor_rests():
    B, A = problem()
    p, q = factors(B, A)
    optimizer = optimizer_of(p, q, AltLoRA(schedule="alternate", turn=2))
    turns = []
    for G in gradients(6):
        turns.append("A" if q.requires_grad else "B")
        assert p.requires_grad != q.requires_grad
        before = p.detach().clone(), q.detach().clone()
        if p.requires_grad:
            p.grad = S * G @ q.detach().T
        else:
            q.grad = S * p.detach().T @ G
        optimizer.step()
        assert torch.equal(p, before[0]) == (turns[-1] == "A")
        assert torch.equal(q, before[1]) == (turns[-1] == "B")
    assert turns == list("AABBAA")
    assert optimizer.state[q]["step"] == 4 and optimizer.state[p]["step"] == 2


def test_at_b_zero_a_stays_and_the_step_counts():
    B, A = problem()
    p, q = factors(torch.zeros_like(B), A)
    optimizer = optimizer_of(p, q, AltLoRA())
    p.grad, q.grad = S * gradients(1)[0] @ A.T, 1e-3 * torch.ones_like(A)  # not even 0
    optimizer.step()
    assert torch.equal(q, A) and optimizer.state[q]["step"] == 1
    assert p.abs().max() > 0


def test_schedulers_change_the_step():
    B, A = problem()
    moved = []
    for factor in (1.0, 0.1):
        p, q = factors(B, A)
        optimizer = optimizer_of(p, q, AltLoRA(plus=True), lr=1e-3)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step, f=factor: f)
        q.grad, p.grad = S * B.T @ gradients(1)[0], S * gradients(1)[0] @ A.T
        optimizer.step()
        moved.append(q.detach() - A)
    torch.testing.assert_close(moved[1], 0.1 * moved[0], rtol=1e-9, atol=0)


def quadratic(p, q, T, bias=None):
    """A loss whose gradient changes with W: 1/2 |s B A - T|^2, and of a bias beside them."""
    loss = 0.5 * (S * p @ q - T).square().sum()
    return loss if bias is None else loss + 0.5 * (bias - 1).square().sum()


@pytest.mark.parametrize("plus", [False, True])
def test_two_backward_passes_move_b_by_the_gradient_at_the_new_a(plus):
    """One step equals two of `alternate` on the same batch; other parameters are updated once."""
    (B, A), T = problem(), gradients(1)[0]
    method = AltLoRA(plus=plus, schedule="two_backward")
    p, q = factors(B, A)
    bias = nn.Parameter(torch.zeros(3, dtype=F64))
    groups = [
        {"params": [("B", p), ("A", q)], "pairs": [("B", "A", S)]},
        {"params": [("bias", bias)], "rule": method.plain()},
    ]
    optimizer = LowRankOptimizer(groups, lr=0.01, rule=method.rule())
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = quadratic(p, q, T, bias)
        loss.backward()
        losses.append(loss.item())
        return loss

    returned = [optimizer.step(closure).item() for _ in range(4)]
    assert returned == losses[::2] and len(losses) == 8
    assert losses[1] < losses[0]  # A alone has moved
    assert losses[-1] < losses[0]

    b, a = factors(B, A)
    alternate = optimizer_of(b, a, AltLoRA(plus=plus, schedule="alternate"))
    for _ in range(8):
        alternate.zero_grad()
        quadratic(b, a, T).backward()
        alternate.step()
    torch.testing.assert_close(p.detach(), b.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(q.detach(), a.detach(), rtol=0, atol=1e-12)
    assert optimizer.state[q]["step"] == optimizer.state[p]["step"] == 4

    c = nn.Parameter(torch.zeros(3, dtype=F64))
    adam = torch.optim.AdamW([c], lr=0.01, weight_decay=0)
    for _ in range(4):
        adam.zero_grad()
        (0.5 * (c - 1).square().sum()).backward()
        adam.step()
    torch.testing.assert_close(bias.detach(), c.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("plus, rate", [(False, 0.1), (True, 3e-4)])
def test_the_default_rate_follows_plus(plus, rate):
    recipe = Recipe(LoRA(), AltLoRA(plus=plus))
    assert default_lr(recipe) == rate
    handle = attach(tiny.llama(), recipe)
    assert {group["lr"] for group in handle.optimizer().param_groups} == {rate}
    assert f"{rate:g} (plus={str(plus).lower()})" in rates(registry.find("altlora"))


def test_two_backward_passes_need_a_closure():
    p, q = factors(*problem())
    optimizer = optimizer_of(p, q, AltLoRA(schedule="two_backward"))
    p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)
    with pytest.raises(UsageError, match="got no closure"):
        optimizer.step()
    with pytest.raises(UsageError, match=r"Type update\.schedule=alternate"):
        resolve("finetune", "m", "d", ["update=altlora", "update.schedule=two_backward"])


@pytest.mark.parametrize("spoilt, turns, counts", [(1, "A AB AB", (2, 2)), (2, "AB AB AB", (3, 2))])
def test_a_step_of_two_passes_begins_with_a_whichever_was_left_out(spoilt, turns, counts):
    """A non-finite gradient in the first pass skips the step; in the second, only B's update."""
    (p, q), T, passes = factors(*problem()), gradients(1)[0], []
    optimizer = optimizer_of(p, q, AltLoRA(schedule="two_backward"))
    optimizer.skip_nonfinite = True

    def closure():
        optimizer.zero_grad()
        passes[-1] += "A" if q.requires_grad else "B"
        bad = len("".join(passes)) == spoilt
        (quadratic(p, q, T) * (torch.nan if bad else 1.0)).backward()

    for _ in range(3):
        passes.append("")
        optimizer.step(closure)
    assert passes == turns.split()
    assert (optimizer.state[q]["step"], optimizer.state[p]["step"]) == counts


@pytest.mark.parametrize("plus", [False, True])
def test_cost_is_what_is_stored(plus):
    check_cost(AltLoRA(plus=plus), (M, R), (R, N))


@pytest.mark.parametrize("schedule", ["joint", "alternate"])
def test_resumes_bit_for_bit(schedule):
    check_resume(AltLoRA(plus=True, schedule=schedule, turn=2))


def test_experts_move_one_by_one():
    check_experts(AltLoRA(plus=True))


@pytest.mark.parametrize("plus, schedule, lr", [(False, "joint", 0.5), (True, "alternate", 1e-2)])
def test_trains_an_adapter_from_zero(plus, schedule, lr):
    update = AltLoRA(plus=plus, schedule=schedule, damping_mode="rel", damping=1e-3)
    check_learns(update, lr, by=0.02)
