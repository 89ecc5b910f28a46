"""`eckart inspect MODEL|ADAPTER|RUN [DATA]`: spectra and effective ranks of its matrices.

For an adapter they are those of its update. With DATA attention heads are analysed too: the range
of their logits, and whether attention, and an adapter's gradient through it, can be computed in
less than quadratic time (decompose/bounds.py). With --against OTHER the difference between two
models is analysed (pairs.py). -o FILE draws the results as a page or one SVG.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from eckart.decompose import product_svd, rank_for_energy
from eckart.decompose.spectra import (
    effective_rank,
    energy_at,
    random_spectrum,
    share_of_random,
    stable_rank,
)
from eckart.errors import UsageError
from eckart.io.models import load_tokenizer, recognise_result
from eckart.io.opening import Opened, open_model
from eckart.jobs.finetune import require_weights
from eckart.jobs.measuring.drift import of_text
from eckart.jobs.measuring.heads import NORMS, TRIED, HeadReach, reaches
from eckart.jobs.measuring.memory import parameter_count
from eckart.jobs.pairs import all_sites, common_base, overlaps_by_role, pairs, whole
from eckart.jobs.pictures import draw, grid, require_picture
from eckart.jobs.settings.config import Job
from eckart.jobs.training import modality, prepare
from eckart.jobs.training.outcome import shown
from eckart.jobs.training.screen import Screen, amount
from eckart.linear import Site, joint_factors
from eckart.recipe import Handle
from eckart.recipe.handle import handle_of
from eckart.report.text import aligned

RANKS = (1, 4, 16, 64)  # at which the energy is printed
LOW = 0.5  # share of a random matrix's effective rank below which a layer is called low-rank
ENERGY = 0.9
MEDIANS = ("stable_rank", "effective_rank", "share_of_random", "rank_90", "rank_90_random",
           "relative_norm")  # fmt: skip
SHADES = " .:-=+*#%@"  # of the text heat map: from low rank to that of a random matrix


@dataclass(frozen=True)
class Matrix:
    """One matrix: its place in the model, and its spectrum [*, k], or that of its update."""

    path: str
    role: str
    shape: tuple[int, int]
    copies: int  # experts
    s: Tensor
    relative: float | None = None  # |update| / |W|

    @property
    def numbers(self) -> dict[str, Any]:
        """Means over experts."""
        m, n = self.shape
        joint = self.s.double().square().reshape(-1, self.s.shape[-1]).sum(0).sqrt()
        return {
            "role": self.role,
            "shape": [m, n],
            "copies": self.copies,
            "stable_rank": float(stable_rank(self.s).mean()),
            "effective_rank": float(effective_rank(self.s).mean()),
            "share_of_random": float(share_of_random(self.s, m, n).mean()),
            "rank_90": rank_for_energy(joint, ENERGY),
            "rank_90_random": rank_for_energy(random_spectrum(m, n), ENERGY),
            "energy": {r: float(energy_at(self.s, r).mean()) for r in RANKS if r <= min(m, n)},
            **({} if self.relative is None else {"relative_norm": self.relative}),
        }


def run(job: Job) -> dict[str, Any]:
    """Print the tables of a source. Returns the --json document."""
    screen = Screen(quiet=job.flags.json)
    require_weights(job)
    if job.flags.out:
        require_picture(job.flags.out)
    found = of_pair(job, screen) if job.options.get("against") else of_one(job, screen)
    if job.flags.out:
        draw(found, job.flags.out)
        screen.line("drawn", job.flags.out, result=True)
    return {**found, "picture": job.flags.out, "warnings": list(screen.warnings)}


def of_one(job: Job, screen: Screen) -> dict[str, Any]:
    """Inspect a model, or the update of an adapter."""
    opened = opened_with_terms(str(job.model))
    handle = opened.handle
    kind = "adapter" if handle and handle.weights.base == "frozen" else "model"
    matrices = added(handle) if handle and kind == "adapter" else weights(opened)
    if not matrices:
        raise UsageError("there is no matrix to look at", [(str(job.model), kind)])
    count = parameter_count(opened.model, handle)
    made = f"; {handle.weights.slug}" if handle else ""
    of = "model" if kind == "model" else "adapter on a model"
    facts = f"{of} of {amount(count)} parameters, {len(matrices)} matrices{made}"
    screen.line(kind, facts, shown(str(job.model)))
    found = {matrix.path: matrix.numbers for matrix in matrices}
    table(screen, by_role(found), kind)
    if kind == "model":
        picture(screen, found)
    heads = looked_at_heads(job, opened, screen) if job.data.train else []
    return {
        "command": "inspect",
        "exit": 0,
        "source": job.model,
        "kind": kind,
        "method": handle.weights.slug if handle else None,
        "parameters": count,
        "roles": by_role(found),
        "matrices": found,
        "heads": [head.document() for head in heads],
    }


def of_pair(job: Job, screen: Screen) -> dict[str, Any]:
    """Inspect the difference between two checkpoints, and the overlap of their changes."""
    names = str(job.model), str(job.options["against"])
    one, other = (opened_with_terms(name) for name in names)
    base = common_base(names, (one, other), screen)
    found, count = pairs(one, other, base)
    screen.line("pair", f"{len(found)} of {count} matrices differ", " against ".join(names))
    matrices = {pair.site.path: matrix(pair.site, pair.s, pair.relative).numbers for pair in found}
    for pair in found:
        matrices[pair.site.path]["shared"] = pair.shared
    roles, lie = by_role(matrices), overlaps_by_role(found)
    if found:
        table(screen, roles, "pair")
    if lie:
        overlaps(screen, lie)
    return {
        "command": "inspect",
        "exit": 0,
        "source": names[0],
        "against": names[1],
        "kind": "pair",
        "one_base": base is not None,
        "changed": len(found),
        "unchanged": count - len(found),
        "roles": roles,
        "overlaps": lie,
        "matrices": matrices,
        "heads": [],
    }


# --- what is looked at ---------------------------------------------------------------------


def opened_with_terms(source: str) -> Opened:
    """Open a model; a factored one with the handle of its terms."""
    opened = open_model(source)
    found = recognise_result(source)
    if found.kind == "factored":
        opened = Opened(opened.model, handle_of(opened.model), found.path)
    opened.model.to(prepare.device()).eval()
    return opened


def added(handle: Handle) -> list[Matrix]:
    """The update of each matrix by an adapter, without terms that are not linear."""
    found = []
    for path, terms in handle.terms().items():
        site = handle.sites[path]
        if all(term.linear for term in terms.values()):
            base = handle.originals.get(path)
            W = site.weight(torch.float32) if base is None else base.float()
            s = spectrum_of_update(handle, site)
            found.append(matrix(site, s, float(s.norm() / W.norm().clamp_min(1e-30))))
    return found


@torch.no_grad()
def spectrum_of_update(handle: Handle, site: Site) -> Tensor:
    """Singular values of the update, [*, k], computed from its factors if it has any."""
    pair = joint_factors(handle.parts()[site.path].values())
    thin = pair is not None and pair[0].shape[-1] <= min(site.shape)
    if pair is not None and thin and site.path not in handle.originals:
        return product_svd(*pair)[1]
    module: Any = site.module
    change = module.merged(site.param) - site.weight(torch.float64)
    return torch.linalg.svdvals(change.float())


@torch.no_grad()
def weights(opened: Opened) -> list[Matrix]:
    """The matrices of a model; factored ones as the product of their factors."""
    return [
        matrix(site, torch.linalg.svdvals(whole(opened, site).float()))
        for site in all_sites(opened).values()
        if site.role.split(".")[0] not in ("embedding", "head", "router", "conv", "other")
    ]


def matrix(site: Site, s: Tensor, relative: float | None = None) -> Matrix:
    copies = math.prod(site.leading)
    return Matrix(site.path, site.role, site.shape, copies, s.detach().cpu(), relative)


def by_role(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The median over the matrices of a role."""
    roles: dict[str, list[Mapping[str, Any]]] = {}
    for numbers in found.values():
        roles.setdefault(numbers["role"], []).append(numbers)
    return {role: medians(each) for role, each in sorted(roles.items())}


