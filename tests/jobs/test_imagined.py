"""Sizes of what is not there against those of what is: every method that trains, on all
architectures.

The measured side is real: attached with calibration, one step of the real optimizer, tensors
counted. All categories are exact; activations too, since the same code ran. The peak is that
of a second pass, as storages live and die, within a tenth; a step's own temporaries come after.
"""

import gc
from dataclasses import replace

import pytest
import torch

from eckart.errors import UsageError
from eckart.io.heads import outside
from eckart.jobs.measuring.imagined import elements, imagine
from eckart.jobs.measuring.memory import (
    Live,
    activation_bytes,
    held_state_bytes,
    line,
    model_bytes,
    size,
)
from eckart.jobs.measuring.shallow import alike, sized
from eckart.jobs.proposals import candidates
from eckart.methods.weights.lamda import LaMDA
from eckart.methods.weights.lora import LoRA
from eckart.recipe import Recipe, attach, registry
from tests.conftest import ARCHITECTURES, batch_for, tiny
from tests.laws.matrix import attached, recipe_for, slugs, small

TASKS = {"t5": "seq2seq", "vit": "image"}  # where not causal
DEFAULT = ("llama", "gpt2", "mixtral")  # the others are slow
CPU = torch.device("cpu")


def recipe_with(slug):
    """The recipe in which a method of any axis stands; an adapter beside what needs a partner."""
    axis = registry.find(slug).axis
    if axis in ("weights", "update"):
        return recipe_for(slug)
    method = small(slug)
    return Recipe(weights=small("lora"), **{axis: (method,) if axis == "objective" else method})


def imagined(recipe, architecture):
    """The same recipe on the same configuration, from the configuration alone."""
    task = TASKS.get(architecture, "causal")
    return imagine(tiny(architecture).config, recipe, torch.float32, CPU, steps=20, task=task)


def measured(recipe, architecture):
    model, batch = tiny(architecture), batch_for(architecture)
    handle = attach(
        model, recipe, calibration=[batch] if recipe.needs else None, steps=20, lr=1e-2, warmup=2,
        also_train=outside(model) if architecture == "vit" else (),
    )  # fmt: skip
    optimizer = handle.optimizer(1e-3)
    handle.loss(batch, model(**batch)).backward()
    found = model_bytes(handle)
    found["gradients"] = sum(size(p) for p in handle.trainable().values())
    optimizer.step()
    found["state"] = held_state_bytes(optimizer)
    optimizer.zero_grad()
    with Live() as live:
        handle.loss(batch, model(**batch)).backward()
    optimizer.zero_grad()
    held = sum(found.values()) - found["gradients"]
    return found, activation_bytes(model, batch), held + live.peak


TRAINING = [s for axis in ("weights", "update", "precision", "objective") for s in slugs(axis)]


@pytest.mark.parametrize(
    "architecture",
    [a if a in DEFAULT else pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES],
)
@pytest.mark.parametrize("slug", TRAINING)
def test_every_category_is_exact(slug, architecture):
    try:
        wanted, activations, peak = measured(recipe_with(slug), architecture)
    except UsageError as refused:  # this kind of layer: then the estimate says so too
        with pytest.raises(UsageError, match=refused.what):
            imagined(recipe_with(slug), architecture)
        return
    found = imagined(recipe_with(slug), architecture)
    assert found.fixed == wanted
    rows, length = next(iter(batch_for(architecture).values())).shape[:2]
    assert found.peak(rows, length) == pytest.approx(peak, rel=0.1)
    assert found.activations(rows, length) == activations


@pytest.mark.parametrize("slug", slugs("weights"))
def test_a_batch_of_any_size_is_known_from_one_row_and_two(slug):
    """Factors that a pass makes are kept once, not once a row."""
    found = imagined(recipe_for(slug), "llama")
    known = line(lambda rows: found.activations(rows, 12))
    # a map whose many tokens make another way cheaper keeps less
    assert known.of(6) == pytest.approx(found.activations(6, 12), rel=0.01)


