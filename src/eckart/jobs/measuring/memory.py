"""Bytes of tensors by category, before a run and while it runs.

    weights      parameters and buffers of the model, terms apart
    factors      the terms' tensors
    gradients    one for each trained tensor
    state        the optimizer's, from its rules
    activations  what autograd keeps for the backward pass of one batch

Figures are tensor bytes, not the process's size, which depends on allocators.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eckart.errors import UsageError
from eckart.jobs.measuring.devices import model_device
from eckart.linear.sites import quantised
from eckart.recipe import Handle, Weights


def model_bytes(handle: Handle) -> dict[str, int]:
    """Weights, factors and a teacher as they are now; shared storage is counted once."""
    own = {id(t) for by_name in handle.parts().values() for p in by_name.values() for t in held(p)}
    own |= {id(t) for module in handle.shared.values() for t in held(module)}
    counted = {id(t): t for t in held(handle.model)}
    factors = sum(size(t) for key, t in counted.items() if key in own)
    parts = {"weights": sum(size(t) for t in counted.values()) - factors, "factors": factors}
    if handle.teacher is not None:
        parts["teacher"] = sum(size(t) for t in held(handle.teacher))
    return parts


def parameter_count(model: nn.Module, handle: Handle | None = None) -> int:
    """Parameters of a model; an adapter's own, beside a frozen base, are not among them."""
    adapter = handle.carried() if handle and handle.weights.base == "frozen" else {}
    added = {id(p) for part in adapter.values() for p in part.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in added)


