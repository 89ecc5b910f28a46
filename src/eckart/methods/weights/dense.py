"""Dense: the model's own matrices, trained whole.

    y = W x

Full fine-tuning and ordinary pretraining; what the other methods are measured against, and
what projected optimizers (GaLore and its kin) act on. `targets=[attn]` trains those
matrices alone; the default trains every parameter.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from eckart.linear import Site
from eckart.recipe import Cost, Weights


@dataclass(frozen=True)
class Dense(Weights):
    """Trains the model's own parameters; nothing is added."""

    targets: tuple[str, ...] = field(default=("everything",), kw_only=True)
    """Which maps are trained: everything (norms and biases too), or roles and names."""

    base: ClassVar = "trained"
    offers: ClassVar = ("matrices",)
    default_lr: ClassVar = 1e-4
    scratch_lr: ClassVar = 1e-3
    promises: ClassVar = ("starts_at_base", "merges")

    def build_one(self, site: Site) -> Mapping[str, nn.Module]:
        return {}

    def cost(self, m: int, n: int) -> Cost:
        return Cost(parameters=m * n)
