"""What is added to the loss acts on what is trained, and on nothing else."""

import pytest
import torch

from eckart.errors import UsageError
from eckart.recipe import Recipe, attach
from tests.conftest import batch_for, cast, randomise, tiny
from tests.laws.matrix import slugs, small, steps, weights_methods

F64 = torch.float64


def carrying(architecture, objective, dtype=torch.float32, weights="lora"):
    """A tiny model with a method and, where it is not None, an objective."""
    recipe = Recipe(weights=small(weights), objective=(small(objective),) if objective else ())
    calibration = [batch_for(architecture)] if recipe.needs else None
    handle = attach(tiny(architecture), recipe, calibration=calibration, steps=20, lr=1e-2)
    handle.model.to(dtype)
    randomise(handle)
    return handle


def data(architecture, count, rows=3, dtype=torch.float32):
    return [cast(batch_for(architecture, rows, seed), dtype) for seed in range(count)]


@pytest.mark.parametrize("objective", slugs("objective"))
def test_an_objective_changes_what_is_trained_and_nothing_else(objective, architecture):
    plain, handle = carrying(architecture, None), carrying(architecture, objective)
    trained = set(handle.trainable())
    before = {n: t.clone() for n, t in handle.model.state_dict().items() if n not in trained}
    for each in (plain, handle):
        steps(each, each.optimizer(lr=1e-2, clip=1.0), data(architecture, 3))
    without = plain.trainable()
    assert any(not torch.equal(t, without[name]) for name, t in handle.trainable().items())
    after = handle.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("objective", slugs("objective"))
def test_the_same_gradient_from_one_batch_and_from_its_parts(objective, architecture):
    """A data objective is a mean over the batch, or says that it couples it."""
    handle = carrying(architecture, objective, F64)
    if small(objective).couples_batch:
        with pytest.raises(UsageError):
            handle.recipe.require_no_accumulation(4)
        return
    (batch,) = data(architecture, 1, rows=4, dtype=F64)
    whole = gradients(handle, [batch])
    parts = [{n: t[i : i + 1] for n, t in batch.items()} for i in range(4)]
    for name, gradient in gradients(handle, parts).items():
        # Models compute their own loss in fp32: some ulp (1.2e-7) of each part.
        assert (gradient - whole[name]).norm() <= 1e-5 * whole[name].norm(), name


def gradients(handle, batches):
    handle.model.zero_grad()
    for batch in batches:
        (handle.loss(batch, handle.model(**batch)) / len(batches)).backward()
    return {n: p.grad.clone() for n, p in handle.trainable().items() if p.grad is not None}


@pytest.mark.parametrize("objective", slugs("objective"))
@pytest.mark.parametrize("slug", weights_methods())
def test_every_method_takes_an_objective_or_says_why(slug, objective):
    batches = data("llama", 1) * 4
    try:
        handle = carrying("llama", objective, weights=slug)
        losses = steps(handle, handle.optimizer(lr=1e-3, clip=1.0), batches)
    except UsageError as refusal:
        assert refusal.facts and refusal.fix  # what it is about and a way out
        return
    assert losses[-1] < losses[0]
