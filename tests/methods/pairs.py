"""Shared by the tests of rules for factor pairs: training of one pair B, A, and checks."""

import torch
from torch import nn

from eckart import Recipe, attach
from eckart.methods.weights.lora import LoRA
from eckart.optim import LowRankOptimizer
from tests import tiny
from tests.laws.matrix import steps

F64 = torch.float64
M, N, R, S = 9, 7, 3, 1.7  # W = W0 + S B A is [M, N]


def problem(seed=0, shapes=((M, R), (R, N))):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=g, dtype=F64) for s in shapes)


def gradients(steps, shape=(M, N), seed=7):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=F64) for _ in range(steps)]


def factors(B, A):
    return nn.Parameter(B.clone()), nn.Parameter(A.clone())


def optimizer_of(B, A, method, lr=0.01, scale=S, **options):
    groups = [{"params": [("B", B), ("A", A)], "pairs": [("B", "A", scale)], **options}]
    return LowRankOptimizer(groups, lr=lr, rule=method.rule())


def feed(B, A, G, scale=S):
    """Set the gradients of the factors that train, for G = dL/dW."""
    B.grad = scale * G @ A.detach().mT if B.requires_grad else None
    A.grad = scale * B.detach().mT @ G if A.requires_grad else None


def train(method, B, A, grads, lr=0.01, stop=None, **options):
    """B and A after steps with given dL/dW; resumed with a new optimizer at `stop`."""
    p, q = factors(B, A)
    optimizer = optimizer_of(p, q, method, lr, **options)
    for step, G in enumerate(grads):
        if step == stop:
            saved = optimizer.named_state_dict()
            for factor in (p, q):
                factor.requires_grad_(True)
            optimizer = optimizer_of(p, q, method, lr, **options)
            optimizer.load_named_state_dict(saved)
        feed(p, q, G)
        optimizer.step()
    return p.detach(), q.detach(), optimizer


def check_cost(method, *shapes):
    """Check that the state has the size that the method's `cost` gives for these shapes."""
    *_, optimizer = train(method, *problem(), gradients(1))
    held = [v for state in optimizer.state.values() for v in state.values()]
    measured = sum(v.numel() for v in held if isinstance(v, torch.Tensor))
    assert measured == sum(method.cost(*shape).state for shape in shapes)


def check_resume(method, stop=5):
    """Check that a resumed run equals an uninterrupted one bit for bit."""
    whole, cut = (train(method, *problem(), gradients(9), stop=s)[:2] for s in (None, stop))
    assert all(map(torch.equal, whole, cut))


def check_experts(method):
    """Check that stacked pairs are updated as each of them alone."""
    B, A = problem()
    B, A = torch.stack([B, 2 * B]), torch.stack([A, A - 1])
    grads = [torch.stack([G, -G]) for G in gradients(3)]
    p, q, _ = train(method, B, A, grads, leading=1)
    for i in range(2):
        b, a, _ = train(method, B[i], A[i], [G[i] for G in grads])
        torch.testing.assert_close(p[i], b, rtol=0, atol=1e-12)
        torch.testing.assert_close(q[i], a, rtol=0, atol=1e-12)


def check_learns(method, lr, by):
    """Check how far the loss falls in twelve steps of a LoRA adapter that starts at zero."""
    handle = attach(tiny.llama(), Recipe(LoRA(rank=2), method))
    trained, optimizer = set(handle.trainable()), handle.optimizer(lr=lr)
    assert sum(len(g.get("pairs", ())) for g in optimizer.param_groups) == len(handle.sites)
    ids = torch.randint(tiny.VOCAB, (2, 8), generator=torch.Generator().manual_seed(0))
    losses = steps(handle, optimizer, 12 * [{"input_ids": ids, "labels": ids}])
    assert losses[-1] < losses[0] - by
    assert set(handle.trainable()) == trained  # whichever factor rests
