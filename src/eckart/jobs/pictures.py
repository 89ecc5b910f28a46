"""Draws the results of `eckart inspect` as a page of figures, or the first figure as an SVG."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import nan
from pathlib import Path
from statistics import median
from typing import Any

from eckart.errors import UsageError
from eckart.io.folder import require_writable, write_text

COLOURS = {  # a page's; an SVG file needs its own
    "--ink": "#1a1a1a",
    "--faint": "#cccccc",
    **{
        f"--c{i}": colour
        for i, colour in enumerate(
            ["#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#0a7ea4", "#bc4c00", "#6e7781"]
        )
    },
}
DRAWN = {  # title -> key of each matrix; an SVG has the first that exists
    "Effective rank as a share of a random matrix'": "share_of_random",
    "Effective rank": "effective_rank",
    "Rank for 90 % of the energy": "rank_90",
    "Size of the change as a share of the matrix": "relative_norm",
}


def require_picture(out: str) -> None:
    """Raise UsageError unless the name ends in .html or .svg, FileError if it is not writable."""
    if Path(out).suffix.lower() not in (".html", ".svg"):
        raise UsageError(
            f"cannot draw {out}", [("-o", "ends in neither .html nor .svg")], "Type -o layers.html"
        )
    require_writable(Path(out).resolve().parent)


def draw(found: Mapping[str, Any], out: str) -> None:
    """Draw a document of `inspect`: a page or an SVG, by the file's ending."""
    suffix = Path(out).suffix.lower()
    from eckart.report.figures import heat  # imports matplotlib
    from eckart.report.html import Section, html

    matrices = found["matrices"]
    figures = [
        heat(title, *grid(matrices, key))
        for title, key in DRAWN.items()
        if matrices and all(key in numbers for numbers in matrices.values())
    ]
    if found["kind"] == "adapter":
        figures = figures[1:]  # compared with a random matrix, every adapter is low-rank
    heads = found["heads"]
    reaches = [heat("Reach of the logits, keys centred", *by_head(heads))] if heads else []
    if not figures + reaches:
        raise UsageError("there is nothing to draw", [(found["source"], "no matrix differs")])
    if suffix == ".svg":
        write_text(Path(out), alone((figures + reaches)[0].svg))
        return
    names = " against ".join(str(found[key]) for key in ("source", "against") if found.get(key))
    sections = [Section("Matrices", figures), Section("Heads", reaches)]
    lead = f"{found['kind']}, {len(matrices)} matrices"
    write_text(Path(out), html(names, lead, sections))


def grid(
    matrices: Mapping[str, Mapping[str, Any]], key: str
) -> tuple[list[str], list[str], list[list[float]]]:
    """Roles, layers, and the median of a number in each; NaN if a layer lacks the role."""
    cells: dict[str, dict[int, list[float]]] = {}
    for path, numbers in matrices.items():
        layer = re.search(r"(?:^|\.)(\d+)\.", path)
        at = cells.setdefault(numbers["role"], {})
        at.setdefault(int(layer[1]) if layer else 0, []).append(float(numbers[key]))
    layers = sorted({layer for row in cells.values() for layer in row})
    values = [
        [median(row[layer]) if layer in row else nan for layer in layers] for row in cells.values()
    ]
    return list(cells), [f"layer {n}" if n == layers[0] else str(n) for n in layers], values


def by_head(heads: list[dict[str, Any]]) -> tuple[list[str], list[str], list[list[float]]]:
    """Layers, heads, and the reach of each head's logits."""
    layers = sorted({head["layer"] for head in heads})
    count = 1 + max(head["head"] for head in heads)
    reach = {(head["layer"], head["head"]): head["centred"] for head in heads}
    values = [[reach.get((layer, i), nan) for i in range(count)] for layer in layers]
    return [f"layer {n}" for n in layers], [f"head {i}" for i in range(count)], values


def alone(svg: str) -> str:
    """A figure as a standalone SVG file, with its colours and namespace."""
    rules = "".join(f"{name}:{colour};" for name, colour in COLOURS.items())
    style = f"<style>svg{{{rules}background:#fff}}</style>"
    head = svg.index(">") + 1
    return svg[:head] + style + svg[head:]
