"""Start at the base, restore it, merge into it."""

import copy

import pytest
import torch

from eckart.linear import Structured
from tests.conftest import randomise, tiny
from tests.laws.matrix import attached, logits, weights_methods


@pytest.mark.parametrize("slug", weights_methods("starts_at_base"))
def test_outputs_start_at_the_base(slug, architecture):
    model, handle, batch = attached(slug, architecture)
    expected = logits(tiny(architecture), batch)
    # A gain takes the bias out of the product and experts sum in another order: one
    # rounding of a logit of order 1 in fp32.
    torch.testing.assert_close(logits(model, batch), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("slug", weights_methods("restores_base"))
def test_remove_restores_the_base_bit_for_bit(slug, architecture):
    model, handle, batch = attached(slug, architecture)
    randomise(handle)
    before, base = copy.deepcopy(model.state_dict()), tiny(architecture)
    assert any(key not in base.state_dict() for key in before)
    handle.remove()
    assert_same_model(model, base)
    assert torch.equal(logits(model, batch), logits(base, batch))


@pytest.mark.parametrize("slug", weights_methods("merges"))
def test_merged_model_computes_the_same(slug, architecture):
    model, handle, batch = attached(slug, architecture, torch.float64)
    randomise(handle)
    expected = logits(model, batch)
    assert not torch.allclose(expected, logits(tiny(architecture, torch.float64), batch))
    merged = handle.merge()
    assert merged is model
    # fp64 throughout; a few hundred products of order 1
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-9)
    assert not any(isinstance(m, Structured) for m in model.modules())
    base = tiny(architecture)
    assert model.state_dict().keys() == base.state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())


def assert_same_model(model: torch.nn.Module, base: torch.nn.Module) -> None:
    """Same classes, names, values, flags and configuration."""
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    mine, theirs = model.state_dict(), base.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)
    assert all(p.requires_grad for p in model.parameters())
    assert model.config.to_dict() == base.config.to_dict()
