"""Copies, pickles, seeds and combinations."""

import copy
import pickle

import pytest
import torch

from eckart.errors import UsageError
from eckart.jobs.settings.config import resolve
from eckart.recipe import Recipe, attach
from eckart.recipe.recipe import fitted
from tests.conftest import batch_for, randomise, tiny
from tests.laws.matrix import attached, logits, slugs, small, steps, weights_methods


@pytest.mark.parametrize("slug", weights_methods())
def test_deepcopy_and_pickle_keep_the_terms(slug, architecture):
    model, handle, batch = attached(slug, architecture)
    randomise(handle)
    expected = logits(model, batch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, batch), expected)
        assert list(other.state_dict()) == list(model.state_dict())
        with torch.no_grad():  # a copy shares nothing with the original
            for parameter in other.parameters():
                parameter.add_(1.0)
    assert torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize("slug", weights_methods())
def test_inputs_of_any_dimensions_are_rows(slug):
    model, handle, _ = attached(slug, "llama")
    randomise(handle)
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 3, 4, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = layer(x)
    pairs = [(x[0, 1, 2], y[0, 1, 2]), (x[1], y[1]), (x[:0], y[:0])]
    pairs += [(x.transpose(0, 2), y.transpose(0, 2)), (x[0, :1].expand(3, 4, 32), y[0, :1])]
    for rows, expected in pairs:
        found = layer(rows)
        # fp32, sums of 32 products of order 1 in another order
        torch.testing.assert_close(found, expected.expand_as(found), rtol=0, atol=1e-5)
        found.sum().backward()


@pytest.mark.parametrize("slug", weights_methods())
def test_a_model_may_change_results_in_place(slug):
    """Falcon adds to them; a function that returned a view of its result would forbid it."""
    model, _, _ = attached(slug, "bert")  # its maps have biases
    x = torch.randn(2, 3, 32, requires_grad=True)
    for layer in model.bert.encoder.layer[0].attention.self.children():
        if isinstance(layer, torch.nn.Linear):
            y = layer(x)
            y += 1
            y.sum().backward()


BESIDE = [slug for slug in weights_methods() if small(slug).base != "trained"]


@pytest.mark.parametrize("slug", BESIDE)
def test_initial_values_do_not_depend_on_other_targets(slug):
    needs = [batch_for("llama")] if small(slug).needs else None
    values = []
    for targets in (("attn.q",), ("attn", "mlp")):
        handle = attach(
            tiny("llama"), Recipe(weights=small(slug, targets=targets)), calibration=needs
        )
        path = "model.layers.0.self_attn.q_proj"
        values.append(
            {
                f"{n}.{k}": v
                for n, p in handle.parts()[path].items()
                for k, v in p.state_dict().items()
            }
        )
    assert values[0].keys() == values[1].keys() and values[0]
    assert all(torch.equal(values[0][k], values[1][k]) for k in values[0])


@pytest.mark.parametrize("update", slugs("update"))
@pytest.mark.parametrize("slug", weights_methods())
def test_every_pair_runs_or_says_why(slug, update):
    try:
        recipe = Recipe(weights=fitted(small(slug), small(update)), update=small(update))
    except UsageError as refusal:
        assert len(refusal.facts) == 2 and refusal.fix  # both sides and a way out
        with pytest.raises(UsageError, match="do not combine") as typed:
            resolve("finetune", "no model", "no data", [f"weights={slug}", f"update={update}"])
        assert typed.value.facts == refusal.facts and typed.value.fix == refusal.fix
        return
    batch = batch_for("llama")
    handle = attach(tiny("llama"), recipe, calibration=[batch] if recipe.needs else None, steps=20)
    losses = steps(handle, handle.optimizer(lr=1e-3, clip=1.0), [batch] * 4)
    assert losses[-1] < losses[0]
