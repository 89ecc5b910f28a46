"""Low-rank approximations of a trained model at any rank, with the error of each matrix.

    of_update   approximates D = W_after - W_base of each matrix, as plain LoRA on the base
    of_model    approximates W of each matrix, by the compression that needs no data

Both are truncated SVDs, so the error of a matrix at rank r follows from its singular values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from eckart.decompose import balanced, truncated_svd
from eckart.decompose.ranks import tail_errors
from eckart.errors import UsageError
from eckart.io import peft
from eckart.io.peft_read import method_of
from eckart.linear import Site
from eckart.recipe import Handle, Recipe, attach, registry
from eckart.recipe.fingerprint import fingerprint
from eckart.recipe.installing import install_parts
from eckart.recipe.targets import sites_of
from eckart.recipe.vocabulary import held_whole


@dataclass
class Approximation:
    """Approximations `at(rank)` and their errors. Each call of `at` invalidates the last handle."""

    of: str  # what the errors are relative to: "update" or "weights"
    at: Callable[[int], Handle]
    spectra: Mapping[str, Tensor]  # path -> singular values [*, k] of what is approximated
    roles: Mapping[str, str]
    whole: Mapping[str, int] = field(default_factory=dict)  # path -> rank from which it stays dense
    left: tuple[str, ...] = ()  # changed parameters outside all sites, left out

    @property
    def most(self) -> int:
        """The smallest rank at which every matrix is exact."""
        return max((s.shape[-1] for s in self.spectra.values()), default=0)

    def errors(self, rank: int) -> dict[str, float]:
        """The relative Frobenius error of each matrix at this rank."""
        found = {}
        for path, s in self.spectra.items():
            kept = rank >= self.whole.get(path, s.shape[-1])
            found[path] = 0.0 if kept else float(tail_errors(s)[rank])
        return found

    def by_role(self, rank: int) -> dict[str, tuple[float, float, str]]:
        """Role -> (median error, largest error, path of the largest)."""
        grouped: dict[str, list[tuple[float, str]]] = {}
        for path, error in self.errors(rank).items():
            grouped.setdefault(self.roles[path], []).append((error, path))
        return {
            role: (median(e for e, _ in errors), *max(errors)) for role, errors in grouped.items()
        }


def plain_lora(rank: int, paths: list[str]) -> Any:
    """The method that PEFT calls LORA, with scale 1."""
    config = {"peft_type": peft.GENERAL, "r": rank, "lora_alpha": rank}
    return dataclasses.replace(method_of(config, Path()), targets=tuple(paths))


def of_update(
    after: nn.Module, carried: Handle | None, base: nn.Module, whole: Sequence[str] = ()
) -> Approximation:
    """The difference between a model and its base, as plain LoRA on the base.

    `after` may have terms attached (`carried` is their handle). Modules in `whole`, such as a
    trained head, are copied into `base` and become part of the adapter. Raises UsageError where
    a term is not linear, or where nothing has changed.
    """
    name = fingerprint(base, held_whole(base, whole))
    for path in whole:
        base.get_submodule(path).load_state_dict(after.get_submodule(path).state_dict())
    parts: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    sites = {site.path: site for site in sites_of(base)}
    covered = {f"{site.module_path}.{site.param}" for site in sites.values()}
    for path, site in sites.items():
        change = matrix_of(after, carried, site) - site.weight(torch.float64)
        if bool(change.any()):
            parts[path] = truncated_svd(change.float(), min(site.shape))
    if not parts:
        raise UsageError("there is nothing to write", [("the model", "is its base, unchanged")])
    live: list[Handle] = []

    def at(rank: int) -> Handle:
        while live:
            live.pop().remove()
        used = {path: sites[path] for path in parts}
        method = plain_lora(min(rank, max(min(s.shape) for s in used.values())), list(used))
        handle = Handle(base, Recipe(weights=method), used, also_train=tuple(whole))
        handle.fingerprint = name
        install_parts(
            handle,
            {path: method.parts_from_peft(used[path], pair(parts[path], rank)) for path in used},
        )
        live.append(handle)
        return handle

    before = dict(base.named_parameters())
    left = [
        key
        for key, value in after.named_parameters()
        if key in before and key not in covered and not torch.equal(value, before[key])
    ]
    spectra = {path: s for path, (_, s, _) in parts.items()}
    roles = {path: sites[path].role for path in parts}
    return Approximation("update", at, spectra, roles, left=tuple(left))


def matrix_of(after: nn.Module, carried: Handle | None, site: Site) -> Tensor:
    """The matrix [*, m, n] in fp64 of the other model, terms merged, at a site of the base."""
    if carried is not None and site.path in carried.attached:
        for name, term in carried.terms()[site.path].items():
            if not term.linear:
                raise UsageError(
                    "this has no low-rank form",
                    [(f"{site.path}.{name}", "is not a linear map")],
                    "Type --to native or --to factored.",
                )
        module: Any = carried.sites[site.path].module
        merged: Tensor = module.merged(site.param)
        return merged
    theirs = dataclasses.replace(site, module=after.get_submodule(site.module_path))
    return theirs.weight(torch.float64)


def pair(svd: tuple[Tensor, Tensor, Tensor], rank: int) -> dict[str, Tensor]:
    """The first `rank` components as lora_B [*, m, r] and lora_A [*, r, n]."""
    U, s, Vt = svd
    B, A = balanced(U[..., :rank], s[..., :rank], Vt[..., :rank, :])
    return {"lora_B": B.contiguous(), "lora_A": A.contiguous()}


def of_model(load: Callable[[], Any]) -> Approximation:
    """The model with its matrices truncated; `load` returns a fresh copy of it."""
    method = registry.load(registry.DEFAULTS["compress"])
    first = load()
    recipe = Recipe(weights=method(rank=1))  # type: ignore[call-arg, arg-type]
    handle = attach(first, recipe)
    sites = handle.sites
    spectra = {
        path: torch.linalg.svdvals(site.weight(torch.float32))
        for path, site in {s.path: s for s in sites_of(load())}.items()
        if path in sites
    }
    # from this rank on the factors would be larger than the matrix, which then stays dense
    dense_from = {p: -(-s.shape[0] * s.shape[1] // sum(s.shape)) for p, s in sites.items()}

    def at(rank: int) -> Handle:
        return attach(load(), Recipe(weights=method(rank=rank)))  # type: ignore[call-arg, arg-type]

    return Approximation("weights", at, spectra, {p: s.role for p, s in sites.items()}, dense_from)
