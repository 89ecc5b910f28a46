"""The HTML page of a training run: curves, spectra, coverage, memory, samples, settings.

A section without data is left out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import nan
from statistics import median
from typing import Any

import torch

from eckart.decompose import rank_for_energy
from eckart.decompose.spectra import effective_rank, stable_rank
from eckart.report.figures import Curve, Figure, bars, curves, heat
from eckart.report.html import Section, Table, Text, html

Spectra = Mapping[str, Sequence[float]]  # site or role -> singular values, largest first
MB = 1e6
ENERGY = 0.9


def page(
    facts: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    *,
    command: str = "",
    spectra: Mapping[int, Spectra] | None = None,
    overlaps: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    unseen: Sequence[str] = (),
    coverage: Mapping[str, Mapping[str, int]] | None = None,
    memory: Mapping[str, Mapping[str, float]] | None = None,
    samples: Sequence[tuple[str, str, str]] = (),
    resolved: Sequence[tuple[str, str, str]] = (),
) -> str:
    """The self-contained HTML page of a run.

    `facts`: run.json (name, recipe, seconds, eval {before, after}, warnings, versions, ...).
    `metrics`: rows of metrics.jsonl; their keys are step, loss, eval_loss, learning_rate*,
    grad_norm, update_norm, penalty; any other key gets a figure of its own.
    `spectra`: step -> site -> singular values of the learned update.
    `overlaps`: site -> [(step, share of the old subspace in the new one)] at refreshes.
    `unseen`: reasons for missing spectra or overlaps.
    `coverage`: role -> number of elements {trained, projected, frozen, unreachable}.
    `memory`: {"estimated": {category: bytes}, "measured": {category: bytes}}.
    `samples`: (prompt, before, after). `resolved`: (key, value, reason; "" where the user set it).
    """
    sections = [
        Section("Training", training(metrics)),
        Section("What was learned", learned(spectra or {}, overlaps or {}, unseen)),
        Section("What was trained", coverage_items(coverage or {})),
        Section("Memory", memory_items(memory or {})),
        Section("Samples", [sample(*s) for s in samples]),
        Section("Every choice and its reason", choices(resolved)),
        Section("This run", [facts_table(facts)]),
    ]
    return html(
        str(facts.get("name") or facts.get("run") or "run"), summary(facts), sections, command
    )


def summary(facts: Mapping[str, Any]) -> str:
    """The recipe and the result in one line."""
    recipe, score = facts.get("recipe") or {}, facts.get("eval") or {}
    named = recipe.items() if isinstance(recipe, Mapping) else [("recipe", recipe)]
    parts = [", ".join(f"{axis} {name_of(choice)}" for axis, choice in named if choice)]
    before, after = score.get("before") or {}, score.get("after") or {}
    if "loss" in before and "loss" in after:
        parts.append(f"held-out loss {before['loss']:.3f} → {after['loss']:.3f}")
    if facts.get("seconds"):
        parts.append(f"{facts['seconds']:.0f} s")
    return "; ".join(p for p in parts if p)


def name_of(choice: Any) -> str:
    """The name of a choice."""
    return str(choice.get("name", "")) if isinstance(choice, Mapping) else str(choice)


# --- sections ------------------------------------------------------------------------------

DRAWN = {  # title -> the metrics in it, the label of the axis, is it logarithmic?
    "Loss": (("loss", "eval_loss"), "nats", False),
    "Learning rate": (("learning_rate",), "learning rate", False),
    "Gradient and update norms": (("grad_norm", "update_norm"), "norm", True),
    "Penalty": (("penalty",), "penalty", False),
}
NAMES = {"loss": "training", "eval_loss": "held out", "grad_norm": "gradient"}
NO_FIGURE = {"step", "epoch", "seconds", "total_flos"}


def training(metrics: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Figures of loss, learning rate and norms over steps, then of all other logged metrics."""
    found: list[Figure] = []
    taken: set[str] = set(NO_FIGURE)
    for title, (stems, label, logarithmic) in DRAWN.items():
        keys = [k for k in keys_of(metrics) if any(k == s or k.startswith(s + "_") for s in stems)]
        keys = [k for k in keys if k not in taken]
        taken.update(keys)
        drawn = [c for key in keys if (c := curve(metrics, key)) is not None]
        if drawn:
            positive = all(y > 0 for c in drawn for y in c.y)
            found.append(curves(title, drawn, "step", label, log_y=logarithmic and positive))
    rest = [k for k in keys_of(metrics) if k not in taken]
    for key in rest:
        if (c := curve(metrics, key)) is not None and len(c.x) > 1:
            found.append(curves(key.replace("_", " "), [c], "step", key.replace("_", " ")))
    return found


