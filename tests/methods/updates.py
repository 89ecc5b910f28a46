"""Shared by the tests of update rules: training of one matrix on given gradients, and checks."""

import io

import torch
from torch import nn

from eckart.optim import LowRankOptimizer

F64 = torch.float64


def spectrum(shape, steps, seed=0, dtype=F64):
    """Gradients with singular values from 1 to 0.01, so that subspaces are well defined."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(steps):
        U, s, Vh = torch.linalg.svd(torch.randn(shape, generator=g, dtype=F64), full_matrices=False)
        out.append((U * torch.logspace(0, -2, s.shape[-1], dtype=F64) @ Vh).to(dtype))
    return out


def start(shape, seed=5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def train(rule, W, grads, lr=0.05, stop=None, **group):
    """(W, state) after each step; resumed with a new optimizer at `stop`."""
    p = nn.Parameter(W.clone())

    def made():
        return LowRankOptimizer([{"params": [("w", p)], **group}], lr=lr, rule=rule)

    optimizer, path, states = made(), [], []
    for step, G in enumerate(grads):
        if step == stop:
            file = io.BytesIO()
            torch.save(optimizer.named_state_dict(), file)
            file.seek(0)
            optimizer = made()
            optimizer.load_named_state_dict(torch.load(file, weights_only=True))
        p.grad = G.clone()
        optimizer.step()
        path.append(p.detach().clone())
        state = optimizer.state[p].items()
        states.append({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state})
    return path, states


def check_state(method, *shape):
    """Check that state is tensors and scalars of the size that `cost` gives; returns its names."""
    _, states = train(method.rule(), start(shape), spectrum(shape, 3))
    state = states[-1]
    assert all(isinstance(v, torch.Tensor | int | float) for v in state.values())
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    assert method.cost(*shape).state == sum(t.numel() for t in tensors.values())
    return {k: tuple(t.shape) for k, t in tensors.items()}


def check_resume(rule, stop, shape=(9, 6)):
    """Check that a run resumed from a file, in the parameter's dtype, is equal bit for bit."""
    for dtype in (F64, torch.bfloat16):
        grads = spectrum(shape, 14, dtype=dtype)
        path, states = train(rule, start(shape).to(dtype), grads)
        again, others = train(rule, start(shape).to(dtype), grads, stop=stop)
        assert torch.equal(again[-1], path[-1])
        for key, value in states[-1].items():
            assert torch.equal(torch.as_tensor(others[-1][key]), torch.as_tensor(value)), key


def check_experts(rule, each):
    """Check that stacked matrices are updated as each alone; `each` has the gradients of each."""
    W = start((len(each), *each[0][0].shape))
    path, _ = train(rule, W, [torch.stack(row) for row in zip(*each, strict=True)], leading=1)
    for i, grads in enumerate(each):
        alone, _ = train(rule, W[i], grads)
        torch.testing.assert_close(path[-1][i], alone[-1], rtol=0, atol=1e-13)


def check_zero(rule, shape=(9, 6)):
    """Check that zero gradients at first cause decay only, and later nothing non-finite."""
    zero, lr = torch.zeros(shape, dtype=F64), 0.05
    grads = [zero, zero, *spectrum(shape, 6), zero, *spectrum(shape, 2, seed=1)]
    path, states = train(rule, start(shape), grads, lr)
    kept = (1 - lr * rule.weight_decay) ** 2 * start(shape)
    torch.testing.assert_close(path[1], kept, rtol=0, atol=1e-14)
    assert all(W.isfinite().all() for W in path)
    assert not torch.equal(path[2], path[1])  # later gradients still change W
    tensors = [v for s in states for v in s.values() if isinstance(v, torch.Tensor)]
    assert all(t.isfinite().all() for t in tensors)


def regression(rule, lr, steps=300, seed=0):
    """The final loss as a share of the initial one in fitting W [12, 8] to x -> W0 x."""
    g = torch.Generator().manual_seed(seed)
    W0, X = (torch.randn(shape, generator=g, dtype=F64) for shape in ((12, 8), (8, 64)))
    p = nn.Parameter(torch.zeros(12, 8, dtype=F64))
    optimizer = LowRankOptimizer([("w", p)], lr=lr, rule=rule)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses = []
    for _ in range(steps):
        loss = ((p - W0) @ X).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return losses[-1] / losses[0]


def check_hooks(rule, steps):
    """Check that in layer-wise mode each parameter is updated as soon as its gradient exists."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(6, 9, dtype=F64), nn.Linear(9, 7, dtype=F64)) for _ in "ab"]
    models[1].load_state_dict(models[0].state_dict())
    a, b = (LowRankOptimizer(m.named_parameters(), 0.02, rule=rule) for m in models)
    b.attach_layerwise("first")
    for step in range(steps):
        x = torch.randn(8, 6, dtype=F64, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip(models, (a, b), strict=True):
            (model(x) ** 2).sum().backward()
            if optimizer is b:
                assert model[0].weight.grad is None and model[1].weight.grad is None
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


class PlainAdam:
    """A reference Adam with moments and a count for each name; fp64, torch's epsilon."""

    def __init__(self, lr):
        self.lr, self.M, self.V, self.count = lr, {}, {}, {}

    def forget(self, name):
        for kept in (self.M, self.V, self.count):
            kept.pop(name, None)

    def moved(self, name, w, g):
        """w after a step with the gradient g."""
        self.M[name] = 0.9 * self.M.get(name, 0.0) + 0.1 * g
        self.V[name] = 0.999 * self.V.get(name, 0.0) + 0.001 * g**2
        self.count[name] = t = self.count.get(name, 0) + 1
        root = (self.V[name] / (1 - 0.999**t)).sqrt() + 1e-8
        return w - self.lr * (self.M[name] / (1 - 0.9**t)) / root
