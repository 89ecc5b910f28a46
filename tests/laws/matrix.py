"""The matrix that laws run over: every registered method, in a small configuration.

A law asks a method for its promises, never for its name.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from eckart.recipe import Handle, Recipe, attach, registry
from eckart.recipe.method import Method, Update, Weights
from eckart.recipe.recipe import fitted
from tests.conftest import batch_for, cast, tiny

SMALL = {"rank": 4, "every": 3}  # fits the narrowest map of the tiny models; laws train longer
TURNS = {"blocks": 1}  # of an update rule: half of the tiny models rests at any time


def slugs(axis: str) -> list[str]:
    """All methods of one axis."""
    return [name for name, entry in registry.methods().items() if entry.axis == axis]


def small(slug: str, **fields: Any) -> Any:
    """A method with sizes that suit the tiny models."""
    cls: Any = registry.load(slug)
    names = {f.name for f in dataclasses.fields(cls)}
    sizes = {**SMALL, **(TURNS if issubclass(cls, Update) else {})}
    return cls(**{k: v for k, v in sizes.items() if k in names}, **fields)


def weights_methods(promise: str | None = None) -> list[str]:
    """All weights methods, or those whose small configuration makes a promise."""
    return [s for s in slugs("weights") if promise is None or small(s).promised(promise)]


def recipe_for(slug: str) -> Recipe:
    """A recipe in which this weights or update method stands, with a partner that fits."""
    method: Method = small(slug)
    if isinstance(method, Weights):
        return Recipe(weights=method)
    assert isinstance(method, Update)
    partner = "dense" if method.wants == "matrices" else "lora"
    return Recipe(weights=fitted(small(partner), method), update=method)


def attached(
    slug: str, architecture: str, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, Handle, dict[str, torch.Tensor]]:
    """A tiny model carrying the method, its handle and a batch, all in one dtype."""
    model = tiny(architecture, dtype)
    batch = cast(batch_for(architecture), dtype)
    recipe = recipe_for(slug)
    calibration = [batch] if recipe.needs else None
    handle = attach(model, recipe, calibration=calibration, steps=20, lr=1e-2, warmup=2, **options)
    model.to(dtype)  # factors are fp32 by default; fp64 laws want them in fp64
    return model, handle, batch


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Outputs without a graph."""
    with torch.no_grad():
        return model(**batch)["logits"]


def steps(handle: Handle, optimizer: Any, batches: list[dict[str, torch.Tensor]]) -> list[float]:
    """A bare loop; the losses before each step."""
    losses = []
    for batch in batches:
        loss = handle.loss(batch, handle.model(**batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
