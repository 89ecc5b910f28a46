"""What two processes run in test_sharded.py; importable by them."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn

from eckart.methods.update.altlora import AltLoRA
from eckart.methods.update.lora_pro import LoRAPro
from eckart.optim import (
    SVD,
    Adam,
    Blocks,
    ErrorFeedback,
    LowRankOptimizer,
    NormGrowth,
    Packed,
    Refresh,
    Rescaled,
    Rule,
    Selected,
)

LIMITED = {"limiter": NormGrowth()}
RULES = {
    "adamw": Rule(Adam(), weight_decay=0.1),
    "galore": Rule(Adam(eps_mode="hf"), SVD(2), Refresh(4), scale=0.25, weight_decay=0.1),
    "left": Rule(Adam(), SVD(2, "left"), Refresh(4)),
    "both": Rule(Adam(), SVD(2, "both"), Refresh(4, "rotate")),
    "rotate": Rule(Adam(), SVD(2), Refresh(3, "rotate")),
    "reset": Rule(Adam(), SVD(2), Refresh(3, "reset")),
    "fira": Rule(Adam(), SVD(2), Refresh(4), residual=Rescaled(), **LIMITED, scale=0.25),
    "fira, left": Rule(
        Adam(), SVD(2, "left"), Refresh(4), residual=Rescaled("exact", "matrix"), **LIMITED
    ),
    "dct": Rule(Adam(), Selected(2), Refresh(1, "rotate"), ErrorFeedback()),
    "lisa": Rule(Adam(), blocks=Blocks(count=2, every=3)),
    "q-galore": Rule(Adam(), Packed(SVD(2, "both")), Refresh(2, adaptive=0.1)),
    "lora-pro": LoRAPro(damping=1e-3).rule(),
    "altlora": AltLoRA(plus=True, damping=1e-3).rule(),
    "altlora, alternate": AltLoRA(schedule="alternate", turn=2, damping=1e-3).rule(),
    "dct, left": Rule(Adam(age_correct=True), Selected(2, "left"), Refresh(3, "rotate")),
}


def network(seed=0):
    """5, 9 and 7 rows do not divide by two: the second process has fewer, of 1 row none."""
    torch.manual_seed(seed)
    sizes = [(6, 5), (5, 9), (9, 7), (7, 1)]
    layers = [nn.Linear(a, b, dtype=torch.float64) for a, b in sizes]
    return nn.Sequential(*(m for layer in layers for m in (layer, nn.Tanh())))


def data(steps, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 6, generator=g, dtype=torch.float64) for _ in range(steps)]


def train(model, optimizer, batches, accumulate=1):
    norms = []
    for i, x in enumerate(batches):
        (10 * model(x) ** 2).mean().backward()
        if (i + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            norms.append(float(optimizer.grad_norm))
    return norms


def optimizer_of(model, rule, penalised=False, **options):
    """The second weight [9, 5] and the first [5, 6] stand in for a pair B, A."""
    group = {"params": list(model.named_parameters()), "pairs": [("2.weight", "0.weight", 0.5)]}
    optimizer = LowRankOptimizer([group], 0.02, rule=RULES[rule], clip=0.5, **options)
    if penalised:
        optimizer.add_penalty(lambda: {p: 0.01 * p.detach() for _, p, _ in optimizer.named()})
    return optimizer


def fsdp2(rule, layerwise, stop):
    """Train under fully_shard, saving by name and starting anew after `stop` steps."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = network(), init_device_mesh("cpu", (2,))
    options = {"layerwise": layerwise, "penalised": not layerwise}
    optimizer = optimizer_of(model, rule, **options)  # before the wrapper swaps
    names = [name for name, _ in model.named_parameters()]
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    params = dict(model.named_parameters())
    optimizer.param_groups[0]["params"] = [params[name] for name in names]
    batches = [x.chunk(2)[dist.get_rank()] for x in data(10)]
    norms = train(model, optimizer, batches[:stop])
    if stop < 10:
        saved = optimizer.named_state_dict()
        if layerwise:
            optimizer.projected.bind([], lambda p: None)
        optimizer = optimizer_of(model, rule, **options)
        optimizer.load_named_state_dict(saved)
        norms += train(model, optimizer, batches[stop:])
    weights = [p.full_tensor().detach() for p in model.parameters()]
    return weights, norms, optimizer.named_state_dict()


def ddp(rule, layerwise):
    """Train under DistributedDataParallel, accumulating two micro-batches."""
    from torch.nn.parallel import DistributedDataParallel as DDP

    model = network()
    optimizer = optimizer_of(model, rule, penalised=not layerwise)
    if layerwise:
        optimizer.attach_layerwise(average_over=dist.group.WORLD)
        DDP._set_params_and_buffers_to_ignore_for_model(model, optimizer.layerwise_names)
    wrapped = DDP(model, find_unused_parameters=RULES[rule].idles)
    batches = [x.chunk(2)[dist.get_rank()] for x in data(10)]
    norms = train(wrapped, optimizer, batches, accumulate=2)
    return [p.detach() for p in model.parameters()], norms, optimizer.named_state_dict()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    freed = [n for n, r in RULES.items() if not (r.projector.identity or r.needs_gradient)]
    runs = {
        "fsdp2": {rule: fsdp2(rule, False, 10) for rule in RULES},
        "fsdp2, resumed": {rule: fsdp2(rule, False, 5) for rule in RULES},
        "fsdp2, layer by layer": {rule: fsdp2(rule, True, 5) for rule in freed},
        "ddp": {
            rule: ddp(rule, False)
            for rule in ("adamw", "galore", "both", "fira", "lisa", "altlora, alternate")
        },
        "ddp, layer by layer": {rule: ddp(rule, True) for rule in ("galore", "both")},
    }
    torch.save(runs, f"{sys.argv[1]}.{os.environ['RANK']}")
    dist.destroy_process_group()
