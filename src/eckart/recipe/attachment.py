"""attach() adds a recipe's terms to a model; attach_from() rebuilds stored ones."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from eckart import linear
from eckart.errors import Diverged, FileError, UsageError, did_you_mean
from eckart.linear import Horizon, Part, Site, Structured
from eckart.linear.sites import HOOKED
from eckart.recipe import registry
from eckart.recipe.adapters import DEFAULT, require_free
from eckart.recipe.calibrate import GATHERED, Batch
from eckart.recipe.fingerprint import fingerprint
from eckart.recipe.groups import default_lr
from eckart.recipe.handle import FORMAT, ROOT, Handle
from eckart.recipe.installing import install_parts
from eckart.recipe.method import Weights
from eckart.recipe.recipe import Recipe, refuse_unasked
from eckart.recipe.targets import (
    EVERYTHING,
    apply_overrides,
    refuse_unreachable,
    select,
    sites_of,
)
from eckart.recipe.vocabulary import held_whole

with suppress(ModuleNotFoundError):  # the kernels are optional
    import eckart.kernels  # noqa: F401  # registers faster forms


def attach(
    model: nn.Module,
    recipe: Recipe,
    *,
    calibration: Iterable[Batch] | None = None,
    steps: int | None = None,
    lr: float | None = None,
    warmup: int | None = None,
    seed: int = 0,
    also_train: Sequence[str] = (),
    teacher: nn.Module | None = None,
    name: str = DEFAULT,
) -> Handle:
    """Put a recipe's terms into a model, in place.

    `calibration` are batches (dicts for `model(**batch)`) for methods that need gradients or
    activations; `steps`, `lr` and `warmup` the horizon for methods that need it. `also_train`
    names modules to train whole beside the terms (a new classification head). `teacher`
    is the reference of a distillation where the base itself is trained or dropped. `name`
    tells this adapter from others on the same model.

    Raises UsageError for targets that match nothing, ranks too large everywhere, missing
    calibration or horizon, and combinations that cannot work.
    """
    if not isinstance(recipe, Recipe) or recipe.weights is None:
        raise UsageError("a recipe needs weights", fix="For example Recipe(weights=eckart.LoRA()).")
    recipe.check()
    require_free(model, name)
    refuse_unfit(model, also_train)
    sites = choose(model, recipe.weights, seed)
    for site in sites:
        if site.overrides:
            refuse_unasked(recipe.weights.at(site), recipe.update, site.path)
    calibrate(model, recipe, sites, calibration, steps)
    horizon = Horizon(steps, lr if lr is not None else default_lr(recipe), warmup or 0)
    for site in sites:
        site.horizon = horizon
    base = fingerprint(model, held_whole(model, also_train))
    convert_base(model, recipe)
    parts = built(recipe.weights, sites)
    by_path = {site.path: site for site in sites}
    handle = Handle(model, recipe, by_path, seed, tuple(also_train), teacher, name)
    handle.fingerprint = base
    handle.steps, handle.lr, handle.warmup = steps, lr, warmup
    install_parts(handle, parts)
    for site in sites:
        site.gradient = site.activations = None
    return handle


def attach_from(
    model: nn.Module,
    structure: Mapping[str, Any],
    *,
    recipe: Recipe | None = None,
    teacher: nn.Module | None = None,
    name: str = DEFAULT,
) -> Handle:
    """Rebuild an attachment from stored plain data, its tensors still without values.

    `structure` is what `Handle.structure()` returned; `recipe` may supply the other axes. Call
    `handle.load_named_state(...)` afterwards. Raises FileError where the model has no such site.
    """
    if structure.get("format") != FORMAT:
        found = str(structure.get("format"))
        raise FileError("unknown format version", [(found, f"this eckart reads {FORMAT}")])
    cls = registry.load(structure["method"])
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in structure["fields"].items()}
    weights: Any = cls(**fields)
    recipe = dataclasses.replace(recipe or Recipe(), weights=weights)
    convert_base(model, recipe)
    here = {site.path: site for site in sites_of(model, structure["seed"])}
    missing = [path for path in structure["sites"] if path not in here]
    if missing:
        raise FileError("the model has no such map", [(path, "") for path in missing[:8]])
    wanted = {**structure["sites"], **dict.fromkeys(structure["changed"], None)}
    sites = (
        {p: here[p] for p in wanted} if wanted else {s.path: s for s in choose_all(recipe, here)}
    )
    handle = Handle(
        model, recipe, sites, structure["seed"], tuple(structure["also_train"]), teacher, name
    )
    handle.fingerprint = structure["fingerprint"]
    for path in structure["changed"]:
        handle.originals[path] = sites[path].raw.detach().clone()
    stored = {**structure["sites"], ROOT: structure["shared"]}
    install_parts(
        handle,
        {
            path: {name: rebuild_term(cls, spec) for name, spec in parts.items()}
            for path, parts in stored.items()
        },
    )
    return handle


def refuse_unfit(model: nn.Module, also_train: Sequence[str]) -> None:
    """Raise UsageError for a model on the meta device, and for modules that it does not have."""
    if any(p.device.type == "meta" for p in model.parameters()):
        if any(HOOKED in vars(module) for module in model.modules()):
            raise UsageError(
                "parts of this model lie on the CPU or on a disk between passes",
                [(type(model).__name__, "was loaded into less memory than it needs")],
                "Load it whole into memory: with a smaller dtype, a quantised base, or "
                "device_map=None.",
            )
        raise UsageError(
            "this model has no weights yet",
            [(type(model).__name__, "is on the meta device")],
            "Load it whole, or draw its initial values, then attach.",
        )
    modules = [path for path, _ in model.named_modules() if path]
    for name in also_train:
        if name not in modules:
            fix = did_you_mean(name, modules, "Name a module by its path in the model.")
            raise UsageError("no module of this name to train", [("also_train", name)], fix)


def built(weights: Weights, sites: list[Site]) -> dict[str, dict[str, nn.Module]]:
    """Build the parts of all sites. Raises Diverged, with the site, if a matrix holds a NaN."""
    try:
        with torch.device("cpu"):  # draws are made there, whatever the default device is
            return weights.build(sites) if sites else {}
    except torch.linalg.LinAlgError as fault:
        lost = [site.path for site in sites if not site.weight().isfinite().all()]
        if not lost:
            raise
        raise Diverged("a weight is not finite", [(lost[0], "cannot be decomposed")]) from fault


def convert_base(model: nn.Module, recipe: Recipe) -> None:
    """Convert the frozen base to the precision's format; terms are built on the result."""
    if recipe.precision is not None and recipe.precision.converts:
        recipe.precision.convert([site for site in sites_of(model) if not site.ties])