@pytest.mark.parametrize("architecture", ("llama", "gpt2"))
def test_trained_weights_in_bf16_are_imagined_under_autocast(architecture):
    recipe, model, batch = recipe_with("dense"), tiny(architecture), batch_for(architecture)
    plain = activation_bytes(attach(model, recipe, steps=20).model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = activation_bytes(model, batch)
    assert wanted < plain
    half = replace(recipe, precision=registry.load("bf16")())
    found = imagined(half, architecture)
    rows, length = batch["input_ids"].shape
    assert found.activations(rows, length) == wanted
    assert found.peak(rows, length) < imagined(recipe, architecture).peak(rows, length)


@pytest.mark.parametrize("architecture", ("llama", "gpt2"))
def test_packed_rows_keep_their_mask(architecture):
    recipe, model, batch = recipe_with("lora"), tiny(architecture), batch_for(architecture)
    rows, length = batch["input_ids"].shape
    two_texts = (torch.arange(length) % (length // 2)).expand(rows, -1)
    handle = attach(model, recipe, steps=20)
    wanted = activation_bytes(model, {**batch, "position_ids": two_texts, "use_cache": False})
    assert wanted != activation_bytes(handle.model, batch)
    config = tiny(architecture).config
    found = imagine(config, recipe, torch.float32, CPU, steps=20, packed=True)
    assert found.activations(rows, length) == wanted


DECIDED_BY_NUMBERS = {
    "eva": LoRA(rank=4, init="eva"),
    "bins": LaMDA(rank=4, allocation="bins"),
    "equal energy": LaMDA(rank=4, allocation="equal_energy"),
}


@pytest.mark.parametrize("architecture", ("llama", "gpt2"))
@pytest.mark.parametrize("method", DECIDED_BY_NUMBERS.values(), ids=DECIDED_BY_NUMBERS)
def test_ranks_that_numbers_decide_are_taken_at_their_mean(method, architecture):
    recipe = Recipe(weights=method)
    fixed, activations, peak = measured(recipe, architecture)
    found = imagined(recipe, architecture)
    rows, length = batch_for(architecture)["input_ids"].shape
    assert found.by_formula
    assert found.peak(rows, length) == pytest.approx(peak, rel=0.1)
    assert found.activations(rows, length) == pytest.approx(activations, rel=0.05)
    # the mean rank in numbers, not in elements: a matrix is m + n times its rank
    assert found.factors == pytest.approx(fixed["factors"], rel=0.2)


@pytest.mark.parametrize("slug", slugs("weights"))
def test_the_formula_trains_as_many_elements_as_there_are(slug):
    _, handle, _ = attached(slug, "llama")
    if handle.weights.base == "trained":
        return  # no terms: what is trained is the matrix itself
    trained, _ = elements(handle.weights, list(handle.sites.values()))
    parts = handle.carried().values()
    assert trained == sum(p.numel() for part in parts for p in part.parameters())


def test_checkpointing_keeps_less_and_more_rows_keep_more():
    found = imagined(recipe_with("lora"), "llama")
    one, two = found.activations(1, 32), found.activations(2, 32)
    assert one < two <= 2 * one
    assert found.activations(2, 32, checkpointing=True) < two / 2


def test_operations_are_those_of_the_products():
    """2 m n per token and matrix forward; backward once for inputs, once for trained weights."""
    found = imagined(recipe_with("dense"), "llama")
    forward, backward = found.flops(1, 32)
    _, handle, _ = attached("dense", "llama")
    matrices = [s.shape for s in handle.sites.values() if s.kind != "embedding"]
    products = 2 * 32 * sum(m * n for m, n in matrices)
    attention = 2 * 2 * 2 * 32 * 32 * 32  # two layers, scores and values, 2 flops each
    assert forward == pytest.approx(products + attention, rel=0.01)
    assert 1.9 < backward / forward < 2.4


def combined(words):
    """The recipe of a proposal; None where its parts do not combine."""
    ((weights, update),) = [(w, u) for said, w, u, _ in candidates() if said == words]
    try:
        return Recipe(weights=weights, update=update)
    except UsageError:
        return None


def of_layers(count, **changes):
    config = tiny("llama").config
    for name, value in {"num_hidden_layers": count, **changes}.items():
        setattr(config, name, value)
    return config


QUICK = ("weights=lora", "weights=dense update=galore", "weights=dense update=lisa")
SLOW = [said for said, *_ in candidates() if said not in QUICK]


@pytest.mark.parametrize(
    "words", [*QUICK, *(pytest.param(w, marks=pytest.mark.slow) for w in SLOW)]
)
def test_sizes_of_a_deep_model_follow_from_shallow_ones(words):
    config, recipe = of_layers(7, hidden_size=64, intermediate_size=96), combined(words)
    if recipe is None:
        return
    whole = imagine(config, recipe, torch.float32, CPU)
    found = sized(config, recipe, torch.float32, CPU, alike(config))
    assert (found.fixed, found.parameters) == (whole.fixed, whole.parameters)
    assert found.trainable == whole.trainable
    for checkpointing in (False, True):
        assert found.activations(2, 16, checkpointing) == whole.activations(2, 16, checkpointing)
    assert found.flops(1, 16) == whole.flops(1, 16)
    in_turn = recipe.update is not None and recipe.update.rule().blocks is not None
    assert len(found.models) == (1 if in_turn else 2)


def test_only_a_stack_of_like_layers_is_taken_for_one():
    assert alike(of_layers(7)) and not alike(of_layers(3))
    assert not alike(of_layers(8, layer_types=["sliding_attention", "full_attention"] * 4))
    assert not alike(tiny("t5").config)


def test_what_is_measured_goes_again():
    model, batch = tiny("llama"), batch_for("llama")

    def tensors():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    activation_bytes(model, batch)
    before = tensors()
    activation_bytes(model, batch)
    assert tensors() == before


def test_nothing_of_the_size_is_allocated():
    from transformers import LlamaConfig

    config = LlamaConfig(num_hidden_layers=2, vocab_size=128_000)  # 5.8 GB in fp32
    found = imagine(config, recipe_for("lora"), torch.float32, CPU)
    assert found.weights > 3e9
    assert found.activations(8, 2048) > 1e9
