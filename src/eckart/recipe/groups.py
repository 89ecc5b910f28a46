"""Parameter groups for the optimizer: which parameter follows which rule, at which ratios."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from eckart.linear import LowRank
from eckart.recipe import registry
from eckart.recipe.method import Update
from eckart.recipe.recipe import Recipe
from eckart.recipe.targets import EVERYTHING, select, sites_of

if TYPE_CHECKING:
    from eckart.recipe.handle import Handle


def default_lr(recipe: Recipe, scratch: bool = False) -> float:
    """The update's own default learning rate, or else the weights method's.

    `scratch`: the rate for random weights, which is larger than for pretrained ones.
    """
    assert recipe.weights is not None
    own = recipe.update.usual_lr(scratch) if recipe.update else None
    rate = recipe.weights.usual_lr(scratch) if own is None else own
    assert rate is not None
    return rate


def groups(handle: Handle, lr: float) -> list[dict[str, Any]]:
    """Parameter groups by rule, ratios and leading dimensions, in the model's own order."""
    update = handle.recipe.update or default_update()
    special, leading = special_parameters(handle, update), leading_dimensions(handle)
    trained, ratios = handle.trainable(), handle.weights.ratios
    return arranged(trained, update, special, leading, factor_pairs(handle), lr, ratios)


def arranged(
    trained: Mapping[str, Tensor],
    update: Update,
    special: Container[str],
    leading: Mapping[str, int],
    pairs: Iterable[tuple[str, str, float]],
    lr: float,
    ratios_of: Callable[[str, Tensor], Mapping[str, float]] = lambda name, tensor: {},
) -> list[dict[str, Any]]:
    """Groups of the trained parameters: those in `special` follow the update's rule, the others
    its plain rule; vectors have no weight decay.
    """
    rules = {True: update.rule(), False: update.plain()}
    decay = getattr(update, "weight_decay", 0.0)
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in trained.items():
        ratios = {"lr": 1.0, "weight_decay": 1.0 if parameter.ndim > 1 else 0.0, "clip": 1.0}
        ratios.update(ratios_of(name, parameter))
        if name not in special:
            ratios["lr"] *= update.plain_lr()
        key = (name in special, leading.get(name, 0), *ratios.values())
        group = found.setdefault(
            key,
            {
                "params": [],
                "rule": rules[name in special],
                "leading": leading.get(name, 0),
                "lr": lr * ratios["lr"],
                "weight_decay": decay * ratios["weight_decay"],
                "clip_weight": ratios["clip"],
            },
        )
        group["params"].append((name, parameter))
    if update.wants == "pairs":
        for group in found.values():
            names = {name for name, _ in group["params"]}
            group["pairs"] = [pair for pair in pairs if pair[0] in names]
    return list(found.values())


def leading_dimensions(handle: Handle) -> dict[str, int]:
    """How many dimensions come before each matrix: 1 for fused experts and their factors."""
    found = {}
    for site in sites_of(handle.model, handle.seed):
        found[f"{site.module_path}.{site.param}"] = len(site.leading)
    for path, by_name in handle.parts().items():
        site = handle.sites[path]
        for child, part in by_name.items():
            for key, _ in part.named_parameters():
                found[f"{site.module_path}.{handle.child(path, child)}.{key}"] = len(site.leading)
    return found


def special_parameters(handle: Handle, update: Update) -> set[str]:
    """Names of the parameters that the update rule acts on; the others follow its plain rule."""
    if update.wants == "any":
        return set(handle.trainable())
    if update.wants == "pairs":
        return {name for pair in factor_pairs(handle) for name in pair[:2]}
    return matrices_of(handle.model, update)


def matrices_of(model: nn.Module, update: Update) -> set[str]:
    """Names of the trained matrices that match the update's targets."""
    words = [t for t in update.targets if t != EVERYTHING]
    everything = sites_of(model)
    chosen = select(everything, words, axis="update") if words else everything
    return {f"{s.module_path}.{s.param}" for s in chosen if s.raw.requires_grad}


def factor_pairs(handle: Handle) -> list[tuple[str, str, float]]:
    """Trained factor pairs as (name of B, name of A, scale)."""
    found = []
    for path, by_name in handle.terms().items():
        site = handle.sites[path]
        for child, term in by_name.items():
            if isinstance(term, LowRank) and {"A", "B"} <= set(term._parameters):
                stem = f"{site.module_path}.{handle.child(path, child)}"
                found.append((f"{stem}.B", f"{stem}.A", term.scale))
    return found


def default_update() -> Update:
    """The update rule of a recipe that names none."""
    update = registry.load(registry.DEFAULTS["update"])
    return update()  # type: ignore[return-value]
