"""All laws in one call, for configurations of a method other than its default.

The laws themselves (tests/laws) run over every method in its default configuration.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
from typing import Any

import torch

from eckart.linear import Structured
from eckart.recipe import Recipe, Weights, attach, attach_from
from tests.conftest import batch_for, cast, randomise, tiny
from tests.laws.matrix import logits, steps

F64 = torch.float64


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal random numbers in fp64 from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def carried(method: Weights, architecture: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model with the method attached, its handle and a batch."""
    model, batch = tiny(architecture, dtype), cast(batch_for(architecture), dtype)
    calibration = [batch] if method.needs else None
    handle = attach(model, Recipe(weights=method), calibration=calibration, steps=20, lr=1e-2)
    model.to(dtype)
    return model, handle, batch


def assert_lawful(method: Weights, architecture: str) -> None:
    """Assert the laws of start, cost, gradients, training, copies, rebuilding, removal, merging."""
    model, handle, batch = carried(method, architecture)
    base = logits(tiny(architecture), batch)
    if method.promised("starts_at_base"):
        # one rounding of a logit of order 1 in fp32
        torch.testing.assert_close(logits(model, batch), base, rtol=2e-6, atol=2e-6)
    assert_cost(handle)
    before = {name: p.detach().clone() for name, p in handle.trainable().items()}
    losses = steps(handle, handle.optimizer(lr=3e-3, clip=1.0), [batch] * 5)
    assert losses[-1] < losses[0]
    assert before and any(not torch.equal(before[n], p) for n, p in handle.trainable().items())
    randomise(handle)
    expected = logits(model, batch)
    assert not torch.allclose(expected, base, atol=1e-3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, batch), expected)
        assert list(other.state_dict()) == list(model.state_dict())
    again = tiny(architecture)
    second = attach_from(again, json.loads(json.dumps(handle.structure())))
    second.load_named_state({k: v.clone() for k, v in handle.named_state().items()})
    assert torch.equal(logits(again, batch), expected)
    assert second.structure() == handle.structure()
    if method.promised("restores_base"):
        handle.remove()
        assert torch.equal(logits(model, batch), base)
        assert not any(isinstance(m, Structured) for m in model.modules())
    if method.promised("merges"):
        model, handle, batch = carried(method, architecture, F64)
        randomise(handle)
        expected = logits(model, batch)
        handle.merge()
        # fp64 throughout; a few hundred products of order 1
        torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-9)


def assert_cost(handle: Any) -> None:
    """Assert that the cost formula gives the number of elements of every site."""
    for path, by_name in handle.parts().items():
        site = handle.sites[path]
        cost = handle.weights.at(site).cost(*site.shape)
        experts = math.prod(site.leading)
        own = sum(p.numel() for part in by_name.values() for p in part.parameters())
        frozen = sum(b.numel() for part in by_name.values() for b in part.buffers())
        assert own == experts * cost.parameters, path
        assert frozen == experts * cost.frozen, path
