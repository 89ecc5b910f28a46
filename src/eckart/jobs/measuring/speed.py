"""How fast this machine is at a model's own kind of layer, measured in a few seconds.

One layer of the same width, with its share of the vocabulary, runs forward and backward on
random weights, several times: operations over seconds is the rate that a job of the same shape
may expect. A step of the update rule on one matrix adds what each trained element costs.

The interval goes from the fastest pass to 1.75 times the slowest, for what is not measured: a
method's own work on matrices, reading data, writing a line, and whatever else the machine does
meanwhile. Evaluation and checkpoints are in neither end. How often the truth lies
inside is in docs/estimate.md, and held by tests/jobs/test_speed.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from eckart.io.presets import quiet, task_class
from eckart.jobs.measuring.imagined import ON_CPU, batch
from eckart.jobs.measuring.shallow import cut
from eckart.optim import LowRankOptimizer, Rule

SECONDS = 2.0  # of measuring, after a pass that warms up
PASSES = (3, 20)  # at least and at most
TOKENS = (32, 512)  # of a pass: those that warm up, and the most
VOCABULARY = 256  # at least
WIDEST = 1024  # of the matrix that the optimizer moves
PAIRS = 8  # of factors in its place: more than one, since pairs of a rank move together
HELD = "(20 of 22 small trainings on a CPU were inside; large ones and GPUs were not tried)"
UNSEEN = 1.75  # times the slowest pass: twenty of twenty-two trainings were within it


@dataclass(frozen=True)
class Speed:
    """Floating-point operations per second: the median pass, the slowest and the fastest."""

    typical: float
    slow: float
    fast: float
    of: str  # what was run
    moving: float = 0.0  # seconds that a step of the optimizer takes for each trained element

    def seconds(self, operations: float, trained: int = 0) -> tuple[float, float, float]:
        """A step of so many operations and trained elements: typically, and between what."""
        step = self.moving * trained
        slowest = UNSEEN * (operations / self.slow + step)
        return operations / self.typical + step, operations / self.fast + step, slowest


@quiet()
def measured(
    config: Any,
    dtype: torch.dtype,
    place: torch.device,
    rows: int,
    length: int,
    rule: Rule | None = None,
    rank: int | None = None,
) -> Speed:
    """The speed of one layer of this configuration on a batch of this shape, or less of it.

    A configuration that cannot be cut to one layer is measured by a product of its width.
    """
    layer = one_layer(config, dtype, place)
    if layer is None:
        return by_product(config, dtype, place, min(rows * length, TOKENS[1]))

    def passing(rows: int, length: int) -> Callable[[], None]:
        inputs = {key: tensor.to(place) for key, tensor in batch(rows, length).items()}

        def once() -> None:
            layer(**inputs)["loss"].backward()
            layer.zero_grad()

        return once

    few = min(TOKENS[0], length)
    warm = passing(1, few)
    warm()
    rows, length = shape_within(rows, length, few, took(warm, place))
    found = timed(passing(rows, length), place, f"one layer on {rows} x {length} tokens")
    return replace(found, moving=moving(config, place, rule, rank))


def shape_within(rows: int, length: int, few: int, seconds: float) -> tuple[int, int]:
    """Rows and tokens of which enough passes end in time, where `few` tokens take `seconds`."""
    most = int(few * max(1.0, SECONDS / (PASSES[0] * seconds)))
    most = min(TOKENS[1], most)
    length = min(length, most)
    return max(1, min(rows, most // length)), length


def moving(
    config: Any, place: torch.device, rule: Rule | None = None, rank: int | None = None
) -> float:
    """Seconds of a step with clipping, for each element of a square matrix; AdamW's without a rule.

    A rule for factor pairs moves pairs of this rank. A step that renews a basis is left out
    where others do not. Of blocks that take turns the matrix is in the one that trains.
    """
    width = min(int(getattr(config, "hidden_size", None) or WIDEST), WIDEST)
    shapes = [(width, width)]
    if rank is not None and rule is not None and rule.pair is not None:
        shapes = [(width, rank), (rank, width)] * PAIRS
    generator = torch.Generator().manual_seed(0)
    tensors: list[nn.Parameter] = []
    for shape in shapes:
        tensors.append(nn.Parameter(torch.randn(shape, generator=generator).to(place)))
        tensors[-1].grad = torch.randn(shape, generator=generator).to(place)
    pairs = [(f"0.{i}", f"0.{i + 1}", 1.0) for i in range(0, len(tensors) - 1, 2)]
    group = {"params": tensors, "pairs": pairs}
    optimizer = LowRankOptimizer([group], rule=rule and replace(rule, blocks=None), clip=1.0)
    optimizer.step()
    seconds = median(took(optimizer.step, place) for _ in range(PASSES[0]))
    return seconds / sum(tensor.numel() for tensor in tensors)


def one_layer(config: Any, dtype: torch.dtype, place: torch.device) -> nn.Module | None:
    """One layer of the configuration's model, with its share of the words; None if it has none."""
    small = cut(config, 1)
    layers = int(getattr(config, "num_hidden_layers", None) or 1)
    small.vocab_size = max(VOCABULARY, int(getattr(config, "vocab_size", 0) or 0) // layers)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if hasattr(small, name):
            setattr(small, name, None)
    try:
        with place, quiet():
            model: nn.Module = task_class("causal").from_config(small, dtype=dtype)
    except (ValueError, TypeError, IndexError, KeyError, AssertionError, AttributeError):
        return None  # said in `of`: another way of measuring was taken
    return model.train()


def by_product(config: Any, dtype: torch.dtype, place: torch.device, tokens: int) -> Speed:
    """The speed of a product [tokens, d] by [d, d]."""
    d = int(getattr(config, "hidden_size", None) or 1024)
    x, W = (torch.randn(size, d, dtype=dtype, device=place) for size in (tokens, d))
    return timed(lambda: x @ W, place, f"a product of width {d}")


def timed(once: Callable[[], Any], place: torch.device, of: str) -> Speed:
    """Run it until the time is up."""
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
        once()
    operations = counter.get_total_flops()
    rates: list[float] = []
    begun = time.perf_counter()
    while len(rates) < PASSES[0] or (
        len(rates) < PASSES[1] and time.perf_counter() - begun < SECONDS
    ):
        rates.append(operations / took(once, place))
    rates.sort()
    return Speed(rates[len(rates) // 2], rates[0], rates[-1], of)


def digits(seconds: float) -> str:
    """0.17, 4.2, or 1,580."""
    return f"{seconds:.2g}" if seconds < 10 else f"{seconds:,.0f}"


def took(once: Callable[[], Any], place: torch.device) -> float:
    """Seconds of doing it, on a device until it has done it."""
    start = time.perf_counter()
    once()
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    return time.perf_counter() - start
