"""Two processes, replicated or sharded, train as one does on the whole batch."""

import functools

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

from eckart.errors import UsageError
from tests.conftest import ARCHITECTURES, batch_for, cast, randomise
from tests.laws.matrix import attached, slugs, small, weights_methods
from tests.processes import in_processes

STEPS = 4  # rules with a refresh every third step have had it


def prepared(slug, architecture):
    model, handle, _ = attached(slug, architecture, torch.float64)
    randomise(handle)
    return model, handle


def methods(architecture):
    """All there are on plain matrices, and on transposed ones in a model whose embedding is tied;
    elsewhere all adapters. (What trains Gemma's embedding whole differs by 1e-8 already in one
    process when the rows of a batch change places: Adam where gradients cancel.)"""
    if architecture in ("llama", "gpt2"):
        return weights_methods() + slugs("update")
    return [slug for slug in weights_methods() if small(slug).base == "frozen"]


def train(handle, forward, architecture, rank, count):
    """Losses' gradients averaged over processes must be those of the whole batch."""
    optimizer = handle.optimizer(lr=1e-2, clip=1.0)
    for seed in range(STEPS):
        batch = cast(batch_for(architecture, rows=4, seed=seed), torch.float64)
        rows = slice(rank * 4 // count, (rank + 1) * 4 // count)
        batch = {name: tensor[rows] for name, tensor in batch.items()}
        handle.loss(batch, forward(**batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: whole(t).detach().clone() for name, t in handle.named_state().items()}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def replicated(rank, slug, architecture):
    model, handle = prepared(slug, architecture)
    update = handle.recipe.update
    idle = update is not None and update.rule().idles  # then the reducer must be told
    wrapped = DistributedDataParallel(model, find_unused_parameters=idle)
    return train(handle, wrapped, architecture, rank, 2)


def sharded(rank, slug, architecture):
    model, handle = prepared(slug, architecture)
    for module in list(model.modules()):
        if isinstance(module, GradientCheckpointingLayer):  # transformers' word for a block
            fully_shard(module)
    fully_shard(model)
    return train(handle, model, architecture, rank, 2)


def all_of(rank, way, architecture):
    """What every method ends with, or how it was refused: one launch for all."""
    found = {}
    for slug in methods(architecture):
        try:
            found[slug] = way(rank, slug, architecture)
        except UsageError as refusal:
            found[slug] = f"{refusal.what}; {refusal.fix}"
    return found


@functools.cache
def alone(slug, architecture):
    model, handle = prepared(slug, architecture)
    return train(handle, model, architecture, 0, 1)


@pytest.mark.parametrize("way", [replicated, sharded], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, marks=pytest.mark.slow if a != "llama" else ()) for a in ARCHITECTURES],
)
def test_two_processes_equal_one(architecture, way):
    first, second = in_processes(all_of, way, architecture)
    for slug in methods(architecture):
        if isinstance(first[slug], str):
            assert way is sharded and first[slug] == second[slug], first[slug]
            continue
        expected = alone(slug, architecture)
        assert expected.keys() == first[slug].keys(), slug
        for name, tensor in expected.items():
            # fp64: the mean of two half batches against that of the whole, four steps of
            # Adam, whose division by small moments amplifies round-off
            close = {"rtol": 0, "atol": 1e-9, "msg": lambda m, c=slug, n=name: f"{c} {n}: {m}"}
            torch.testing.assert_close(first[slug][name], tensor, **close)
            assert torch.equal(first[slug][name], second[slug][name]), (slug, name)
