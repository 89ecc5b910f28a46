"""What two processes run in test_sharded.py; importable by them."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from eckart.errors import UsageError
from eckart.methods.update.altlora import AltLoRA
from eckart.methods.update.lora_pro import LoRAPro
from eckart.optim import (
    SVD,
    Adafactor,
    Adam,
    Blocks,
    EightBit,
    ErrorFeedback,
    Gram,
    LowRankOptimizer,
    Momentum,
    NormGrowth,
    Orthogonal,
    Packed,
    Refresh,
    Rescaled,
    Rule,
    Selected,
    storage,
)
from eckart.recipe import registry

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
    "dct, 8 bits": Rule(Adam(), Selected(2), Refresh(1, "rotate"), ErrorFeedback(8)),
    "dct, left, 4 bits": Rule(Adam(), Selected(2, "left"), Refresh(2), ErrorFeedback(4)),
    "adafactor": Rule(Adafactor(beta1=0.9), weight_decay=0.1),
    "galore, adafactor": Rule(Adafactor(), SVD(2), Refresh(4), scale=0.25),
    "galore, adafactor, left": Rule(Adafactor(), SVD(2, "left"), Refresh(4)),
    "adam8bit": Rule(EightBit()),
    "galore, adam8bit": Rule(EightBit(Adam(eps_mode="hf")), Gram(2), Refresh(4, "rotate")),
    "galore, adam8bit, left": Rule(EightBit(), SVD(2, "left"), Refresh(4, "reset")),
    "trion": Rule(Orthogonal(), Selected(2), Refresh(1), Momentum(0.9), scale_by="tall"),
    "trion, left": Rule(Orthogonal(), Selected(2, "left"), Refresh(1), Momentum(0.9)),
    "orthogonal": Rule(Orthogonal()),
}


VECTORS = {name: Rule(Adam()) for name in ("trion", "trion, left", "orthogonal")}  # else the same


def registered():
    """Every update method, at its defaults but for small numbers that fit."""
    found = {}
    for slug, entry in registry.methods().items():
        if entry.axis == "update":
            small = {k: v for k, v in {"rank": 2, "every": 3}.items() if k in entry.fields}
            found[f"eckart methods {slug}"] = registry.load(slug)(**small)
    return found


RULES |= {name: update.rule() for name, update in registered().items()}
VECTORS |= {name: update.plain() for name, update in registered().items()}


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
    named = list(model.named_parameters())
    matrices = {
        "params": [(name, p) for name, p in named if p.dim() > 1],
        "rule": RULES[rule],
        "pairs": [("2.weight", "0.weight", 0.5)],
    }
    vectors = {
        "params": [(name, p) for name, p in named if p.dim() == 1],
        "rule": VECTORS.get(rule, RULES[rule]),
    }
    optimizer = LowRankOptimizer([matrices, vectors], 0.02, clip=0.5, **options)
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
    names = [group["param_names"] for group in optimizer.param_groups]
    fully_shard(model, mesh=mesh)
    params = dict(model.named_parameters())
    for group, found in zip(optimizer.param_groups, names, strict=True):
        group["params"] = [params[name] for name in found]
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


class Sent(TorchDispatchMode):
    """The collectives inside it: (name, elements) of each."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            flat = torch.utils._pytree.tree_leaves(args)
            elements = sum(t.numel() for t in flat if isinstance(t, torch.Tensor))
            self.calls.append((func.__name__.split(".")[0], elements))
        return func(*args, **(kwargs or {}))


def sent(rule, clip):
    """What each of ten steps of a sharded model sends."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    matrices = [(name, p) for name, p in model.named_parameters() if p.dim() > 1]
    optimizer = LowRankOptimizer(matrices, 0.02, rule=rule, clip=clip)
    found = []
    for x in data(10):
        model(x.chunk(2)[dist.get_rank()]).square().mean().backward()
        with Sent() as counter:
            optimizer.step()
        optimizer.zero_grad()
        found.append(counter.calls)
    return found


SENT = {  # without staggering, bases are due at steps 0 and 5
    "right": (Rule(Adam(), SVD(2, "right"), Refresh(5, stagger=False)), None),
    "right, clipped": (Rule(Adam(), SVD(2, "right"), Refresh(5, stagger=False)), 1.0),
    "left": (Rule(Adam(), SVD(2, "left"), Refresh(5, stagger=False)), None),
    "adamw": (Rule(Adam()), None),
    "adafactor": (Rule(Adafactor()), None),
    "orthogonal": (Rule(Orthogonal()), None),
    "fira": (Rule(Adam(), SVD(2, "right"), Refresh(5, stagger=False), residual=Rescaled(),
                  limiter=NormGrowth()), None),
    "dct": (Rule(Adam(), Selected(2, "right"), Refresh(1, "rotate")), None),
}  # fmt: skip


def or_refused(run, *args):
    """What a training returns, or the sentence with which it was refused."""
    try:
        return run(*args)
    except UsageError as error:
        return str(error)


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
    storage.SMALLEST = 1  # else nothing here would be stored in 8 bits
    resumed = ("fira", "dct, 8 bits", "q-galore", "galore, adafactor", "galore, adam8bit")
    runs = {
        "fsdp2": {rule: or_refused(fsdp2, rule, False, 10) for rule in RULES},
        "fsdp2, resumed": {
            rule: fsdp2(rule, False, 5) for rule in (*resumed, "lora-pro", "trion", "lisa")
        },
        "fsdp2, layer by layer": {
            rule: fsdp2(rule, True, 5) for rule in ("galore", "left", "both")
        },
        "ddp": {rule: ddp(rule, False) for rule in ("both", "altlora, alternate", *registered())},
        "ddp, layer by layer": {rule: ddp(rule, True) for rule in ("galore", "both")},
        "sent": {name: sent(*wanted) for name, wanted in SENT.items()},
    }
    torch.save(runs, f"{sys.argv[1]}.{os.environ['RANK']}")
    dist.destroy_process_group()
