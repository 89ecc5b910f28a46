"""Functions that test_sharded.py runs in two processes."""

import dataclasses
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

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
    Iteration,
    Leading,
    LowRankOptimizer,
    Momentum,
    NormGrowth,
    Orthogonal,
    Packed,
    Randomised,
    Refresh,
    Rescaled,
    Rule,
    Selected,
    storage,
)
from eckart.optim.sharded import whole
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
    """Every update method with its defaults, except for sizes that fit small matrices."""
    found = {}
    for slug, entry in registry.methods().items():
        if entry.axis == "update":
            small = {k: v for k, v in {"rank": 2, "every": 3}.items() if k in entry.fields}
            found[f"eckart methods {slug}"] = registry.load(slug)(**small)
    return found


RULES |= {name: update.rule() for name, update in registered().items()}
VECTORS |= {name: update.plain() for name, update in registered().items()}


UNEVEN = ((6, 5), (5, 9), (9, 7), (7, 1))
TALL = ((4, 5), (5, 9), (9, 11), (11, 11))  # all are projected on the right
THIN = ((6, 30), (30, 7))  # of an exact left basis these send less than themselves
BROAD = ((6, 299), (299, 200), (200, 101))  # two on the left, too large to be mistaken


def network(seed=0, sizes=UNEVEN):
    """A network with uneven shards: the second process has fewer of 5, 9, 7 rows, of 1 none."""
    torch.manual_seed(seed)
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
    """An optimizer for the network. Pair rules use its weights [9, 5] and [5, 6] as B, A."""
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


def fsdp2(rule, layerwise, stop=10):
    """Train under fully_shard; after `stop` steps save by name and resume with a new optimizer."""
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


class Experts(nn.Module):
    """Three experts: of two processes the second has one."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(3, 8, 6, generator=g, dtype=torch.float64))
        self.down = nn.Parameter(torch.randn(3, 6, 8, generator=g, dtype=torch.float64))

    def forward(self, x):
        return (x @ self.up.mT).tanh() @ self.down.mT


class Convolutions(nn.Module):
    """Rows are outputs in torch's and inputs in transformers' (GPT-2); neither 13 nor 7 divide by
    two. As matrices they are 13 x 3, 7 x 52 and 7 x 9."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.line, self.plane, self.last = nn.Conv1d(1, 13, 3), nn.Conv2d(13, 7, 2), Conv1D(9, 7)
        self.to(torch.float64)

    def forward(self, x):
        lines = self.line(x.unsqueeze(1)).tanh()  # [*, 13, 4]
        return self.last(self.plane(lines.unflatten(-1, (2, 2))).tanh().flatten(1))


def of_layers(kind, rule, sharded, steps=10):
    """Steps of fused experts, which fully_shard splits by experts, or of convolutions:
    weights, norms, state, and the most elements that a collective of a step had."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, norms, most = kind(), [], 0
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    matrices = [(name, p) for name, p in model.named_parameters() if p.dim() > 1]
    group = {"params": matrices, "leading": int(kind is Experts)}
    optimizer = LowRankOptimizer([group], 0.02, rule=RULES[rule], clip=0.5)
    for x in data(steps):
        (10 * model(x.chunk(2)[dist.get_rank()] if sharded else x) ** 2).mean().backward()
        with Sent() as counter:
            optimizer.step()
        most = max([most, *(size for _, size in counter.calls)])
        optimizer.zero_grad()
        norms.append(float(optimizer.grad_norm))
    weights = [whole(p.detach()) for _, p in matrices]
    return weights, norms, optimizer.named_state_dict(), most


def holding(weights):
    """The network with these weights."""
    model = network()
    model.load_state_dict(weights)
    return model


def crossed(rule):
    """Three steps by one process, four by two under fully_shard, three by one: weights and
    state are passed on by name."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    batches, norms = data(10), []
    weights, saved = network().state_dict(), None
    for steps, sharded in ((slice(0, 3), False), (slice(3, 7), True), (slice(7, 10), False)):
        model = holding(weights)
        if sharded:
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        optimizer = optimizer_of(model, rule, penalised=True)
        if saved is not None:
            optimizer.load_named_state_dict(saved)
        share = [x.chunk(2)[dist.get_rank()] if sharded else x for x in batches[steps]]
        norms += train(model, optimizer, share)
        saved = optimizer.named_state_dict()
        weights = {name: whole(p.detach()) for name, p in model.named_parameters()}
    return list(weights.values()), norms, saved