def held(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers of a module."""
    return [*module.parameters(), *module.buffers()]


def size(tensor: Tensor) -> int:
    """Bytes of its elements; of the parts that it is made of where it is quantised."""
    if quantised(tensor) and hasattr(tensor, "__tensor_flatten__"):
        return sum(
            size(part)
            for name in tensor.__tensor_flatten__()[0]
            if (part := getattr(tensor, name)) is not None
        )
    return tensor.numel() * tensor.element_size()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of state that the optimizer's rules will hold once every parameter has moved.

    Of blocks that take turns only those of now count, where the others' moments end.
    """
    named = {
        name: (p, group)
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }
    total = 0
    paired: set[str] = set()
    for group in optimizer.param_groups:
        for b, a, _ in group["pairs"]:
            rule = named[b][1]["rule"]
            if rule.pair is not None:
                made = rule.pair.init(shape_of(named[b][0]), shape_of(named[a][0]), rule.inner)
                total += sum(size(t) for state in made for t in state.values())
                paired |= {b, a}
    for name, (p, group) in named.items():
        rule = group["rule"].on(p.shape, group["leading"])
        rests = not p.requires_grad and rule.blocks is not None and rule.blocks.moments != "keep"
        if name in paired or rests:
            continue
        if rule.pair is not None:  # a factor without its partner
            entry = rule.inner.init(shape_of(p))
        else:
            entry = rule.start(shape_of(p), group["leading"])
        total += sum(size(t) for t in entry.values() if isinstance(t, Tensor))
    return total


def shape_of(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and dtype that takes no memory."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def held_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of state that the optimizer holds now."""
    entries = optimizer.state.values()
    return sum(size(t) for entry in entries for t in entry.values() if isinstance(t, Tensor))


class Kept:
    """Counts the bytes that autograd keeps inside `count()`, parameters left out."""

    def __init__(self, model: nn.Module):
        self.ours = {t.untyped_storage()._cdata for t in held(model)}
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def bytes(self) -> int:
        """Bytes of the distinct storages that still live: ask before the graph is gone."""
        return sum(count for alive, count in self.storages.values() if not alive.expired())

    @contextmanager
    def count(self) -> Any:
        """Count what is kept for a backward pass in this block."""

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.ours:  # a weak reference keeps the address from reuse
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            return tensor.detach()  # a node that holds its own result would never go

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield


class Live(TorchDispatchMode):
    """Inside the block: the most bytes of distinct storages, made there, alive at once.

    Works on fake tensors too. What was there before does not count, nor do a kernel's own
    buffers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.living: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.living.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.living = {k: v for k, v in self.living.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(count for _, count in self.living.values()))
        return out


def activation_bytes(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Bytes kept for the backward pass of one batch; a forward pass that leaves no trace."""
    kept, was_training = Kept(model), model.training
    model.train()
    devices = [model_device(model)] if model_device(model).type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), kept.count():
            outputs = model(**batch)  # holds the graph, and so what is kept
        found = kept.bytes
        del outputs
    finally:
        model.train(was_training)
    return found


def autocasts(precision: Any, weights: Weights) -> bool:
    """Whether products run in bf16 autocast while the weights, which are trained, stay in fp32."""
    return getattr(precision, "dtype", "") == "bfloat16" and weights.trains_the_model


@contextmanager
def autocast(model: Any, enabled: bool) -> Iterator[None]:
    """Run the model's forward passes in this block under bf16 autocast, as Trainer does.

    Each pass has its own autocast, so that weights cast to bf16 live no longer than in a training.
    """
    if not enabled:
        yield
        return
    own = vars(model).get("forward")
    context = torch.autocast(model_device(model).type, torch.bfloat16)
    model.forward = convert_outputs_to_fp32(context(model.forward))
    try:
        yield
    finally:
        del model.forward
        if own is not None:  # of an earlier training
            model.forward = own


class Line(NamedTuple):
    """Bytes that a batch keeps: whatever its size (factors that a pass makes), and for each row."""

    fixed: int
    per_row: int

    def of(self, rows: int) -> int:
        return self.fixed + rows * self.per_row

    def rows_within(self, space: float) -> int:
        """How many rows fit."""
        return max(0, int((space - self.fixed) // max(1, self.per_row)))


def line(measure: Callable[[int], int]) -> Line:
    """The line through the bytes of one row and of two."""
    one, two = measure(1), measure(2)
    return Line(2 * one - two, two - one)


def room(device: torch.device) -> tuple[int, int]:
    """Free and total bytes of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    import psutil  # type: ignore[import-untyped]

    memory = psutil.virtual_memory()
    return memory.available, memory.total


def described(parts: Mapping[str, int], total: int) -> str:
    """`1.25 GB of 16 GB: weights 270 MB, factors 8.1 MB, ...`."""
    listed = ", ".join(f"{name} {in_words(part)}" for name, part in parts.items() if part)
    return f"{in_words(sum(parts.values()))} of {in_words(total)}: {listed}"


def by_category(memory: Mapping[str, Mapping[str, int]]) -> str:
    """`weights 78.5 of 78.5 MB, ... estimated`; a GPU's allocator tells no categories apart."""
    estimated, measured = memory["estimated"], memory["measured"]
    known = [key for key in estimated if key in measured and (estimated[key] or measured[key])]
    if not known:
        known = ["all"]
        estimated, measured = ({"all": sum(m.values())} for m in (estimated, measured))
    parts = []
    for key in known:
        scale, name = unit(max(estimated[key], measured[key]))
        parts.append(f"{key} {measured[key] / scale:.3g} of {estimated[key] / scale:.3g} {name}")
    return f"{', '.join(parts)} estimated"


def in_bytes(text: str) -> int:
    """24GB, 500 MB or 1e9 as a number of bytes. UsageError for anything else."""
    match = re.fullmatch(r"([\d.]+(?:e\d+)?)\s*([kmgt]?)i?b?", text.strip().lower())
    if match is None or not float(match[1]) > 0:
        raise UsageError(f"cannot read {text} as a size", fix="Type for example 24GB or 800MB.")
    if not match[2] and float(match[1]) < 1000:  # nobody means 24 bytes
        raise UsageError(f"{text} has no unit", fix=f"Type {match[1]}GB or {match[1]}MB.")
    return int(float(match[1]) * 1000 ** " kmgt".index(match[2] or " "))


def in_words(count: int) -> str:
    """1.15 GB, or 37.9 MB."""
    scale, name = unit(count)
    return f"{count / scale:.3g} {name}"


def unit(count: int) -> tuple[float, str]:
    return (1e9, "GB") if count >= 1e9 else (1e6, "MB")