def medians(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the numbers of several matrices."""
    energies = [numbers["energy"] for numbers in each]
    return {
        "matrices": len(each),
        "shape": each[0]["shape"],
        **{key: median(numbers[key] for numbers in each) for key in MEDIANS if key in each[0]},
        "energy": {r: median(e[r] for e in energies if r in e) for r in energies[0]},
    }


# --- what is said --------------------------------------------------------------------------


def table(screen: Screen, roles: Mapping[str, Mapping[str, Any]], kind: str) -> None:
    """A line for each role; for a model with the values of a random matrix."""
    ranks = [r for r in RANKS if any(r in numbers["energy"] for numbers in roles.values())]
    head = ["role", "maps", "shape", "stable", "effective", f"{ENERGY:.0%} at"]
    head += ["of random"] if kind == "model" else ["of |W|"]
    rows = [[*head, *(f"energy@{r}" for r in ranks)]]
    for role, numbers in roles.items():
        m, n = numbers["shape"]
        last = numbers["share_of_random"] if kind == "model" else numbers["relative_norm"]
        chance = f" ({numbers['rank_90_random']:.0f})" if kind == "model" else ""
        row = [role, str(numbers["matrices"]), f"{m} x {n}", f"{numbers['stable_rank']:.1f}"]
        row += [f"{numbers['effective_rank']:.1f}", f"{numbers['rank_90']:.0f}{chance}"]
        row += [f"{last:.0%}"] + [percent(numbers["energy"].get(r)) for r in ranks]
        rows.append(row)
    screen.line("ranks", aligned(rows), result=True)
    if kind == "model":
        screen.line("", "(in brackets, and `of random`: a random matrix of the same shape)")


def overlaps(screen: Screen, roles: Mapping[str, Mapping[str, float]]) -> None:
    """Print the overlap of two changes of one base, by role."""
    rows = [["role", "rank", "left", "right", "cosine", "effective, one", "other"]]
    for role, n in roles.items():
        sides = [f"{n[side]:.0%} ({n[f'{side}_by_chance']:.0%})" for side in ("left", "right")]
        ranks = [f"{n[f'effective_rank_{which}']:.1f}" for which in ("one", "other")]
        rows.append([role, f"{n['rank']:.0f}", *sides, f"{n['cosine']:+.2f}", *ranks])
    screen.line("shared", aligned(rows), result=True)
    screen.line("", "(share of the leading directions that both changes have; by chance)")


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def picture(screen: Screen, found: Mapping[str, Mapping[str, Any]]) -> None:
    """A line for each role, a character for each layer: darker is closer to random."""
    roles, _, values = grid(found, "share_of_random")
    signs = [f"|{''.join(map(shade, row))}|" for row in values]
    screen.line("layers", aligned(sorted(zip(roles, signs, strict=True)), "  "), result=True)
    screen.line("", f"(a sign a layer, first to last: '{SHADES}' from rank 0 to random)")
    shares = sorted((numbers["share_of_random"], path) for path, numbers in found.items())
    if low := [path for share, path in shares if share < LOW]:
        worst = ", ".join(low[:3])
        screen.line("low", f"{len(low)} below {LOW:.0%} of random; lowest: {worst}", result=True)
    else:
        screen.line("low", f"no matrix is below {LOW:.0%} of a random one", result=True)


def shade(share: float) -> str:
    """The character for a share from 0 to 1; blank if a layer has no such matrix."""
    if math.isnan(share):
        return " "
    return SHADES[max(0, min(len(SHADES) - 1, int(share * len(SHADES))))]


def looked_at_heads(job: Job, opened: Opened, screen: Screen) -> list[HeadReach]:
    """Analyse attention heads on DATA, with and without the adapter."""
    tokenizer = load_tokenizer(str(job.model))
    modality.require_tokens(tokenizer, opened.model)
    context = modality.context_of(opened.model)
    text = of_text(tokenizer, context, modality.entries(job), length=TRIED)
    heads = reaches(opened.model, text, opened.handle)
    if not heads:
        screen.warn("this model's attention is not one that can be looked into")
        return []
    counts = {kind: sum(h.regime == kind for h in heads) for kind in ("easy", "measured")}
    lowest = min(heads, key=lambda head: head.centred)
    screen.line(
        "heads",
        f"{counts['easy']} of {len(heads)} easy at {heads[0].length} tokens of {text.name} (fewer "
        f"features than tokens would do, by the bound); {counts['measured']} more as measured",
        result=True,
    )
    screen.line(
        "",
        f"logits reach {median(h.reach for h in heads):.2f} (median), with centred keys "
        f"{median(h.centred for h in heads):.2f}, least {lowest.centred:.2f} in layer "
        f"{lowest.layer} head {lowest.head}: degree {lowest.degree}, "
        f"{counted(lowest.features)} features",
        result=True,
    )
    if opened.handle is not None and opened.handle.weights.base == "frozen":
        turned = sum(h.regime_by_bound != h.regime_without for h in heads)
        said = f"the adapter moves {turned} of them across the line"
        scales = [s for h in heads if h.regime_by_bound == "easy" if (s := h.largest_easy_scale)]
        said += f"; the easy ones stay so up to {min(scales):.2g} times its scale" if scales else ""
        screen.line("", said, result=True)
    norms(screen, heads)
    return heads


def norms(screen: Screen, heads: Sequence[HeadReach]) -> None:
    """A line for each layer: the largest entries, the theory's threshold, and the conclusion.

    The theory gives sqrt(ln L) up to a constant, so the conclusion is drawn from the reach.
    """
    mark = f"|q| ({math.sqrt(math.log(max(2, heads[0].length))):.1f})"
    rows = [["layer", mark, "|k|", "|k| centred", "|v|", "reach", "error", "easy"]]
    for number in sorted({h.layer for h in heads}):
        layer = [h for h in heads if h.layer == number]
        tops = [f"{max(h.norms[name] for h in layer):.2f}" for name in NORMS]
        errors = [min(h.errors.values()) for h in layer if h.errors]
        best = "-" if not errors else ">1" if min(errors) > 1 else f"{min(errors):.1e}"
        easy = sum(h.regime != "hard" for h in layer)
        reach = f"{max(h.centred for h in layer):.2f}"
        rows.append([str(number), *tops, reach, best, f"{easy}/{len(layer)}"])
    screen.line("norms", aligned(rows), result=True)
    screen.line("", "(largest entries, |q| beside sqrt(ln L); reach: of logits, with centred keys;")
    screen.line("", "error: of a gradient by polynomials, relative, of the head where it is least)")


def counted(number: int) -> str:
    """A count as `1,287`, or `2.5e+26` if large."""
    return f"{number:,}" if number < 10**6 else f"{float(number):.2g}"
