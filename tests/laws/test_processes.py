"""Two processes, replicated or sharded, train as one does on the whole batch."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.conftest import randomise
from tests.laws.matrix import attached, slugs, weights_methods
from tests.processes import in_processes

METHODS = weights_methods() + slugs("update")
ARCHITECTURES = ("llama", "gpt2")  # one of each storage; the second has tied embeddings
STEPS = 5


def prepared(slug, architecture):
    model, handle, _ = attached(slug, architecture, torch.float64)
    randomise(handle)
    return model, handle


def train(handle, forward, rank, count):
    """Losses' gradients averaged over processes must be those of the whole batch."""
    from tests.conftest import batch_for

    architecture = handle.model.config.model_type
    optimizer = handle.optimizer(lr=1e-2, clip=1.0)
    for seed in range(STEPS):
        batch = batch_for(architecture, rows=4, seed=seed)
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
    return train(handle, wrapped, rank, 2)


def sharded(rank, slug, architecture):
    model, handle = prepared(slug, architecture)
    for block in model.model.layers if architecture == "llama" else model.transformer.h:
        fully_shard(block)
    fully_shard(model)
    return train(handle, model, rank, 2)


def all_of(rank, way, cases):
    return {case: way(rank, *case) for case in cases}


@pytest.mark.parametrize("way", [replicated, sharded], ids=["ddp", "fsdp2"])
def test_two_processes_equal_one(way):
    cases = [(slug, architecture) for slug in METHODS for architecture in ARCHITECTURES]
    first, second = in_processes(all_of, way, cases)
    for case in cases:
        model, handle = prepared(*case)
        alone = train(handle, model, 0, 1)
        assert alone.keys() == first[case].keys(), case
        for name, expected in alone.items():
            # fp64: the mean of two half batches against that of the whole, five steps of
            # Adam, whose division by small moments amplifies round-off
            close = {"rtol": 0, "atol": 1e-9, "msg": lambda m, c=case, n=name: f"{c} {n}: {m}"}
            torch.testing.assert_close(first[case][name], expected, **close)
            assert torch.equal(first[case][name], second[case][name]), (case, name)
