"""Units that must be pruned together across several maps: MLP channels and KV heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from eckart.errors import UsageError
from eckart.linear import Site
from eckart.recipe.targets import sites_of


@dataclass(frozen=True)
class Member:
    """A map's part in a group: one unit is `width` of its rows (axis 0) or columns (axis 1)."""

    site: Site
    axis: Literal[0, 1]
    width: int

    def by_unit(self, entries: Tensor) -> Tensor:
        """Sums over each unit: [m, n] -> [units]."""
        return entries.sum(1 - self.axis).unflatten(0, (-1, self.width)).sum(1)


@dataclass(frozen=True)
class Group:
    """Maps that lose the same units when pruned: an MLP's channels, or an attention's KV heads."""

    path: str
    count: int
    members: tuple[Member, ...]


def groups(model: nn.Module, heads: bool, channels: bool) -> list[Group]:
    """The groups of a model in order. UsageError if its heads or channels are not recognised."""
    by_parent: dict[str, dict[str, Site]] = {}
    for site in sites_of(model):
        if site.role.split(".")[0] in ("attn", "mlp"):
            by_parent.setdefault(site.path.rpartition(".")[0], {})[site.role] = site
    found = []
    for path, parts in by_parent.items():
        attention = any(role.startswith("attn") for role in parts)
        if heads if attention else channels:
            take = kv_heads if attention else mlp_channels
            found.append(take(path, model.get_submodule(path), parts))
    return found


def mlp_channels(path: str, module: nn.Module, parts: Mapping[str, Site]) -> Group:
    """The group of an MLP: a channel is a row of gate and up and a column of down."""
    known = {"mlp.up", "mlp.down"} <= parts.keys() <= {"mlp.gate", "mlp.up", "mlp.down"}
    if not known or any(site.kind != "linear" for site in parts.values()):
        raise unknown(path, "channels", parts)
    members = [Member(s, 1 if role == "mlp.down" else 0, 1) for role, s in parts.items()]
    return Group(path, parts["mlp.down"].shape[1], tuple(members))


def kv_heads(path: str, module: Any, parts: Mapping[str, Site]) -> Group:
    """The group of an attention: a KV head's rows of k and v, its query heads' in q and o."""
    h: Any = getattr(module, "head_dim", None)
    fits = isinstance(h, int) and hasattr(module, "num_key_value_groups")
    known = parts.keys() == {"attn.q", "attn.k", "attn.v", "attn.o"}
    if not (fits and known) or any(site.kind != "linear" for site in parts.values()):
        raise unknown(path, "heads", parts)
    count = parts["attn.k"].shape[0] // h
    wide = parts["attn.q"].shape[0] // count  # g h
    members = (
        Member(parts["attn.q"], 0, wide),
        Member(parts["attn.k"], 0, h),
        Member(parts["attn.v"], 0, h),
        Member(parts["attn.o"], 1, wide),
    )
    return Group(path, count, members)


def unknown(path: str, what: str, parts: Mapping[str, Site]) -> UsageError:
    """The error for a layer whose units cannot be pruned."""
    return UsageError(
        f"no way is known to prune these {what}",
        [(path, ", ".join(f"{role} ({site.kind})" for role, site in parts.items()))],
        f"Type weights.{what}=0 to keep them all, or weights.pattern=2:4 for single weights.",
    )
