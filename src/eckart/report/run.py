"""The page of a training run: what happened, what was learned, what it cost, why it was so.

Every part is left out where its facts are: a run of ten steps has a page too.
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
    """One self-contained HTML page of a run.

    `facts`: run.json (name, recipe, seconds, eval {before, after}, warnings, versions, ...).
    `metrics`: rows of metrics.jsonl; their keys are step, loss, eval_loss, learning_rate*,
    grad_norm, update_norm, penalty, and others, which get a figure of their own.
    `spectra`: step -> site -> singular values of what was learned (the last step is drawn).
    `overlaps`: site -> [(step, share of the old subspace in the new one)] at refreshes.
    `unseen`: why there are no spectra or overlaps where one would look for them.
    `coverage`: role -> {trained, projected, frozen, unreachable} elements.
    `memory`: {"estimated": {category: bytes}, "measured": {category: bytes}}.
    `samples`: (prompt, before, after). `resolved`: (key, value, reason; "" where given).
    """
    sections = [
        Section("Training", training(metrics)),
        Section("What was learned", learned(spectra or {}, overlaps or {}, unseen)),
        Section("What was trained", reached(coverage or {})),
        Section("Memory", remembered(memory or {})),
        Section("Samples", [sample(*s) for s in samples]),
        Section("Every choice and its reason", choices(resolved)),
        Section("This run", [about(facts)]),
    ]
    return html(str(facts.get("name") or facts.get("run") or "run"), lead(facts), sections, command)


def lead(facts: Mapping[str, Any]) -> str:
    """One sentence: what was trained and what came of it."""
    recipe, score = facts.get("recipe") or {}, facts.get("eval") or {}
    named = recipe.items() if isinstance(recipe, Mapping) else [("recipe", recipe)]
    parts = [", ".join(f"{axis} {words(choice)}" for axis, choice in named if choice)]
    before, after = score.get("before") or {}, score.get("after") or {}
    if "loss" in before and "loss" in after:
        parts.append(f"held-out loss {before['loss']:.3f} → {after['loss']:.3f}")
    if facts.get("seconds"):
        parts.append(f"{facts['seconds']:.0f} s")
    return "; ".join(p for p in parts if p)


def words(choice: Any) -> str:
    """A choice's name."""
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
    """Loss, rate and norms over steps, then whatever else was logged."""
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
    """One metric over steps; None where it is no number."""
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
    """Singular values of the change, its effective rank over time and by place, overlaps."""
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
        found += by_place(last, named)
        found += [roles_of(last, named), matrices_of(last)]
    if overlaps:
        names = without_common(list(overlaps)[:8])
        drawn = [
            Curve(name, [s for s, _ in points], [v for _, v in points], marks=True)
            for name, points in zip(names, overlaps.values(), strict=False)
        ]
        title = "Overlap of a subspace with the one before"
        found.append(curves(title, drawn, "step", "share that stays"))
    return found


SPECTRAL = ("effective rank", "stable rank", f"rank for {ENERGY:.0%}")


def numbers_of(values: Sequence[float]) -> tuple[float, float, int]:
    """What `SPECTRAL` names, of one matrix."""
    s = torch.tensor(values or [0.0], dtype=torch.float64)  # of rank 0 there are no values
    return float(effective_rank(s)), float(stable_rank(s)), rank_for_energy(s, ENERGY)


def effective_ranks(spectra: Iterable[Sequence[float]]) -> list[float]:
    """Of each matrix; 0 for one without values."""
    return [float(effective_rank(torch.tensor(s, dtype=torch.float64))) for s in spectra]


def matrices_of(last: Spectra) -> Table:
    """A line for each matrix."""
    rows = []
    for site, values in last.items():
        effective, stable, needed = numbers_of(values)
        rows.append([site, f"{len(values)}", f"{effective:.1f}", f"{stable:.1f}", f"{needed}"])
    return Table(["matrix", "values", *SPECTRAL], rows, "By matrix")


def roles_of(last: Spectra, named: Mapping[str, str]) -> Table:
    """Medians over the matrices of a role."""
    by_role: dict[str, list[tuple[float, float, int]]] = {}
    for site, values in last.items():
        by_role.setdefault(named[site], []).append(numbers_of(values))
    rows = [
        [name, f"{len(each)}", *(f"{median(column):.1f}" for column in zip(*each, strict=True))]
        for name, each in by_role.items()
    ]
    return Table(["role", "matrices", *SPECTRAL], rows, "Medians by role")


def without_common(paths: Sequence[str]) -> list[str]:
    """Paths without the words that all begin with; a path alone stays whole."""
    if len(paths) < 2:
        return list(paths)
    words = [path.split(".") for path in paths]
    shared = 0
    while min(map(len, words)) > shared + 1 and len({w[shared] for w in words}) == 1:
        shared += 1
    return [".".join(w[shared:]) for w in words]


def by_place(last: Spectra, named: Mapping[str, str]) -> list[Figure]:
    """Effective rank by layer and role, where the names tell both."""
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
    """What each matrix is for: the fewest last words of its path that tell it from other kinds.

    Numbers, and words that all paths have, are none of a kind.
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
    """Mean singular values over the matrices of one role, up to the shortest of them."""
    rows: dict[str, list[Sequence[float]]] = {}
    for site, values in spectra.items():
        rows.setdefault(named[site], []).append(values)
    return {
        name: [sum(column) / len(column) for column in zip(*group, strict=False)]
        for name, group in rows.items()
    }


def relative(values: Sequence[float]) -> list[float]:
    """As shares of the largest; what is zero but for rounding is left out of a log plot."""
    return [v / values[0] if v > 1e-7 * values[0] else nan for v in values]


def reached(coverage: Mapping[str, Mapping[str, int]]) -> list[Figure | Table]:
    """Elements by role and fate; shares in the figure, counts in the table."""
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
    of = f"{present[0]}, " if len(present) == 1 else ""  # one colour alone has no name beside it
    return [
        bars("Share by role", shares, f"{of}% of the role's elements"),
        Table(["role", *states], rows),
    ]


def remembered(memory: Mapping[str, Mapping[str, float]]) -> list[Figure | Table]:
    """Bytes by category, estimated beside measured."""
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


def about(facts: Mapping[str, Any]) -> Table:
    """What run.json says beside what the sections show."""
    rows = [
        [
            key,
            ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else text,
        ]
        for key, value in facts.items()
        if value not in (None, "", [], {}) and (text := str(value))
    ]
    return Table(["fact", "value"], rows)
