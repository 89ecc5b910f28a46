"""In every number format a method trains fp32 tensors, or says why it does not."""

import pytest
import torch

from eckart.errors import UsageError
from eckart.recipe import Recipe, attach
from tests.conftest import batch_for, cast, tiny
from tests.laws.matrix import slugs, small, steps, weights_methods


@pytest.mark.parametrize("precision", slugs("precision"))
@pytest.mark.parametrize("slug", weights_methods())
def test_every_method_trains_in_every_precision_or_says_why(slug, precision):
    chosen = small(precision)
    dtype = getattr(torch, chosen.dtype)
    try:
        recipe = Recipe(weights=small(slug), precision=chosen)
        kept = torch.float32 if recipe.weights.trains_the_model else dtype
        batch = cast(batch_for("llama"), kept)
        calibration = [batch] if recipe.needs else None
        handle = attach(tiny("llama", kept), recipe, calibration=calibration, steps=20, lr=1e-2)
    except UsageError as refusal:
        assert refusal.facts and refusal.fix
        return
    tensors = handle.trainable()
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    before = {name: t.detach().clone() for name, t in tensors.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=kept != dtype):
        losses = steps(handle, handle.optimizer(lr=1e-2, clip=1.0), [batch] * 8)
    assert losses[-1] < losses[0]
    assert any(not torch.equal(t, before[name]) for name, t in tensors.items())