def choose_all(recipe: Recipe, here: Mapping[str, Site]) -> list[Site]:
    """The sites of a method that has no terms (full training)."""
    assert recipe.weights is not None
    words = [t for t in recipe.weights.targets if t != EVERYTHING]
    return select(list(here.values()), words) if words else list(here.values())


def rebuild_term(method: type, spec: Mapping[str, Any]) -> nn.Module:
    """Rebuild a stored term without values; its class is ours or in the method's own file."""
    own = sys.modules[method.__module__]
    cls = getattr(linear, spec["type"], None) or getattr(own, spec["type"], None)
    if not (isinstance(cls, type) and issubclass(cls, Part)):
        raise FileError("unknown kind of term", [(spec["type"], f"method {method.__name__}")])
    return cls.empty(spec["tensors"], spec["scalars"])


def choose(model: nn.Module, weights: Weights, seed: int) -> list[Site]:
    """The sites that a weights method acts on, checked and with their overrides."""
    everything = sites_of(model, seed)
    targets = [t for t in weights.targets if t != EVERYTHING]
    sites = everything if EVERYTHING in weights.targets else select(everything, targets)
    if weights.base != "trained":  # before any work; else checked when installed
        refuse_unreachable(model, sites)
    taken = [s.path for s in sites if isinstance(s.module, Structured) and weights.base != "frozen"]
    if taken:
        raise UsageError(
            "terms are attached here already", [(taken[0], "")], "Call remove() first."
        )
    names = [f.name for f in dataclasses.fields(weights) if f.name not in ("targets", "overrides")]
    apply_overrides(sites, weights.overrides, names)
    check_ranks(sites, weights)
    return sites


def check_ranks(sites: Sequence[Site], weights: Weights) -> None:
    """Raise UsageError for a rank above min(m, n) at every site, or one set by an override."""
    rank, key = getattr(weights, "rank", None), weights.axis
    if rank is None or not sites:
        return
    for site in sites:
        if site.overrides.get("rank", 0) > min(site.shape):
            raise UsageError(
                "rank is larger than the matrix",
                [(f"{key}.overrides rank = {site.overrides['rank']}", site.path)],
                f"At most {min(site.shape)} fits there.",
            )
    largest = max(min(site.shape) for site in sites)
    if rank > largest:
        m, n = sites[0].shape
        raise UsageError(
            "rank is larger than the matrix",
            [
                (f"{key}.rank = {rank}", ""),
                (sites[0].path, f"{m} x {n}, so at most {largest} at every site"),
            ],
            f"Type {key}.rank={largest}, or less.",
        )


def calibrate(
    model: nn.Module,
    recipe: Recipe,
    sites: Sequence[Site],
    calibration: Iterable[Batch] | None,
    steps: int | None,
) -> None:
    """Gather the data that the methods need. UsageError where it is not available."""
    batches = list(calibration) if calibration is not None and recipe.needs else []
    for method in recipe.choices:
        for need in sorted(method.needed):
            of_steps = need == "horizon"
            if steps is None if of_steps else not batches:
                lost = "steps= is missing" if of_steps else "calibration= has no batches"
                raise UsageError(f"{method.slug} needs {need}", [("attach(...)", lost)])
    for need, gather in GATHERED.items():
        if need in recipe.needs:
            gather(model, sites, batches)
