"""`eckart inspect ONE --against OTHER`: the difference between two checkpoints, by matrix.

    change      OTHER - ONE of each matrix: its norm and its effective rank
    overlap     of the changes D1 and D2 if both checkpoints were made from one base (adapters, or
                runs): |U1^T U2|^2 / r for the leading r left vectors, the same for the right
                ones, the values of random subspaces (r / m and r / n), and the cosine
                <D1, D2> / (|D1| |D2|)

r, at most 16, is the smaller of the two ranks that hold 90 % of a change's energy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from eckart.decompose import rank_for_energy, truncated_svd
from eckart.decompose.spectra import effective_rank
from eckart.errors import EckartError, UsageError
from eckart.io.models import load_model, recognise
from eckart.io.opening import Opened
from eckart.io.run import facts_of
from eckart.jobs.settings.words import read_file
from eckart.jobs.training.observe import overlap
from eckart.jobs.training.screen import Screen
from eckart.linear import Site
from eckart.recipe.fingerprint import fingerprint
from eckart.recipe.targets import sites_of

MOST, ENERGY = 16, 0.9


@dataclass(frozen=True)
class Pair:
    """One matrix of both models: the spectrum [*, k] of the change, and the overlap."""

    site: Site
    s: Tensor
    relative: float  # |change| / |ONE|
    shared: Mapping[str, float] | None = None


def pairs(one: Opened, other: Opened, base: Mapping[str, Site] | None) -> tuple[list[Pair], int]:
    """Every matrix that differs, and the number of matrices compared.

    UsageError for models of different shapes. For two model classes (an encoder, and a classifier
    made from it) the matrices that both have are compared, without heads.
    """
    mine, theirs = all_sites(one), all_sites(other)
    heads = type(one.model) is not type(other.model) and mine.keys() & theirs.keys()
    both = {name: site for name, site in mine.items() if not heads or name in theirs}
    found = []
    for name, site in both.items():
        if name not in theirs or theirs[name].shape != site.shape:
            there = f"{theirs[name].shape[0]} x {theirs[name].shape[1]}" if name in theirs else "-"
            raise UsageError(
                "these two are not of one shape",
                [(site.path, f"{site.shape[0]} x {site.shape[1]} against {there}")],
                "Compare checkpoints of the same model.",
            )
        start = base.get(name) if base else None
        if pair := compared(site, whole(one, site), whole(other, theirs[name]), start):
            found.append(pair)
    return found, len(both)


@torch.no_grad()
def compared(site: Site, W1: Tensor, W2: Tensor, start: Site | None) -> Pair | None:
    """Compare one matrix, W1, W2 and the base's `start` [*, m, n] in fp64; None if equal."""
    change = W2 - W1
    if not bool(change.any()):
        return None
    s = torch.linalg.svdvals(change.float()).cpu()
    relative = float(change.norm() / W1.norm().clamp_min(1e-30))
    if start is None or start.shape != site.shape or W1.ndim != 2:
        return Pair(site, s, relative)
    W0 = start.weight(torch.float64)
    return Pair(site, s, relative, shared(W1 - W0, W2 - W0))


def shared(D1: Tensor, D2: Tensor) -> dict[str, float] | None:
    """The overlap of two changes [m, n] of one base; None if one of them is zero."""
    if not (bool(D1.any()) and bool(D2.any())):
        return None
    (U1, s1, V1), (U2, s2, V2) = (truncated_svd(D.float(), min(D.shape)) for D in (D1, D2))
    r = min(MOST, *(rank_for_energy(s, ENERGY) for s in (s1, s2)))
    (m, n) = D1.shape
    return {
        "rank": r,
        "left": overlap(U1[:, :r], U2[:, :r], "left"),
        "right": overlap(V1[:r], V2[:r], "right"),
        "left_by_chance": r / m,
        "right_by_chance": r / n,
        "cosine": float((D1 * D2).sum() / (D1.norm() * D2.norm())),
        "effective_rank_one": float(effective_rank(s1)),
        "effective_rank_other": float(effective_rank(s2)),
    }


# --- what is compared ----------------------------------------------------------------------


def all_sites(opened: Opened) -> dict[str, Site]:
    """The linear maps of a model, with or without terms, by name without the head's prefix;
    maps with a term that is not linear are left out."""
    sites = {site.path: site for site in sites_of(opened.model)}
    if opened.handle is not None:
        for path, terms in opened.handle.terms().items():
            sites[path] = opened.handle.sites[path]
            if not all(term.linear for term in terms.values()):
                del sites[path]
    return below_head(opened.model, sites.values())


def below_head(model: Any, sites: Iterable[Site]) -> dict[str, Site]:
    """Sites by their names in the model without a head (encoder.*, not bert.encoder.*)."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return {site.path.removeprefix(prefix): site for site in sites}


def whole(opened: Opened, site: Site) -> Tensor:
    """The matrix [*, m, n] of a site in fp64, attached terms included."""
    handle = opened.handle
    if handle is None or site.path not in handle.attached:
        return site.weight(torch.float64)
    module: Any = site.module
    matrix: Tensor = module.merged(site.param)
    return matrix


def base_of(source: str, opened: Opened) -> str | None:
    """What a checkpoint was made from: an adapter's base, a run's model; a pretraining began at
    random numbers."""
    if opened.base != source and opened.handle is not None:
        return opened.base
    found = recognise(source)
    if found.kind == "run" and facts_of(Path(found.path)).get("command") != "pretrain":
        given = read_file(f"{found.path}/config.yaml")
        return next((str(s.value) for s in given if s.key == ("model",)), None)
    return None


def common_base(
    sources: tuple[str, str], both: tuple[Opened, Opened], screen: Screen
) -> dict[str, Site] | None:
    """The sites of the model that both were made from; None if they have no common base."""
    named = [base_of(source, opened) for source, opened in zip(sources, both, strict=True)]
    if None in named:
        return None
    try:
        first, second = (load_model(str(name)) for name in named)
    except EckartError as fault:
        screen.warn(f"their bases cannot be opened, so overlaps are left out: {fault.what}")
        return None
    if fingerprint(first) != fingerprint(second):
        return None
    device = next(both[0].model.parameters()).device
    return below_head(first, sites_of(first.to(device)))


# --- by role -------------------------------------------------------------------------------


def overlaps_by_role(found: list[Pair]) -> dict[str, dict[str, float]]:
    """Median overlaps over the matrices of each role."""
    roles: dict[str, list[Mapping[str, float]]] = {}
    for pair in found:
        if pair.shared is not None:
            roles.setdefault(pair.site.role, []).append(pair.shared)
    return {
        role: {key: median(each[key] for each in group) for key in group[0]}
        for role, group in sorted(roles.items())
    }
