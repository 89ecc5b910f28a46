"""Installing a recipe's parts at a model's sites, and undoing this after a failure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from eckart.errors import UsageError
from eckart.linear import LowRank, Site, Structured, install
from eckart.linear.peers import make_peers
from eckart.linear.sites import as_stored, quantised
from eckart.recipe.adapters import adapters_of, require_beside
from eckart.recipe.coverage import cover
from eckart.recipe.handle import ROOT, Handle
from eckart.recipe.lock import lock
from eckart.recipe.recipe import conflict
from eckart.recipe.targets import EVERYTHING, refuse_unreachable, same_input, sites_of


def install_parts(handle: Handle, parts: Mapping[str, Mapping[str, nn.Module]]) -> None:
    """Freeze or drop the base as the method declares and install the parts at their sites.

    If it fails, the model is left as it was.
    """
    require_beside(handle, parts)
    before = dict(handle.model.named_parameters())
    try:
        install_all(handle, parts)
    except BaseException:
        roll_back(handle, before)
        raise


def roll_back(handle: Handle, before: Mapping[str, nn.Parameter]) -> None:
    """Restore the model to the state in which these were its parameters, dropped ones included."""
    handle.detach()
    for name, parameter in before.items():
        path, _, leaf = name.rpartition(".")
        handle.model.get_submodule(path)._parameters[leaf] = parameter
        parameter.requires_grad_(handle.required[name])
    with torch.no_grad():
        for path, original in handle.originals.items():
            handle.sites[path].raw.copy_(original)


def install_all(handle: Handle, parts: Mapping[str, Mapping[str, nn.Module]]) -> None:
    """`install_parts` without the rollback."""
    weights = handle.weights
    if weights.rest == "frozen" and EVERYTHING not in weights.targets:
        for parameter in handle.model.parameters():
            parameter.requires_grad_(False)
    for name, module in parts.get(ROOT, {}).items():
        module.to(device=next(handle.model.parameters()).device)
        handle.model.add_module(name + handle.suffix, module)
        handle.shared[name] = module
    for path, by_name in parts.items():
        if path != ROOT:
            install_at(handle, handle.sites[path], dict(by_name))
    if weights.base in ("trained", "rewritten"):
        for site in handle.sites.values():
            site.raw.requires_grad_(weights.base == "trained")
    for name in handle.also_train:
        handle.model.get_submodule(name).requires_grad_(True)
    for path, by_term in handle.terms().items():
        for term in by_term.values():
            term.bind(handle.shared, handle.sites[path].module, handle.sites[path].param)
    set_products(handle)
    for group in same_input(handle.sites[path] for path in handle.attached):
        make_peers([site.module for site in group])
    adapters_of(handle.model).enter(handle)
    handle.coverage = cover(handle)
    if handle.attached:
        lock(handle.model, handle.structure())
    if any(handle.sites[path].kind == "embedding" for path in handle.attached):
        handle.model.__dict__["resize_token_embeddings"] = refuse_resizing


def install_at(handle: Handle, site: Site, parts: dict[str, nn.Module]) -> None:
    """Install one site: a changed base first, then the terms, which replace a dropped base."""
    dense = parts.pop("dense", None)
    if dense is not None:
        change_base(handle, site, dense)
    if not parts:
        return
    drop = handle.weights.base == "dropped"
    if drop and site.ties:
        raise UsageError(
            "a tied matrix cannot be replaced",
            [(site.path, f"tied with {', '.join(site.ties)}")],
            "Leave it out of weights.targets.",
        )
    for part in parts.values():
        part.to(device=site.raw.device).train(site.module.training)
        declare_gradient_rule(handle, part, site.path)
    refuse_unreachable(handle.model, [site])
    install(site, {name + handle.suffix: part for name, part in parts.items()}, drop)
    handle.attached[site.path] = list(parts)


def change_base(handle: Handle, site: Site, dense: Any) -> None:
    """Write another matrix into a site and keep the original. UsageError if it is quantised."""
    if quantised(site.raw):
        raise UsageError(
            "a quantised base cannot be changed",
            [(site.path, f"{handle.weights.slug} writes into it")],
            "Type precision=bf16, or another method.",
        )
    handle.originals[site.path] = site.raw.detach().clone()
    site.raw.data.copy_(as_stored(dense.dense(), site.module, site.kind))


def declare_gradient_rule(handle: Handle, part: nn.Module, path: str) -> None:
    """Give the update's row factor to factor pairs; UsageError if one is not a plain pair."""
    update = handle.recipe.update
    rule = None if update is None else update.branch_gradient()
    if update is None or rule is None or not isinstance(part, LowRank):
        return
    if not part.plain_pair:
        raise conflict(
            (f"update = {update.slug}", "needs trained factors B, A whose product is all"),
            (f"weights = {handle.weights.slug}", f"has more than that at {path}"),
            f"Type weights=lora weights.init=kaiming update={update.slug}.",
        )
    part.branch_gradient = rule


def set_products(handle: Handle) -> None:
    """Let the precision compute the products of maps and of their terms.

    A map without terms becomes a sum whose only term is its own matrix.
    """
    precision, terms = handle.recipe.precision, handle.terms()
    if precision is None or not precision.multiplies:
        return
    everything = {site.path: site for site in sites_of(handle.model)}
    for path, site in {**everything, **handle.sites}.items():  # a dropped matrix is in one alone
        mm = precision.mm(site)
        if mm is None:
            continue
        module: Any = site.module
        if not isinstance(module, Structured):
            refuse_unreachable(handle.model, [site])
            install(site, {})
            handle.bare.append(site)
        module._sum.mm = mm
        for term in terms.get(path, {}).values():
            term.mm = mm


def refuse_resizing(*_: Any, **__: Any) -> None:
    """Replaces a model's resizing method while its embedding has terms of the old size."""
    raise UsageError(
        "the embedding carries terms of its present size",
        [("resize_token_embeddings", "would leave them behind")],
        "Resize first, then attach.",
    )
