"""Writes report.html of a run: collects its facts, which `report` draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eckart.io.folder import write_text
from eckart.io.run import SPECTRA, Run, read_lines
from eckart.jobs.settings.config import Job
from eckart.jobs.training.change import why_not
from eckart.linear import joint_factors
from eckart.recipe import Handle

ABOUT = ("command", "steps", "seconds", "tokens_per_second", "format", "seed", "data", "versions")
Rows = Sequence[Mapping[str, Any]]
UNDRAWN = {  # state key of a basis -> why it has no overlaps
    "seed": "each is drawn anew from a seed, and shares with the last what chance gives, r / n",
    "warm": "a basis that follows the gradient lives for one step",
    "left_codes": "a basis that is kept in 4 bits is not unpacked to be looked at",
}
LISTED = 300  # characters of a value


def write_page(
    run: Run,
    job: Job,
    handle: Handle,
    memory: Mapping[str, Mapping[str, int]],
    written: tuple[Rows, Rows] | None = None,
    samples: Sequence[tuple[str, str, str]] = (),
) -> None:
    """Write report.html from run.json, and the lines of metrics and spectra.

    `written` are those lines; if None they are read from the run's folder.
    """
    from eckart.report import page  # imports matplotlib

    facts = run.facts
    rows, observed = written or (run.metrics(), read_lines(run.folder, SPECTRA))
    overlaps: dict[str, list[tuple[int, float]]] = {}
    for row in observed:
        for name, share in (row.get("overlaps") or {}).items():
            overlaps.setdefault(name, []).append((row["step"], share))
    last = spectra(handle) if handle.attached else {}
    over_time = {row["step"]: row["spectra"] for row in observed if row.get("spectra")}
    kept = {k: facts[k] for k in (*ABOUT, "recipe", "eval", "warnings") if facts.get(k)}
    text = page(
        {"name": run.folder.name, **kept},
        rows,
        command=f"eckart {job.command} -c {run.folder / 'resolved.yaml'}",
        spectra=over_time | ({rows[-1]["step"]: last} if rows and last else {}),
        overlaps=overlaps,
        unseen=[why for why in (why_not(handle), why_no_overlaps(handle)) if why],
        coverage=handle.coverage.by_role,
        memory=memory,
        samples=samples,
        resolved=[
            (key, str(value)[:LISTED], reason(job, key)) for key, value in job.everything().items()
        ],
    )
    write_text(run.report, text)


def why_no_overlaps(handle: Handle) -> str:
    """The reason why a run with refreshed bases has no overlaps; else empty."""
    update = handle.recipe.update
    kept = update.rule().projector.names if update else ()
    reasons = [UNDRAWN[name] for name in kept if name in UNDRAWN]
    return f"Overlaps of bases are left out: {reasons[0]}." if reasons else ""


def reason(job: Job, key: str) -> str:
    """The reason for a key's value."""
    return job.settled.get(key) or ("as given" if key in job.given else "the default")


@torch.no_grad()
def spectra(handle: Handle) -> dict[str, list[float]]:
    """Singular values of each site's update, largest first, for updates B A."""
    found: dict[str, list[float]] = {}
    for path, by_name in handle.terms().items():
        pair = joint_factors(by_name.values())
        if pair is not None and pair[0].ndim == 2:
            found[path] = product_spectrum(*pair).tolist()
    return found


def product_spectrum(B: Tensor, A: Tensor) -> Tensor:
    """Singular values of B A without forming it: [m, r], [r, n] -> [min(m, r, n)] fp64."""
    R_B = torch.linalg.qr(B.double().cpu(), mode="r").R
    R_A = torch.linalg.qr(A.double().cpu().mT, mode="r").R
    return torch.linalg.svdvals(R_B @ R_A.mT)
