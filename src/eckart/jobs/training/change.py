"""Spectra of full training: singular values of W - W0 of some matrices of every role.

W0 is copied before the first step; a resumed run loads its base first and copies the same. If all
matrices would take too much memory or time, some of each role are chosen, spread over the depth.
If even one of each is too much there are none, and `why_not` gives the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from eckart.jobs.measuring.memory import in_words, size
from eckart.linear import Site
from eckart.recipe import Handle

COPIED = 256 * 10**6  # bytes of copies at most
WORK = 4e10  # FLOPs of all decompositions of one step at most: a second or two of one core


def starts(handle: Handle) -> dict[str, Tensor]:
    """Copies of the observed matrices W0 [m, n] on the CPU, by path; empty if terms are trained."""
    return {site.path: matrix(site).clone() for site in watched(handle)}


@torch.no_grad()
def changes(handle: Handle, before: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Singular values of W - W0, largest first, by path. Matrices with NaN or inf are left out."""
    found = {}
    for path, start in before.items():
        change = matrix(handle.sites[path]).float() - start.float()
        if change.isfinite().all():
            found[path] = torch.linalg.svdvals(change).tolist()
    return found


def why_not(handle: Handle) -> str:
    """The reason why a full training has no spectra; empty if it has some, or trains terms."""
    if not of_matrices(handle) or watched(handle):
        return ""
    return (
        "Spectra of the change are left out: one matrix of each role would take more than "
        f"{in_words(COPIED)} of copies, or too long to decompose."
    )


def watched(handle: Handle) -> list[Site]:
    """The observed matrices: as many as the limits allow, equally many of each role."""
    by_role: dict[str, list[Site]] = {}
    for site in of_matrices(handle):
        by_role.setdefault(site.role, []).append(site)
    for count in range(max(map(len, by_role.values()), default=0), 0, -1):
        chosen = [site for sites in by_role.values() for site in spread(sites, count)]
        if sum(size(s.raw) for s in chosen) <= COPIED and sum(map(work, chosen)) <= WORK:
            return chosen
    return []


def of_matrices(handle: Handle) -> list[Site]:
    """The trained matrices, without embeddings, heads, tied matrices and experts."""
    if handle.attached or handle.weights.base != "trained":
        return []
    plain = (site for site in handle.sites.values() if not site.leading and not site.ties)
    return [site for site in plain if site.role not in ("embedding", "head")]


def spread(sites: Sequence[Site], count: int) -> list[Site]:
    """`count` of the sites, equally spaced; a single one is from the middle."""
    count = min(count, len(sites))
    return [sites[int((i + 0.5) * len(sites) / count)] for i in range(count)]


def work(site: Site) -> float:
    """FLOPs of computing a site's singular values."""
    m, n = site.shape
    return 4.0 * m * n * min(m, n)


def matrix(site: Site) -> Tensor:
    """A site's current matrix [m, n] on the CPU."""
    return site.weight().cpu()
