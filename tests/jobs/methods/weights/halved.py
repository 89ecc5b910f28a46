"""Halved: learn on a model with half of its weights gone, use it on the whole one.

Not a method of the package: tests drop it in through the registry.
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch

from eckart.linear import LowRank, Site
from eckart.recipe import Recipe, Stage, Weights, Work, attach
from eckart.recipe.targets import sites_of


@dataclass(frozen=True)
class Halved(Weights):
    """Three stages: prune, tune the terms, put them on the model as it was."""

    rank: int = 2
    """Of the terms."""

    stages: ClassVar = (
        Stage("prune", "operate"),
        Stage("tune", "train", options={"steps": 8, "lr": 1e-2}),
        Stage("more", "train", optimizer="migrate", options={"steps": 4, "lr": 1e-2}),
        Stage("recover", "operate", base="original", reads=("prune", "more")),
    )

    promises: ClassVar = ("starts_at_base", "merges", "exports_low_rank")

    def build_one(self, site: Site) -> dict[str, LowRank]:
        (m, n), g = site.shape, site.generator
        A = torch.randn(self.rank, n, generator=g) / n**0.5
        return {"halved": LowRank(torch.zeros(m, self.rank), A, 2.0)}

    def operate(self, work: Work) -> Work:
        if work.stage.name == "prune":
            return dataclasses.replace(work, output=prune(work.model))
        handle = attach(work.model, Recipe(weights=self))
        handle.load_named_state(work.read["more"])
        lost = sum(int((~mask).sum()) for mask in work.read["prune"].values())
        return dataclasses.replace(work, handle=handle, output={"lost": torch.tensor(lost)})


@torch.no_grad()
def prune(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Zero the smaller half of each attention and mlp matrix; what was kept, by path."""
    kept = {}
    for site in sites_of(model):
        if site.role.startswith(("attn", "mlp")):
            mask = site.raw.abs() >= site.raw.abs().median()
            site.raw.mul_(mask)
            kept[site.path] = mask
    return kept