def given(step):
    """Gradients of `rounded` in bf16; of the first weight all are 1."""
    g = torch.Generator().manual_seed(step)
    shapes = {"0.weight": (8, 6), "0.bias": (8,), "1.weight": (7, 8), "1.bias": (7,)}
    found = {name: torch.randn(shape, generator=g).bfloat16() for name, shape in shapes.items()}
    return found | {"0.weight": torch.ones(8, 6).bfloat16()}


def rounded(stop):
    """bf16 weights under fully_shard, rounded stochastically, with moments in fp32 and given
    gradients: the weights at the start (the first is all 1) and after each step, and the state."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 7)).bfloat16()
    nn.init.ones_(model[0].weight)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model, mesh=mesh)
    rule = Rule(Adam(state_dtype="float32"), rounding="stochastic")
    optimizer, path = LowRankOptimizer(model.named_parameters(), ROUNDED_LR, rule=rule), []
    for step in range(10):
        path.append({name: whole(p.detach()).clone() for name, p in model.named_parameters()})
        if step == stop:
            saved = optimizer.named_state_dict()
            optimizer = LowRankOptimizer(model.named_parameters(), ROUNDED_LR, rule=rule)
            optimizer.load_named_state_dict(saved)
        for name, p in model.named_parameters():
            p.grad = distribute_tensor(given(step)[name], mesh, p.placements)
        optimizer.step()
    path.append({name: whole(p.detach()).clone() for name, p in model.named_parameters()})
    return path, optimizer.named_state_dict()


ROUNDED_LR = 1e-3


class Sent(TorchDispatchMode):
    """Records (name, elements) of each collective; for an all-to-all, in which each of two
    processes sends half of what it has, the elements of that half."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        bookkeeping = "wait" in func.__name__ or "wrap" in func.__name__
        if func.namespace in ("c10d", "_c10d_functional") and not bookkeeping:
            flat = torch.utils._pytree.tree_leaves(args)
            name = func.__name__.split(".")[0]
            sizes = [t.numel() for t in flat if isinstance(t, torch.Tensor)]
            halved = name == "alltoall_base_"  # what comes, then what goes
            self.calls.append((name, sizes[1] // 2 if halved else sum(sizes)))
        return func(*args, **(kwargs or {}))


def sent(rule, clip, sizes=UNEVEN):
    """The collectives of each of ten steps of a sharded model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network(sizes=sizes)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    matrices = [(name, p) for name, p in model.named_parameters() if p.dim() > 1]
    optimizer = LowRankOptimizer(matrices[sizes == BROAD :], 0.02, rule=rule, clip=clip)
    found = []
    for x in data(10):
        model(x.chunk(2)[dist.get_rank()][:, : sizes[0][0]]).square().mean().backward()
        with Sent() as counter:
            optimizer.step()
        optimizer.zero_grad()
        found.append(counter.calls)
    return found


RARE = Refresh(5, stagger=False)
SENT = {  # without staggering, bases are due at steps 0 and 5
    "right": (Rule(Adam(), SVD(2, "right"), RARE), None),
    "right, 4 bits": (Rule(Adam(), Packed(SVD(2, "right")), RARE), None),
    "right, randomised": (Rule(Adam(), Randomised(2, "right", oversample=1), RARE), None),
    "right, wide": (Rule(Adam(), Leading(2, "right", wide=1), RARE), None),
    "right, iteration": (Rule(Adam(), Iteration(2, "right"), RARE), None),
    "right, clipped": (Rule(Adam(), SVD(2, "right"), RARE), 1.0),
    "left": (Rule(Adam(), SVD(2, "left"), RARE), None),
    "left, thin": (Rule(Adam(), SVD(2, "left"), RARE), None, THIN),
    "adamw": (Rule(Adam()), None),
    "adafactor": (Rule(Adafactor()), None),
    "orthogonal": (Rule(Orthogonal()), None),
    "fira": (Rule(Adam(), SVD(2, "right"), RARE, residual=Rescaled(),
                  limiter=NormGrowth()), None),
    "dct": (Rule(Adam(), Selected(2, "right"), Refresh(1, "rotate")), None),
}  # fmt: skip


def projecting():
    """The registered rules that project, with refreshes at the first and every third step after."""
    rules = {slug: update.rule() for slug, update in registered().items()}
    found = {slug: rule for slug, rule in rules.items() if rule.projector.names}
    return {
        slug: dataclasses.replace(
            rule,
            refresh=dataclasses.replace(rule.refresh, stagger=False),
            projector=as_if_large(rule.projector),
        )
        for slug, rule in found.items()
    }


def as_if_large(projector):
    """The projector with thresholds that make it treat small matrices like large ones."""
    return dataclasses.replace(projector, wide=1) if isinstance(projector, Leading) else projector


def reduced(layerwise):
    """What each of ten steps of a replicated model sends: elements by DDP's reducer, and the
    collectives of the optimizer, whose bases are due at steps 0 and 5."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel as DDP

    model, by_reducer = network(sizes=TALL), []
    rule = Rule(Adam(), SVD(2), RARE)
    optimizer = LowRankOptimizer(model.named_parameters(), 0.02, rule=rule)
    if layerwise:
        optimizer.attach_layerwise(average_over=dist.group.WORLD)
        DDP._set_params_and_buffers_to_ignore_for_model(model, optimizer.layerwise_names)
    wrapped = DDP(model)

    def counted(state, bucket):
        by_reducer[-1] += bucket.buffer().numel()
        return allreduce_hook(None, bucket)

    wrapped.register_comm_hook(None, counted)
    by_optimizer = []
    for x in data(10):
        by_reducer.append(0)
        wrapped(x.chunk(2)[dist.get_rank()][:, : TALL[0][0]]).square().mean().backward()
        with Sent() as counter:
            optimizer.step()
        optimizer.zero_grad()
        by_optimizer.append(counter.calls)
    return by_reducer, by_optimizer, [p.detach() for p in model.parameters()]


def or_refused(run, *args):
    """The result of a training, or the message of the error that it raised."""
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
    optimizer.load_named_state_dict({})  # as a training does before it is wrapped
    wrapped = DDP(model, find_unused_parameters=RULES[rule].idles)
    batches = [x.chunk(2)[dist.get_rank()] for x in data(10)]
    norms = train(wrapped, optimizer, batches, accumulate=2)
    return [p.detach() for p in model.parameters()], norms, optimizer.named_state_dict()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    storage.SMALLEST = 1  # else nothing here would be stored in 8 bits
    crossing = (
        "fira", "dct, 8 bits", "q-galore", "galore, adafactor", "galore, adam8bit", "lora-pro",
        "trion", "lisa", "altlora, alternate", *registered(),
    )  # fmt: skip
    matrices = [name for name, rule in RULES.items() if not (rule.pair or rule.blocks)]
    runs = {
        "fsdp2": {rule: or_refused(fsdp2, rule, False) for rule in RULES},
        "one, fsdp2, one": {rule: or_refused(crossed, rule) for rule in crossing},
        "fsdp2, layer by layer": {
            rule: fsdp2(rule, True, 5) for rule in ("galore", "left", "both")
        },
        "ddp": {rule: ddp(rule, False) for rule in ("both", "altlora, alternate", *registered())},
        "ddp, layer by layer": {rule: ddp(rule, True) for rule in ("galore", "both")},
        "experts": {rule: of_layers(Experts, rule, True) for rule in matrices},
        "convolutions": {
            rule: of_layers(Convolutions, rule, True, 5)
            for rule in matrices
            if not RULES[rule].projector.identity
        },
        "sent": {name: sent(*wanted) for name, wanted in SENT.items()},
        "sent by rules": {
            slug: [or_refused(sent, rule, None, sizes) for sizes in (TALL, BROAD)]
            for slug, rule in projecting().items()
        },
        "sent under ddp": {layerwise: reduced(layerwise) for layerwise in (False, True)},
        "rounded by chance": {stop: rounded(stop) for stop in (5, 10)},
    }
    torch.save(runs, f"{sys.argv[1]}.{os.environ['RANK']}")
    dist.destroy_process_group()
