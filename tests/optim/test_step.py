"""Parts of a step outside the rule: clipping, penalties, invalid gradients."""

import pytest
import torch
from tests.optim.trainings import gradients, parameters, run
from torch import nn

from eckart.errors import UsageError
from eckart.optim import SGD, SVD, Adam, LowRankOptimizer, Refresh, Rule

SHAPES = [(9, 6), (6, 9), (5,)]
GALORE = Rule(Adam(), SVD(3), Refresh(7), scale=0.25)


def test_the_norm_is_that_of_the_gradients_as_applied():
    grads = gradients(SHAPES, 1)[0]
    named = parameters(SHAPES)
    optimizer = LowRankOptimizer(named, rule=GALORE, clip=float("inf"))
    run(optimizer, named, [grads])
    energy = (
        sum((torch.linalg.svdvals(G)[:3] ** 2).sum() for G in grads[:2]) + (grads[2] ** 2).sum()
    )
    torch.testing.assert_close(optimizer.grad_norm, energy.sqrt(), rtol=1e-12, atol=0)


def test_a_group_counts_as_often_as_its_weight_says():
    grads = gradients(SHAPES, 1)[0]
    named = parameters(SHAPES)
    groups = [{"params": named[:1], "clip_weight": 4.0}, {"params": named[1:2], "clip_weight": 0.0}]
    optimizer = LowRankOptimizer([*groups, {"params": named[2:]}], clip=float("inf"))
    run(optimizer, named, [grads])
    wanted = (4 * (grads[0] ** 2).sum() + (grads[2] ** 2).sum()).sqrt()
    torch.testing.assert_close(optimizer.grad_norm, wanted, rtol=1e-12, atol=0)


def test_clipping_scales_the_projected_gradient():
    grads = gradients(SHAPES, 1)[0]
    for rule in (Rule(SGD(), SVD(3)), Rule(SGD())):
        moved = []
        for clip in (None, 0.5):
            named = parameters(SHAPES)
            optimizer = LowRankOptimizer(named, lr=1.0, rule=rule, clip=clip)
            before = [p.detach().clone() for _, p in named]
            after = run(optimizer, named, [grads])
            moved.append(torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)]))
        # clipped, an SGD step at lr 1 is as long as the bound; 1e-6 stands in the quotient
        torch.testing.assert_close(moved[1].norm().item(), 0.5, rtol=1e-5, atol=0)
        torch.testing.assert_close(moved[1], moved[0] * 0.5 / moved[0].norm(), rtol=1e-5, atol=1e-9)


def test_without_clip_nothing_is_measured():
    named = parameters(SHAPES)
    optimizer = LowRankOptimizer(named)
    run(optimizer, named, gradients(SHAPES, 1))
    assert optimizer.grad_norm is None


@pytest.mark.parametrize("rule", [Rule(SGD()), Rule(SGD(), SVD(3))])
def test_a_penalty_is_added_after_clipping(rule):
    grads, lr = gradients(SHAPES, 1), 1.0
    plain, penalised = parameters(SHAPES), parameters(SHAPES)
    without = run(LowRankOptimizer(plain, lr=lr, rule=rule, clip=1e-3), plain, grads)
    optimizer = LowRankOptimizer(penalised, lr=lr, rule=rule, clip=1e-3)
    start = [p.detach().clone() for _, p in penalised]

    def decay():  # the gradient of 0.05 |W|^2, by autograd
        W = penalised[0][1]
        return {W: torch.autograd.grad(0.05 * (W**2).sum(), W)[0]}

    optimizer.add_penalty(decay)
    found = run(optimizer, penalised, grads)
    extra = 0.1 * start[0]
    if not rule.projector.identity:
        P = optimizer.state[penalised[0][1]]["right"]
        extra = extra @ P.T @ P  # a penalty moves the subspace like any gradient
    torch.testing.assert_close(found[0], without[0] - lr * extra, rtol=0, atol=1e-12)
    assert torch.equal(found[1], without[1])


def test_a_penalty_alone_moves_a_parameter():
    named = parameters([(4, 4)])
    optimizer = LowRankOptimizer(named, lr=0.1, rule=Rule(SGD()))
    optimizer.add_penalty(lambda: {named[0][1]: torch.ones(4, 4, dtype=torch.float64)})
    before = named[0][1].detach().clone()
    optimizer.step()
    torch.testing.assert_close(named[0][1].detach(), before - 0.1)


def test_nonfinite_steps_are_skipped_on_request():
    grads = gradients(SHAPES, 6)
    grads[3][1][0, 0] = float("nan")
    skipping, named = parameters(SHAPES), parameters(SHAPES)
    optimizer = LowRankOptimizer(skipping, rule=GALORE, skip_nonfinite=True, clip=1.0)
    found = run(optimizer, skipping, grads)
    reference = LowRankOptimizer(named, rule=GALORE, clip=1.0)
    wanted = run(reference, named, grads[:3] + grads[4:])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    a, b = optimizer.named_state_dict(), reference.named_state_dict()
    assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


def test_without_it_a_nonfinite_gradient_spreads_as_in_torch():
    grads = gradients(SHAPES, 1)
    grads[0][0][0, 0] = float("nan")
    named = parameters(SHAPES)
    run(LowRankOptimizer(named), named, grads)
    assert named[0][1].isnan().any() and named[1][1].isfinite().all()


def test_sparse_gradients_are_refused_by_name():
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(UsageError, match=r"weight +sparse gradient"):
        LowRankOptimizer(embedding.named_parameters()).step()


def test_two_parameters_of_one_name_are_refused():
    with pytest.raises(UsageError, match="two parameters have the same name"):
        LowRankOptimizer([("w", nn.Parameter(torch.ones(1))), ("w", nn.Parameter(torch.ones(1)))])


def test_pieces_of_a_bucket_change_nothing(monkeypatch):
    """Working in chunks bounds temporaries and does not change the result."""
    results = []
    for chunk in (2**24, 60):
        monkeypatch.setattr("eckart.optim.bucket.CACHED", chunk)
        monkeypatch.setattr("eckart.optim.refresh.CHUNK", chunk)
        for rule in (GALORE, Rule(Adam())):
            named = parameters([(9, 6)] * 4)
            results.append(
                run(LowRankOptimizer(named, rule=rule), named, gradients([(9, 6)] * 4, 9))
            )
    for whole, pieces in zip(results[:2], results[2:], strict=True):
        # a batched SVD may round otherwise than a single one
        torch.testing.assert_close(whole, pieces, rtol=0, atol=1e-12)
