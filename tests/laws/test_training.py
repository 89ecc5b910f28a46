"""Gradients reach exactly what is declared trainable; state is plain; resume is exact."""

import copy
import io
import json
import math

import pytest
import torch
import torch.nn.functional as F

from eckart.recipe import attach_from
from tests.conftest import batch_for, cast, randomise, tiny
from tests.laws.matrix import attached, logits, slugs, small, steps, weights_methods

TRAINED = weights_methods() + slugs("update")


def batches(architecture: str, count: int, dtype=torch.float32):
    return [cast(batch_for(architecture, seed=s), dtype) for s in range(count)]


@pytest.mark.parametrize("slug", TRAINED)
def test_declared_tensors_change_and_all_others_stay(slug, architecture):
    model, handle, _ = attached(slug, architecture)
    randomise(handle)
    before = copy.deepcopy(model.state_dict())
    trainable = set(handle.trainable())
    assert trainable
    # before a period of the small configuration ends, when what trains or is frozen may change
    steps(handle, handle.optimizer(lr=1e-2, clip=1.0), batches(architecture, 2))
    after = model.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    named = dict(model.named_parameters(remove_duplicate=False))
    ids = {id(named[name]) for name in trainable}
    # An integer buffer counts or masks: events move it, and it is no part of the map.
    maps = {name for name in after if after[name].is_floating_point()}
    frozen = {name for name in maps if id(named.get(name)) not in ids}
    assert not changed & frozen
    still = trainable - changed
    # What the loss cannot reach has no gradient: BERT's pooler, position rows not used.
    assert all(unreached(model, named[name], architecture) for name in still), still


def unreached(model, parameter, architecture) -> bool:
    model.zero_grad()
    model(**batch_for(architecture))["loss"].backward()
    return parameter.grad is None or not parameter.grad.any()


# Resume is about state, not about layers: one architecture of each storage suffices.
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("slug", TRAINED)
def test_resume_equals_the_uninterrupted_run(slug, architecture):
    model, handle, _ = attached(slug, architecture)
    optimizer = handle.optimizer(lr=1e-2, clip=1.0)
    steps(handle, optimizer, batches(architecture, 4))
    saved = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "events": handle.events.state_dict()}, saved)
    tensors = {k: v.detach().clone() for k, v in handle.named_state().items()}
    structure = json.loads(json.dumps(handle.structure()))
    losses = steps(handle, optimizer, batches(architecture, 3))

    again = tiny(architecture)
    second = attach_from(again, structure, recipe=handle.recipe)
    second.steps, second.lr, second.warmup = handle.steps, handle.lr, handle.warmup
    second.load_named_state(tensors)
    optimizer = second.optimizer(lr=1e-2, clip=1.0)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    second.events.load_state_dict(state["events"])
    assert steps(second, optimizer, batches(architecture, 3)) == losses
    ours, theirs = second.named_state(), handle.named_state()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("slug", TRAINED)
def test_optimizer_state_is_tensors_and_plain_scalars(slug):
    model, handle, _ = attached(slug, "llama")
    optimizer = handle.optimizer(lr=1e-2, clip=1.0)
    steps(handle, optimizer, batches("llama", 2))

    def check(value):
        if isinstance(value, dict):
            return all(check(v) for v in value.values())
        if isinstance(value, list | tuple):
            return all(check(v) for v in value)
        return value is None or isinstance(value, torch.Tensor | int | float | str | bool)

    assert check(optimizer.state_dict())


@pytest.mark.parametrize("slug", weights_methods())
def test_structure_and_tensors_rebuild_the_model(slug, architecture):
    model, handle, batch = attached(slug, architecture)
    randomise(handle)
    again = tiny(architecture)
    second = attach_from(again, json.loads(json.dumps(handle.structure())))
    second.load_named_state({k: v.clone() for k, v in handle.named_state().items()})
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert second.structure() == handle.structure()
    assert set(second.trainable()) == set(handle.trainable())


@pytest.mark.parametrize("slug", weights_methods())
def test_gradient_checkpointing_gives_the_same_gradients(slug, architecture):
    model, handle, batch = attached(slug, architecture, torch.float64)
    assert model.supports_gradient_checkpointing
    randomise(handle)
    model.train()
    plain = gradients(handle, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    recomputed = gradients(handle, batch)
    assert plain.keys() == recomputed.keys() and plain
    for name in plain:  # the same operations on the same numbers
        torch.testing.assert_close(recomputed[name], plain[name], rtol=0, atol=1e-12)


def gradients(handle, batch):
    handle.model.zero_grad()
    handle.loss(batch, handle.model(**batch)).backward()
    return {n: p.grad.clone() for n, p in handle.trainable().items() if p.grad is not None}


@pytest.mark.parametrize("slug", weights_methods())
def test_compiled_model_computes_the_same(slug):
    model, handle, batch = attached(slug, "llama", torch.float64)
    randomise(handle)
    expected = logits(model, batch)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    # fp64; aot_eager runs the same kernels in the same order
    torch.testing.assert_close(logits(compiled, batch), expected, rtol=0, atol=1e-12)


# A method per kind of code: the fused product of a factor pair, a gain over it, a basis that
# all layers share, and matrices trained through a projection. Models whose norms and rotary
# angles stay in fp64; a minute of compiling each.
@pytest.mark.slow
@pytest.mark.parametrize(
    "slug, architecture",
    [("lora", "gpt2"), ("dora", "bert"), ("randlora", "gpt2"), ("galore", "bert")],
)
def test_inductor_trains_the_same(slug, architecture):
    """The tensors after three steps of forward, backward and optimizer; not the whole matrix."""
    plain, compiled = (three_steps(slug, architecture, backend) for backend in (None, "inductor"))
    for name, tensor in plain.items():
        # fp64; inductor fuses and reorders sums of up to 64 products, and Adam divides by the
        # root of small moments
        torch.testing.assert_close(compiled[name], tensor, rtol=0, atol=1e-9)


def three_steps(slug: str, architecture: str, backend: str | None) -> dict[str, torch.Tensor]:
    model, handle, _ = attached(slug, architecture, torch.float64)
    randomise(handle)
    optimizer = handle.optimizer(lr=1e-2, clip=1.0)
    torch._dynamo.reset()
    forward = torch.compile(model, backend=backend) if backend else model
    for batch in batches(architecture, 3):
        labels = batch.pop("labels")
        scores = forward(**batch)["logits"]  # the model's own loss is fp32
        F.cross_entropy(scores.flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return handle.named_state()


BESIDE = [slug for slug in weights_methods() if small(slug).base != "trained"]


@pytest.mark.parametrize("slug", BESIDE)  # a trained base is counted by the model itself
def test_cost_formula_counts_the_trained_tensors(slug, architecture):
    model, handle, _ = attached(slug, architecture)
    for path, by_name in handle.parts().items():
        site = handle.sites[path]
        m, n = site.shape
        experts = math.prod(site.leading)
        own = [p for part in by_name.values() for p in part.parameters()]
        buffers = [b for part in by_name.values() for b in part.buffers()]
        cost = handle.weights.at(site).cost(m, n)
        assert sum(p.numel() for p in own) == experts * cost.parameters, path
        assert sum(b.numel() for b in buffers) == experts * cost.frozen, path
