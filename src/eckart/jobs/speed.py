"""How fast this machine is at a model's own kind of layer, measured in a second or two.

One layer of the same width runs forward and backward on random weights with a short
vocabulary, several times. Operations over seconds is the rate that a job of the same shape
may expect; the fastest and the slowest pass give the interval. What a layer does not show is
in neither end: reading data, evaluation, checkpoints and the optimizer's step.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from eckart.io.presets import quiet, task_class
from eckart.jobs.imagined import ON_CPU, batch

SECONDS = 1.5  # of measuring, after a pass that warms up
PASSES = (3, 20)  # at least and at most
TOKENS = 512  # of a pass at most
VOCABULARY = 256
LENGTHS = ("layer_types", "mlp_layer_types", "layers_block_type")  # lists with an entry a layer


@dataclass(frozen=True)
class Speed:
    """Floating-point operations per second: the median pass, the slowest and the fastest."""

    typical: float
    slow: float
    fast: float
    of: str  # what was run

    def seconds(self, operations: float) -> tuple[float, float, float]:
        """What so many operations take: typically, at the fastest, at the slowest."""
        return operations / self.typical, operations / self.fast, operations / self.slow


def measured(config: Any, dtype: torch.dtype, place: torch.device, rows: int, length: int) -> Speed:
    """The speed of one layer of this configuration on a batch of this shape, or less of it.

    A configuration that cannot be cut to one layer is measured by a product of its width.
    """
    length = min(length, TOKENS)
    rows = max(1, min(rows, TOKENS // length))
    layer = one_layer(config, dtype, place)
    if layer is None:
        return by_product(config, dtype, place, rows * length)
    inputs = {key: tensor.to(place) for key, tensor in batch(rows, length).items()}

    def once() -> None:
        layer(**inputs)["loss"].backward()
        layer.zero_grad()

    return timed(once, place, f"one layer on {rows} x {length} tokens")


def one_layer(config: Any, dtype: torch.dtype, place: torch.device) -> nn.Module | None:
    """The configuration's model with one layer and few words; None where that is no model."""
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.vocab_size = 1, VOCABULARY
    for name in LENGTHS:
        if getattr(small, name, None):
            setattr(small, name, getattr(small, name)[:1])
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
        start = time.perf_counter()
        once()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        rates.append(operations / (time.perf_counter() - start))
    rates.sort()
    return Speed(rates[len(rates) // 2], rates[0], rates[-1], of)