def keys_of(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in metrics for key in row))


def curve(metrics: Sequence[Mapping[str, Any]], key: str) -> Curve | None:
    """One metric over steps; None where it has no numeric values."""
    points = [
        (row["step"], row[key])
        for row in metrics
        if isinstance(row.get(key), int | float) and not isinstance(row.get(key), bool)
    ]
    if not points:
        return None
    x, y = zip(*points, strict=True)
    return Curve(NAMES.get(key, key.replace("_", " ")), x, y)


def learned(
    spectra: Mapping[int, Spectra],
    overlaps: Mapping[str, Sequence[tuple[int, float]]],
    unseen: Sequence[str] = (),
) -> list[Figure | Table | Text]:
    """Singular values and effective ranks of the update, and overlaps of subspaces."""
    found: list[Figure | Table | Text] = [Text(why) for why in unseen]
    if spectra:
        last, named = spectra[max(spectra)], roles({site for at in spectra.values() for site in at})
        by_role = grouped(last, named)
        drawn = [
            Curve(role, range(1, len(values) + 1), relative(values))
            for role, values in by_role.items()
            if values and values[0] > 0
        ]
        if drawn:
            title = "Singular values of what was learned"
            found.append(curves(title, drawn, "index", "share of the largest", log_y=True))
        if len(spectra) > 1:
            steps = sorted(spectra)
            by_step = [grouped(spectra[step], named) for step in steps]
            over = [
                Curve(r, steps, effective_ranks(at.get(r, ()) for at in by_step)) for r in by_role
            ]
            found.append(curves("Effective rank", over, "step", "effective rank"))
        found += rank_by_layer(last, named)
        found += [table_by_role(last, named), table_by_matrix(last)]
    if overlaps:
        names = without_common_prefix(list(overlaps)[:8])
        drawn = [
            Curve(name, [s for s, _ in points], [v for _, v in points], marks=True)
            for name, points in zip(names, overlaps.values(), strict=False)
        ]
        title = "Overlap of a subspace with the one before"
        found.append(curves(title, drawn, "step", "share that stays"))
    return found


SPECTRAL = ("effective rank", "stable rank", f"rank for {ENERGY:.0%}")


def spectral_numbers(values: Sequence[float]) -> tuple[float, float, int]:
    """The numbers named in `SPECTRAL` for one matrix, from its singular values."""
    s = torch.tensor(values or [0.0], dtype=torch.float64)  # rank 0 has no singular values
    return float(effective_rank(s)), float(stable_rank(s)), rank_for_energy(s, ENERGY)


def effective_ranks(spectra: Iterable[Sequence[float]]) -> list[float]:
    """The effective rank of each spectrum; 0 for an empty one."""
    return [float(effective_rank(torch.tensor(s, dtype=torch.float64))) for s in spectra]


def table_by_matrix(last: Spectra) -> Table:
    """A table of spectral numbers, one row per matrix."""
    rows = []
    for site, values in last.items():
        effective, stable, needed = spectral_numbers(values)
        rows.append([site, f"{len(values)}", f"{effective:.1f}", f"{stable:.1f}", f"{needed}"])
    return Table(["matrix", "values", *SPECTRAL], rows, "By matrix")


def table_by_role(last: Spectra, named: Mapping[str, str]) -> Table:
    """A table of spectral numbers, the median over the matrices of each role."""
    by_role: dict[str, list[tuple[float, float, int]]] = {}
    for site, values in last.items():
        by_role.setdefault(named[site], []).append(spectral_numbers(values))
    rows = [
        [name, f"{len(each)}", *(f"{median(column):.1f}" for column in zip(*each, strict=True))]
        for name, each in by_role.items()
    ]
    return Table(["role", "matrices", *SPECTRAL], rows, "Medians by role")


def without_common_prefix(paths: Sequence[str]) -> list[str]:
    """Dotted paths without their common prefix; a single path stays whole."""
    if len(paths) < 2:
        return list(paths)
    words = [path.split(".") for path in paths]
    shared = 0
    while min(map(len, words)) > shared + 1 and len({w[shared] for w in words}) == 1:
        shared += 1
    return [".".join(w[shared:]) for w in words]


