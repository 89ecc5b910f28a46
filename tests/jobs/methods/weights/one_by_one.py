"""One by one: an adapter for each task, folded into the model before the next.

Not a method of the package: tests drop it in through the registry.
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch

from eckart.linear import LowRank, Site
from eckart.recipe import Stage, Weights, Work


@dataclass(frozen=True)
class OneByOne(Weights):
    """Two stages, repeated for each task."""

    rank: int = 4
    """Of the terms."""

    stages: ClassVar = (
        Stage("learn", "train", repeat="tasks", options={"steps": 10, "lr": 1e-2}),
        Stage("fold", "operate", repeat="tasks"),
    )
    promises: ClassVar = ("merges",)

    def build_one(self, site: Site) -> dict[str, LowRank]:
        (m, n), g = site.shape, site.generator
        A = torch.randn(self.rank, n, generator=g) / n**0.5
        return {"one": LowRank(torch.zeros(m, self.rank), A, 2.0)}

    def operate(self, work: Work) -> Work:
        assert work.handle is not None
        return dataclasses.replace(work, model=work.handle.merge(), handle=None)
