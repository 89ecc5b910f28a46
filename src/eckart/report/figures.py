"""SVG figures whose colours are CSS variables, so that one figure serves light and dark pages.

matplotlib draws with placeholder colours, which are replaced by variables: --ink for text and
axes, --faint for the grid, --c0 to --c7 for curves. Text stays text, so it can be searched and
read by screen readers. Output is deterministic, byte for byte.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

INK, FAINT = "#010101", "#020202"
CURVES = tuple(f"#0301{i:02x}" for i in range(8))
VARIABLES = {INK: "--ink", FAINT: "--faint"} | {c: f"--c{i}" for i, c in enumerate(CURVES)}
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")  # curves are told apart without colour, too
WIDE, HIGH = 5.2, 3.1  # inches; text is at least 10 pixels high on a phone
BELOW, LINE = 4, 0.2  # most curves with a legend inside; height of a legend line in inches
NUMBERED = 12  # most columns of a heat map with numbers in its cells
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.4,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}


@dataclass(frozen=True)
class Curve:
    """One line of a plot, with an optional band from `low` to `high`."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    marks: bool = False
    color: int | None = None  # index of --c0 to --c7; None: the next one


@dataclass(frozen=True)
class Figure:
    """An SVG figure with its title and alternative text."""

    title: str
    alt: str
    svg: str = field(repr=False)


def curves(
    title: str,
    drawn: Sequence[Curve],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    alt: str = "",
) -> Figure:
    """A line plot. Values that are not finite leave a gap."""
    with matplotlib.rc_context(STYLE):
        below = -(-len(drawn) // 2) if len(drawn) > BELOW else 0  # lines of the legend
        canvas = Canvas(figsize=(WIDE, HIGH + LINE * below), layout="constrained")
        axes = canvas.add_subplot()
        for i, c in enumerate(drawn):
            color = CURVES[(i if c.color is None else c.color) % len(CURVES)]
            mark = MARKS[i % len(MARKS)] if c.marks or len(c.x) < 3 else None
            axes.plot(c.x, c.y, color=color, marker=mark, label=c.label)
            if c.low is not None and c.high is not None:
                axes.fill_between(c.x, c.low, c.high, color=color, alpha=0.15, linewidth=0)
        if log_x:
            axes.set_xscale("log")
        elif all(float(x).is_integer() for c in drawn for x in c.x):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if log_y:
            axes.set_yscale("log")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if below:
            canvas.legend(loc="outside lower center", ncols=2)
        elif len(drawn) > 1:
            axes.legend()
        return to_svg(canvas, title, alt or alt_text(title, drawn, y_label))


def alt_text(title: str, drawn: Sequence[Curve], y_label: str) -> str:
    """Alternative text for a line plot: where each curve begins and ends."""
    ends = [f"{c.label} from {c.y[0]:.3g} to {c.y[-1]:.3g}" for c in drawn if len(c.y)]
    return f"{title}. {y_label}: {'; '.join(ends)}."


def bars(title: str, groups: Mapping[str, Mapping[str, float]], x_label: str) -> Figure:
    """Stacked horizontal bars: group -> category -> value, one colour per category."""
    names = list(groups)
    categories = list(dict.fromkeys(c for values in groups.values() for c in values))
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        below = -(-len(categories) // 3) if len(categories) > 1 else 0  # lines of the legend
        height = max(1.8, 0.9 + 0.42 * len(names)) + LINE * below
        canvas = Canvas(figsize=(WIDE, height), layout="constrained")
        axes = canvas.add_subplot()
        for i, category in enumerate(categories):
            left = [sum(groups[n].get(c, 0.0) for c in categories[:i]) for n in names]
            widths = [groups[n].get(category, 0.0) for n in names]
            color = CURVES[i % len(CURVES)]
            axes.barh(names, widths, 0.6, left=left, color=color, label=category)
        axes.invert_yaxis()
        axes.set_xlabel(x_label)
        if below:
            canvas.legend(loc="outside lower center", ncols=3)  # below the axis' label
        parts = [
            f"{name}: " + ", ".join(f"{c} {v:.3g}" for c, v in groups[name].items())
            for name in names
        ]
        return to_svg(canvas, title, f"{title}, {x_label}. {'; '.join(parts)}.")


def intervals(title: str, rows: Sequence[tuple[str, float, float, float]], x_label: str) -> Figure:
    """A forest plot: (label, mean, low, high) per row, and a vertical line at 0."""
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        canvas = Canvas(figsize=(WIDE, max(1.6, 0.9 + 0.4 * len(rows))), layout="constrained")
        axes = canvas.add_subplot()
        for i, (_, mean, low, high) in enumerate(rows):
            axes.plot([low, high], [i, i], color=CURVES[0], linewidth=2)
            axes.plot([mean], [i], color=CURVES[0], marker="o")
        axes.axvline(0, color=INK, linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(x_label)
        said = [
            f"{label} {mean:.3g} from {low:.3g} to {high:.3g}" for label, mean, low, high in rows
        ]
        return to_svg(canvas, title, f"{title}, {x_label}. {'; '.join(said)}.")


def heat(
    title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]]
) -> Figure:
    """A heat map of values[row][column]; NaN cells stay empty."""
    known = [v for row in values for v in row if v == v]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        canvas = Canvas(figsize=(WIDE, 1.0 + 0.32 * len(rows)), layout="constrained")
        axes = canvas.add_subplot()
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if value != value:
                    continue
                share = (value - low) / (high - low) if high > low else 0.5
                axes.fill_between(
                    [j - 0.5, j + 0.5], i - 0.5, i + 0.5, color=CURVES[0],
                    alpha=0.1 + 0.6 * share, linewidth=0,
                )  # fmt: skip
                if len(columns) <= NUMBERED:
                    axes.text(j, i, f"{value:.3g}", ha="center", va="center", fontsize=9)
        step = -(-len(columns) // NUMBERED)  # every step-th column is labelled
        shown = range(0, len(columns), step)
        axes.set_xticks(shown, [columns[j] for j in shown], rotation=45 if len(shown) > 8 else 0)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        alt = f"{title}: {len(rows)} by {len(columns)} values from {low:.3g} to {high:.3g}."
        return to_svg(canvas, title, alt)


def to_svg(canvas: Any, title: str, alt: str) -> Figure:
    """The canvas as inline SVG: CSS variables for colours, title and description, no fixed size."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):  # ids are fixed by title
        canvas.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    for stand_in, variable in VARIABLES.items():
        svg = svg.replace(stand_in, f"var({variable})")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # names of parts, the same in every figure
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg", '<svg role="img"', 1)
    head = svg.index(">") + 1
    svg = f"{svg[:head]}<title>{escape(title)}</title><desc>{escape(alt)}</desc>{svg[head:]}"
    return Figure(title, alt, svg)
