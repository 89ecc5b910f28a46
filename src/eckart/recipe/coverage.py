"""How much of a model a recipe trains: every element counted once, by role and state."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from eckart.optim import Projector
from eckart.recipe.groups import special_parameters
from eckart.recipe.targets import sites_of

if TYPE_CHECKING:
    from eckart.recipe.handle import Handle


@dataclass
class Coverage:
    """Elements by role: trained, projected, frozen, unreachable."""

    by_role: dict[str, dict[str, int]] = field(default_factory=dict)
    matrices: int = 0
    cut: int = 0  # sites where the rank was cut to min(m, n)
    full: int = 0  # matrices whose projected gradient is as large as the gradient

    def add(self, role: str, state: str, count: int) -> None:
        """Count elements of a role as trained, projected, frozen or unreachable."""
        row = self.by_role.setdefault(role, {})
        row[state] = row.get(state, 0) + count

    def total(self, state: str) -> int:
        """Elements in one state over all roles."""
        return sum(row.get(state, 0) for row in self.by_role.values())

    @property
    def parameters(self) -> int:
        """All elements, including those of the attached terms."""
        return sum(sum(row.values()) for row in self.by_role.values())

    def __str__(self) -> str:
        """`210 matrices: attn, mlp; trained 13,440 (0.01 %), frozen 134.5 M, unreachable 0`."""
        moved = {"trained", "projected"}
        roles = sorted(
            r for r, row in self.by_role.items() if moved & {k for k, v in row.items() if v}
        )
        everything = max(1, self.parameters)
        trained = self.total("trained")
        words = [f"trained {amount(trained)} ({percent(trained / everything)})"]
        for state in ("projected", "frozen", "unreachable"):
            if self.total(state) or state != "projected":
                words.append(f"{state} {amount(self.total(state))}")
        ranks = f"; rank cut at {self.cut} narrower maps" if self.cut else ""
        if self.full:
            ranks += f"; {self.full} projected at full rank, which saves no memory"
        return f"{self.matrices} matrices: {', '.join(roles) or 'none'}; {', '.join(words)}{ranks}"


def cover(handle: Handle) -> Coverage:
    """Count every element of the model once, by role and state."""
    coverage = Coverage(matrices=len(handle.attached) or len(handle.sites))
    update = handle.recipe.update
    projected: set[str] = set()
    matrices = sites_of(handle.model)
    if update is not None and update.wants == "matrices" and update.rule().projector.names:
        projected = special_parameters(handle, update)
        special = [s.shape for s in matrices if f"{s.module_path}.{s.param}" in projected]
        coverage.full = sum(saves_nothing(update.rule().projector, *shape) for shape in special)
    roles = {f"{s.module_path}.{s.param}": s.role for s in matrices}
    for path, by_name in handle.parts().items():
        site = handle.sites[path]
        for child in by_name:
            roles[f"{site.module_path}.{handle.child(path, child)}"] = site.role
    rank = getattr(handle.weights, "rank", None) or 0
    sites = handle.sites.values()
    coverage.cut = sum(1 for s in sites if s.path in handle.attached and rank > min(s.shape))
    for name, parameter in handle.model.named_parameters():
        owner = name.rsplit(".", 1)[0]
        role = roles.get(name) or roles.get(owner) or "rest"
        if parameter.requires_grad:
            state = "projected" if name in projected else "trained"
        else:
            state = "frozen" if role != "rest" else "unreachable"
        coverage.add(role.split(".")[0], state, parameter.numel())
    return coverage


def saves_nothing(projector: Projector, m: int, n: int) -> bool:
    """Is the low-rank gradient of an [m, n] matrix as large as the gradient?"""
    W = torch.empty(m, n, device="meta")
    return projector.takes(W.shape, 0) and projector.low(W).numel() >= m * n


def amount(count: int) -> str:
    """1,234 or 134.5 M."""
    return f"{count:,}" if count < 1_000_000 else f"{count / 1e6:,.1f} M"


def percent(share: float) -> str:
    """A share as a percentage with two significant digits."""
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.1f} %"