def rank_by_layer(last: Spectra, named: Mapping[str, str]) -> list[Figure]:
    """A heat map of effective rank by layer and role, where paths have layer numbers."""
    cells: dict[str, dict[int, float]] = {}
    for site, values in last.items():
        layer = next((int(part) for part in site.split(".") if part.isdigit()), None)
        if layer is not None:
            cells.setdefault(named[site], {})[layer] = effective_ranks([values])[0]
    layers = sorted({layer for row in cells.values() for layer in row})
    if len(cells) < 2 or not layers:
        return []
    names = [f"layer {layer}" if layer == layers[0] else f"{layer}" for layer in layers]
    ranks = [[row.get(layer, nan) for layer in layers] for row in cells.values()]
    return [heat("Effective rank by layer and role", list(cells), names, ranks)]


def roles(sites: Collection[str]) -> dict[str, str]:
    """The role of each matrix: the shortest suffix of its path that is unique to its kind.

    Layer numbers and words common to all paths are ignored.
    """
    words = {site: [word for word in site.split(".") if not word.isdigit()] for site in sites}
    common = set.intersection(*map(set, words.values())) if words else set()
    kinds = {s: (*(w for w in own[:-1] if w not in common), own[-1]) for s, own in words.items()}
    distinct = set(kinds.values())

    def shortest(kind: tuple[str, ...]) -> str:
        for n in range(1, len(kind)):
            if sum(other[-n:] == kind[-n:] for other in distinct) == 1:
                return ".".join(kind[-n:])
        return ".".join(kind)

    return {site: shortest(kind) for site, kind in kinds.items()}


def grouped(spectra: Spectra, named: Mapping[str, str]) -> dict[str, list[float]]:
    """Mean singular values over the matrices of each role, cut to the shortest spectrum."""
    rows: dict[str, list[Sequence[float]]] = {}
    for site, values in spectra.items():
        rows.setdefault(named[site], []).append(values)
    return {
        name: [sum(column) / len(column) for column in zip(*group, strict=False)]
        for name, group in rows.items()
    }


def relative(values: Sequence[float]) -> list[float]:
    """Values divided by the largest; values of rounding size become NaN, for a log plot."""
    return [v / values[0] if v > 1e-7 * values[0] else nan for v in values]


def coverage_items(coverage: Mapping[str, Mapping[str, int]]) -> list[Figure | Table]:
    """Trained, projected, frozen and unreachable elements by role: shares and counts."""
    if not coverage:
        return []
    states = ("trained", "projected", "frozen", "unreachable")
    whole = {name: sum(row.values()) or 1 for name, row in coverage.items()}
    shares = {
        name: {s: 100 * row[s] / whole[name] for s in states if row.get(s)}
        for name, row in coverage.items()
    }
    rows = [[name, *(f"{row.get(s, 0):,}" for s in states)] for name, row in coverage.items()]
    present = [s for s in states if any(s in share for share in shares.values())]
    of = f"{present[0]}, " if len(present) == 1 else ""  # bars draws no legend for one category
    return [
        bars("Share by role", shares, f"{of}% of the role's elements"),
        Table(["role", *states], rows),
    ]


def memory_items(memory: Mapping[str, Mapping[str, float]]) -> list[Figure | Table]:
    """Tensor bytes by category, estimated and measured."""
    if not memory:
        return []
    drawn = {n: {c: b / MB for c, b in parts.items() if b} for n, parts in memory.items()}
    categories = list(dict.fromkeys(c for parts in memory.values() for c in parts))
    rows = [[c, *(f"{memory[n].get(c, 0) / MB:,.2f}" for n in memory)] for c in categories]
    rows.append(["sum", *(f"{sum(memory[n].values()) / MB:,.2f}" for n in memory)])
    return [bars("Tensor bytes", drawn, "MB"), Table(["MB", *memory], rows)]


def sample(prompt: str, before: str, after: str) -> Text:
    return Text(f"{prompt}\n\n--- before\n{before}\n\n--- after\n{after}", as_is=True)


def choices(resolved: Sequence[tuple[str, str, str]]) -> list[Table]:
    rows = [[key, value, reason or "as given"] for key, value, reason in resolved]
    return [Table(["key", "value", "reason"], rows)] if rows else []


def facts_table(facts: Mapping[str, Any]) -> Table:
    """All entries of run.json as a table."""
    rows = [
        [
            key,
            ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else text,
        ]
        for key, value in facts.items()
        if value not in (None, "", [], {}) and (text := str(value))
    ]
    return Table(["fact", "value"], rows)
