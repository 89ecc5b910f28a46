"""Measures this machine's speed on one layer of a model in a few seconds, to predict step times.

One layer of the same width, with its share of the vocabulary, runs forward and backward on
random weights several times, which gives operations per second. A step of the update rule on
one matrix gives the optimizer's seconds per trained element.

The predicted interval goes from the fastest pass to 1.75 times the slowest, to allow for what is
not measured: a method's own work on matrices, reading data, logging, and other load on the
machine. It includes neither evaluation nor checkpoints. How often the true time lies inside is
in docs/estimate.md and tested by tests/jobs/test_speed.py.
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

SECONDS = 2.0  # of measuring, after a warm-up pass
PASSES = (3, 20)  # the fewest and the most
TOKENS = (32, 512)  # of the warm-up pass, and the most of any pass
VOCABULARY = 256  # tokens at least
WIDEST = 1024  # largest width of the matrix on which the optimizer is timed
PAIRS = 8  # factor pairs in its place; several, since pairs of one rank are updated in a batch
HELD = "(20 of 22 small trainings on a CPU were inside; large ones and GPUs were not tried)"
UNSEEN = 1.75  # upper end over the slowest pass: 20 of 22 trainings were within it


@dataclass(frozen=True)
class Speed:
    """Floating-point operations per second of the median, the slowest and the fastest pass."""

    typical: float
    slow: float
    fast: float
    of: str  # what was run, in words
    moving: float = 0.0  # seconds of an optimizer step per trained element

    def seconds(self, operations: float, trained: int = 0) -> tuple[float, float, float]:
        """Seconds of a step with so many operations and trained elements: (typical, low, high)."""
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
    """The speed of one layer of this configuration on `rows` x `length` tokens, or fewer.

    A configuration that cannot be cut to one layer is measured by a matrix product of its width.
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
    rows, length = shape_within(rows, length, few, elapsed(warm, place))
    found = timed(passing(rows, length), place, f"one layer on {rows} x {length} tokens")
    return replace(found, moving=moving(config, place, rule, rank))


def shape_within(rows: int, length: int, few: int, seconds: float) -> tuple[int, int]:
    """The largest (rows, length) of which PASSES[0] passes fit into SECONDS.

    `few` tokens take `seconds`.
    """
    most = int(few * max(1.0, SECONDS / (PASSES[0] * seconds)))
    most = min(TOKENS[1], most)
    length = min(length, most)
    return max(1, min(rows, most // length)), length


def moving(
    config: Any, place: torch.device, rule: Rule | None = None, rank: int | None = None
) -> float:
    """Seconds per element of an optimizer step with clipping on a square matrix.

    AdamW where no rule is given; a rule for factor pairs is timed on pairs of this rank. Steps
    that refresh a basis are left out, unless all do. Block-wise rules have one active block.
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
    seconds = median(elapsed(optimizer.step, place) for _ in range(PASSES[0]))
    return seconds / sum(tensor.numel() for tensor in tensors)


def one_layer(config: Any, dtype: torch.dtype, place: torch.device) -> nn.Module | None:
    """A one-layer model with its share of the vocabulary; None where it cannot be built."""
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
        return None  # the caller measures a product instead, and says so in `of`
    return model.train()


def by_product(config: Any, dtype: torch.dtype, place: torch.device, tokens: int) -> Speed:
    """The speed of a matrix product [tokens, d] by [d, d]."""
    d = int(getattr(config, "hidden_size", None) or 1024)
    x, W = (torch.randn(size, d, dtype=dtype, device=place) for size in (tokens, d))
    return timed(lambda: x @ W, place, f"a product of width {d}")


def timed(once: Callable[[], Any], place: torch.device, of: str) -> Speed:
    """Time `once` repeatedly, within the limits of PASSES and SECONDS."""
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
        once()
    operations = counter.get_total_flops()
    rates: list[float] = []
    begun = time.perf_counter()
    while len(rates) < PASSES[0] or (
        len(rates) < PASSES[1] and time.perf_counter() - begun < SECONDS
    ):
        rates.append(operations / elapsed(once, place))
    rates.sort()
    return Speed(rates[len(rates) // 2], rates[0], rates[-1], of)


def digits(seconds: float) -> str:
    """Seconds at two significant digits: 0.17, 4.2 or 1,580."""
    return f"{seconds:.2g}" if seconds < 10 else f"{seconds:,.0f}"


def elapsed(once: Callable[[], Any], place: torch.device) -> float:
    """Seconds of one call, including a wait for the device."""
    start = time.perf_counter()
    once()
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    return time.perf_counter() - start
