"""Sizes of a deep model from shallow ones: a stack of like layers grows by the same each time.

To imagine thirty-two layers takes as long as there are layers, and `--fit` asks about two
dozen recipes. So a recipe is imagined with one layer, with two and with three. Where its sizes
grow by equal steps they lie on a line, and the line is exact; where they do not (blocks that
take turns, layers that differ), the whole model is imagined.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from eckart.io.presets import quiet
from eckart.io.tasks import task_class
from eckart.jobs.measuring.imagined import Imagined, imagine
from eckart.recipe import Recipe

LENGTHS = ("layer_types", "mlp_layer_types", "layers_block_type")  # lists with an entry a layer
FEWEST = 7  # layers from which on shallow models are less work than the whole
PLACE = re.compile(r"^(.*?\.)(\d+)(\..*)$")  # of a tensor: its stack, its layer, the rest


@dataclass(frozen=True)
class Sizes:
    """What `Imagined` says of sizes: of the whole model, or of one layer and two of so many."""

    models: Sequence[Imagined]
    layers: int = 1

    @property
    def fixed(self) -> dict[str, int]:
        parts = [model.fixed for model in self.models]
        return {name: self.along([part[name] for part in parts]) for name in parts[0]}

    @property
    def parameters(self) -> int:
        return self.along([model.parameters for model in self.models])

    @property
    def trainable(self) -> int:
        return self.along([model.trainable for model in self.models])

    def activations(self, rows: int, length: int, checkpointing: bool = False) -> int:
        """Bytes that autograd keeps for a batch of rows of this length."""
        return self.along([m.activations(rows, length, checkpointing) for m in self.models])

    def flops(self, rows: int, length: int) -> tuple[int, int]:
        """Floating-point operations of a forward pass, and of the backward pass after it."""
        passes = [model.flops(rows, length) for model in self.models]
        forward, backward = (self.along(counts) for counts in zip(*passes, strict=True))
        return forward, backward

    def along(self, sizes: Sequence[int]) -> int:
        """The size at all layers, from those at one and at two."""
        return sizes[0] + (self.layers - 1) * (sizes[-1] - sizes[0])


def sized(
    config: Any,
    recipe: Recipe,
    dtype: torch.dtype,
    device: torch.device,
    stacked: bool,
    task: str = "causal",
    packed: bool = False,
) -> Sizes:
    """The sizes of a recipe; `stacked` says that all layers are alike, see `alike`."""

    def imagined(config: Any) -> Imagined:
        return imagine(config, recipe, dtype, device, task=task, packed=packed)

    in_turn = recipe.update is not None and recipe.update.rule().blocks is not None
    if stacked and not in_turn:
        one, two, three = (imagined(cut(config, n)) for n in (1, 2, 3))
        if grows(one, two, three):
            return Sizes((one, two), int(config.num_hidden_layers))
    return Sizes((imagined(config),))


def grows(one: Imagined, two: Imagined, three: Imagined) -> bool:
    """Does the third layer add what the second did?"""
    a, b, c = ([*m.fixed.values(), m.parameters, m.trainable] for m in (one, two, three))
    return all(z - y == y - x for x, y, z in zip(a, b, c, strict=True))


def cut(config: Any, layers: int) -> Any:
    """The configuration with the first so many layers."""
    small = copy.deepcopy(config)
    small.num_hidden_layers = layers
    for name in LENGTHS:
        if getattr(small, name, None):
            setattr(small, name, getattr(small, name)[:layers])
    return small


def alike(config: Any, task: str = "causal") -> bool:
    """Is the model one stack of many layers that hold the same tensors and are of one kind?"""
    count = getattr(config, "num_hidden_layers", None) or 0
    kinds = [set(getattr(config, name, None) or ()) for name in LENGTHS]
    if count < FEWEST or any(len(kind) > 1 for kind in kinds):
        return False
    stacks: dict[str, dict[str, list[Any]]] = {}
    for name, tensor in unattached(config, task).named_parameters():
        if found := PLACE.match(name):
            stack, layer, rest = found.groups()
            stacks.setdefault(stack, {}).setdefault(layer, []).append((rest, tensor.shape))
    layers = [layer for stack in stacks.values() for layer in stack.values()]
    return len(stacks) == 1 and len(layers) == count and all(a == layers[0] for a in layers)


def unattached(config: Any, task: str) -> nn.Module:
    """The model of a configuration, without memory and without a recipe."""
    with FakeTensorMode(allow_non_fake_inputs=True), quiet():
        model: nn.Module = task_class(task).from_config(config)
    return model
