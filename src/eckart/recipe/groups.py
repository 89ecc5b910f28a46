"""Which parameter follows which rule: groups for the optimizer, by rule and by ratios."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from eckart.linear import LowRank
from eckart.recipe import registry
from eckart.recipe.method import Update
from eckart.recipe.recipe import Recipe
from eckart.recipe.targets import EVERYTHING, select, sites_of

if TYPE_CHECKING:
    from eckart.recipe.handle import Handle


def default_lr(recipe: Recipe) -> float:
    """The update's own default learning rate, else the weights method's."""
    assert recipe.weights is not None
    own = recipe.update.default_lr if recipe.update is not None else None
    return own if own is not None else recipe.weights.default_lr


def groups(handle: Handle, lr: float) -> list[dict[str, Any]]:
    """Parameter groups by rule and ratios, in the order of the model's parameters."""
    update = handle.recipe.update or default_update()
    rules = {True: update.rule(), False: update.plain()}
    special = special_parameters(handle, update)
    pairs = factor_pairs(handle)
    grouped: dict[tuple[bool, tuple[tuple[str, float], ...]], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in handle.trainable().items():
        ratios = {"lr": 1.0, "weight_decay": 1.0 if parameter.ndim > 1 else 0.0, "clip": 1.0}
        ratios.update(handle.weights.ratios(name, parameter))
        key = (name in special, tuple(sorted(ratios.items())))
        grouped.setdefault(key, []).append((name, parameter))
    groups = []
    for (is_special, ratio_items), params in grouped.items():
        ratios = dict(ratio_items)
        names = {name for name, _ in params}
        group: dict[str, Any] = {
            "params": params,
            "rule": rules[is_special],
            "lr": lr * ratios["lr"],
            "weight_decay": getattr(update, "weight_decay", 0.0) * ratios["weight_decay"],
            "clip_weight": ratios["clip"],
        }
        if update.wants == "pairs" and is_special:
            group["pairs"] = [p for p in pairs if p[0] in names]
        groups.append(group)
    return groups


def special_parameters(handle: Handle, update: Update) -> set[str]:
    """Names of the parameters that the update rule is about; the rest is plain."""
    if update.wants == "any":
        return set(handle.trainable())
    if update.wants == "pairs":
        return {name for pair in factor_pairs(handle) for name in pair[:2]}
    words = [t for t in update.targets if t != EVERYTHING]
    everything = sites_of(handle.model, handle.seed)
    chosen = select(everything, words, axis="update") if words else everything
    return {f"{s.module_path}.{s.param}" for s in chosen if s.raw.requires_grad}


def factor_pairs(handle: Handle) -> list[tuple[str, str, float]]:
    """Trained factor pairs as (name of B, name of A, scale)."""
    found = []
    for path, by_name in handle.terms().items():
        site = handle.sites[path]
        for child, term in by_name.items():
            if isinstance(term, LowRank) and {"A", "B"} <= set(term._parameters):
                stem = f"{site.module_path}.{site.prefix}{child}"
                found.append((f"{stem}.B", f"{stem}.A", term.scale))
    return found


def default_update() -> Update:
    """What a recipe without an update rule gets."""
    update = registry.load(registry.DEFAULTS["update"])
    return update()  # type: ignore[return-value]
