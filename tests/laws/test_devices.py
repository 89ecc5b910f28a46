"""On an accelerator no operation mixes devices, and no training step waits for the device.

Tested with the fake device of `tests/devices.py`.
"""

import pytest
import torch

from eckart.optim import LowRankOptimizer, fixed
from eckart.optim.pair import column
from eckart.recipe import attach
from tests.conftest import batch_for, tiny
from tests.devices import Accelerator
from tests.laws.matrix import recipe_for, slugs, weights_methods

WIDE = (1030, 1026)  # whose basis is searched for with random directions


@pytest.fixture
def device():
    for made_once in (
        column,
        fixed.directions,
        fixed.order,
        fixed.turns,
    ):  # they know a device by its name
        made_once.cache_clear()
    with Accelerator() as device:
        yield device


def waits(device):
    """Our lines that waited for the device, except in basis decompositions and counts of tokens
    per expert."""
    known = ("optim/refresh.py", "linear/layers.py", "in others")
    return {line: n for line, n in device.waits.items() if not any(k in line for k in known)}


def left_behind(device, tensors):
    """Indices of tensors not on the device, without 0-dim ones, which may be on the CPU."""
    return sum(t.dim() > 0 and t not in device.there for t in tensors)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("slug", [*weights_methods(), *slugs("update")])
def test_a_method_stays_on_the_device_of_its_model(slug, architecture, device):
    model, batch, recipe = tiny(architecture), batch_for(architecture), recipe_for(slug)
    device.put(*model.parameters(), *model.buffers(), *batch.values())
    calibration = [batch] if recipe.needs else None
    handle = attach(model, recipe, calibration=calibration, steps=20, lr=1e-2, warmup=2)
    optimizer = handle.optimizer(clip=1.0)
    device.waits.clear()
    for _ in range(4):
        handle.loss(batch, handle.model(**batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    waited = waits(device)
    optimizer.load_named_state_dict(optimizer.named_state_dict())
    handle.load_named_state(handle.named_state())
    if "merges" in recipe.weights.promises:
        handle.merge()
    states = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    assert not device.mixed
    assert left_behind(device, [*model.parameters(), *model.buffers(), *states]) == 0
    assert not waited


@pytest.mark.parametrize("slug", slugs("update"))
def test_a_wide_matrix_is_searched_on_its_device(slug, device):
    rule = recipe_for(slug).update.rule()
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in (WIDE, WIDE[::-1])]
    device.put(*params)
    named = [(f"layers.{i}.w", p) for i, p in enumerate(params)]
    optimizer = LowRankOptimizer(named, rule=rule, clip=1.0)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p) if p.requires_grad else None
        optimizer.step()
    assert not device.mixed and not waits(device)
