"""The identity projector with Adam is torch.optim.AdamW, to the last bit."""

import pytest
import torch
from tests.optim.trainings import gradients, parameters, run

from eckart.optim import SGD, Adam, LowRankOptimizer, Rule

SHAPES = [(7, 5), (5, 9), (4,), (3, 2, 2, 2), (6, 6)]


def groups(named):
    return [
        {"params": named[:2], "lr": 3e-3, "weight_decay": 0.1},
        {"params": named[2:], "weight_decay": 0.0},
    ]


# torch's two forms differ from each other in bf16; its default is the plain one on the CPU
@pytest.mark.parametrize(
    "dtype, foreach",
    [
        (torch.float32, None),
        (torch.float64, None),
        (torch.bfloat16, None),
        (torch.float32, True),
        (torch.float64, True),
    ],
)
def test_adamw_is_torchs_bit_for_bit(dtype, foreach):
    grads = gradients(SHAPES, 50, dtype)
    for row in grads[10:20]:
        row[1] = None  # a parameter that sits out has its own step count
    ours, theirs = parameters(SHAPES, dtype), parameters(SHAPES, dtype)
    optimizer = LowRankOptimizer(groups(ours), lr=1e-2, rule=Rule(Adam((0.8, 0.99), 1e-6)))
    reference = torch.optim.AdamW(
        groups(theirs), lr=1e-2, betas=(0.8, 0.99), eps=1e-6, foreach=foreach
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR
    found = run(optimizer, ours, grads, schedule(optimizer, 50))
    wanted = run(reference, theirs, grads, schedule(reference, 50))
    for (name, p), a, b in zip(ours, found, wanted, strict=True):
        assert torch.equal(a, b), name
        state, other = optimizer.state[p], reference.state[dict(theirs)[name]]
        assert torch.equal(state["exp_avg_sq"], other["exp_avg_sq"])
        assert state["step"] == int(other["step"])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torchs_bit_for_bit(momentum):
    grads = gradients(SHAPES, 20, torch.float32)
    ours, theirs = parameters(SHAPES, torch.float32), parameters(SHAPES, torch.float32)
    optimizer = LowRankOptimizer(ours, lr=0.1, rule=Rule(SGD(momentum)))
    reference = torch.optim.SGD([p for _, p in theirs], lr=0.1, momentum=momentum)
    found, wanted = run(optimizer, ours, grads), run(reference, theirs, grads)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_clipping_is_torchs_bit_for_bit():
    grads = gradients(SHAPES, 20, torch.float32)
    ours, theirs = parameters(SHAPES, torch.float32), parameters(SHAPES, torch.float32)
    optimizer = LowRankOptimizer(ours, lr=1e-2, clip=0.5)
    reference = torch.optim.AdamW([p for _, p in theirs], lr=1e-2, weight_decay=0)
    for row in grads:
        for (_, p), (_, q), G in zip(ours, theirs, row, strict=True):
            p.grad, q.grad = G.clone(), G.clone()
        optimizer.step()
        norm = torch.nn.utils.clip_grad_norm_([q for _, q in theirs], 0.5)
        reference.step()
        assert norm > 0.5  # else nothing would be clipped
        assert torch.equal(optimizer.grad_norm, norm)
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(ours, theirs, strict=True))


def test_float32_moments_of_a_bfloat16_parameter_follow_the_float32_run():
    """The only difference may be one rounding of the weight per step: the moments agree."""
    grads = gradients(SHAPES, 30, torch.bfloat16)
    low, wide = parameters(SHAPES, torch.bfloat16), parameters(SHAPES, torch.float32)
    rule = Rule(Adam(state_dtype="float32"))
    a, b = (LowRankOptimizer(named, lr=1e-2, rule=rule) for named in (low, wide))
    run(a, low, grads)
    run(b, wide, [[G.float() for G in row] for row in grads])
    for (_, p), (_, q) in zip(low, wide, strict=True):
        assert a.state[p]["exp_avg"].dtype == torch.float32
        assert torch.equal(a.state[p]["exp_avg"], b.state[q]["exp_avg"])
        assert torch.equal(a.state[p]["exp_avg_sq"], b.state[q]["exp_avg_sq"])


def test_closures_and_step_hooks_run():
    named = parameters([(3, 3)])
    optimizer = LowRankOptimizer(named, lr=0.1)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append("hook"))

    def closure():
        optimizer.zero_grad()
        loss = (named[0][1] ** 2).sum()
        loss.backward()
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert second < first and seen == ["hook", "hook"]
