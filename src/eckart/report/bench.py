"""The HTML page of a bench: verdicts with intervals, curves over learning rates, costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eckart.report.figures import Curve, Figure, bars, curves, intervals
from eckart.report.html import Section, Table, Text, html
from eckart.report.text import fixed, significant

Row = Mapping[str, Any]


def page(document: Mapping[str, Any]) -> str:
    """One self-contained HTML page from the document of `eckart bench`."""
    rows: Sequence[Row] = document["methods"]
    sections = [
        Section("Verdicts", verdicts(document["metric"], rows)),
        Section("Other metrics", other_metrics(document["metric"], rows)),
        Section("Learning rates", rates(document, rows)),
        Section("Seeds", seeds(document, rows)),
        Section("Costs", costs(rows)),
        Section("What was held fixed", [held_fixed(document)]),
        Section("Recipes", [recipes(rows)]),
    ]
    title = f"{', '.join(r['name'] for r in rows[1:])} against {document['baseline']}"
    return html(title, summary(rows), sections, document["repeat"])


def summary(rows: Sequence[Row]) -> str:
    """The verdicts in one sentence."""
    said: dict[str, list[str]] = {}
    for row in rows[1:]:
        said.setdefault(row["verdict"], []).append(row["name"])
    return "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in said.items()) + "."


def verdicts(metric: str, rows: Sequence[Row]) -> list[Figure | Table | Text]:
    head = ["method", "verdict", "better by", "from", "to", "p (Holm)", "visible from",
            f"test {metric}", "over seeds"]  # fmt: skip
    cells = [
        [r["name"], r["verdict"], *paired(d), significant(d["p_corrected"], 2),
         fixed(d["smallest_visible"]), fixed(test["mean"]), fixed(test["sd"])]
        for r in rows
        for d, test in [(r["differences"][metric], r["test"][metric])]
    ]  # fmt: skip
    reasons = [f"{r['name']}: {r['reason']}." for r in rows if r.get("reason")]
    note = (
        "Differences are paired: in each seed all methods saw the same batches. Intervals are at "
        "95\u00a0%, p is corrected for the number of methods. Visible from: the smallest true "
        "difference that is seen in 80\u00a0% of such benches; below it nothing was looked for."
    )
    drawn = difference_figures(metric, rows)
    return [Table(head, cells), *drawn, *(Text(r) for r in reasons), Text(note)]


def other_metrics(metric: str, rows: Sequence[Row]) -> list[Figure | Table | Text]:
    """Tables and figures of the other metrics, which enter no verdict."""
    found: list[Figure | Table | Text] = []
    for other in (name for name in rows[0]["test"] if name != metric):
        head = ["method", f"test {other}", "from", "to", "over seeds", "better by", "from", "to"]
        cells = [
            [r["name"], *map(fixed, (test["mean"], *test["interval"], test["sd"])),
             *paired(r["differences"][other])]
            for r in rows
            for test in [r["test"][other]]
        ]  # fmt: skip
        found += [Table(head, cells), *difference_figures(other, rows)]
    said = f"Rates were chosen by {metric} and the verdicts are by it; this is of the same runs."
    return [*found, Text(said)] if found else []


def difference_figures(metric: str, rows: Sequence[Row]) -> list[Figure]:
    """A figure of each method's difference to the baseline, with intervals."""
    found = [(r["name"], r["differences"][metric]) for r in rows]
    drawn = [(n, d["mean"], *d["interval"]) for n, d in found if d["interval"][0] is not None]
    title = f"Better than the baseline by: {metric}"
    return [intervals(title, drawn, unit(metric))] if drawn else []


def unit(metric: str) -> str:
    """The unit of a metric, for an axis label."""
    return "nats" if metric == "loss" else metric


def paired(d: Row) -> list[str]:
    return [fixed(value, "+") for value in (d["mean"], *d["interval"])]


def rates(document: Mapping[str, Any], rows: Sequence[Row]) -> list[Figure | Table]:
    """The metric by learning rate with the range over seeds, and the cost of a wrong rate."""
    metric, drawn = document["metric"], []
    for row in rows:
        points = [p for p in row["lr_curve"] if p["mean"] is not None]
        low = [min(v for v in p["values"] if v is not None) for p in points]
        high = [max(v for v in p["values"] if v is not None) for p in points]
        x, y = [p["lr"] for p in points], [p["mean"] for p in points]
        drawn.append(Curve(row["name"], x, y, low, high, marks=True))
    head = ["method", "best lr", "at an edge", "basin, decades", "lost at its default lr",
            "lost at the baseline's lr", "diverged at", "runs"]  # fmt: skip
    cells = [
        [r["name"], f"{r['lr']:.2g}", "yes" if r["at_edge"] else "no",
         significant(r["basin_decades"], 2),
         *map(fixed, (r["regret_at_default_lr"], r["regret_at_baseline_lr"])),
         ", ".join(f"{p['lr']:.2g}" for p in r["lr_curve"] if p["mean"] is None),
         str(r["trials"])]
        for r in rows
    ]  # fmt: skip
    expected = [
        Curve(r["name"], range(1, len(e) + 1), e, marks=True)
        for r in rows
        if (e := r["expected_after_trials"])
    ]
    figures = [
        curves(
            f"Held-out {metric} by learning rate", drawn, "learning rate", unit(metric), log_x=True
        ),
        curves("Expected best after some rates tried", expected, "rates tried", unit(metric)),
    ]
    return [*figures, Table(head, cells)]


def seeds(document: Mapping[str, Any], rows: Sequence[Row]) -> list[Figure | Table]:
    """The test metric by seed, and the stability of the ranking."""
    metric = document["metric"]
    drawn = [
        Curve(r["name"], range(1, len(values) + 1), values, marks=True)
        for r in rows
        for values in [r["test"][metric]["values"]]
    ]
    ranking = document["ranking"]
    cells = [
        [name, significant(rank, 3), f"{ranking['times_first'][name]} of {ranking['seeds']}"]
        for name, rank in ranking["mean_rank"].items()
    ]
    tau = ranking["kendall_tau"]
    caption = "Order over seeds" + ("" if tau is None else f"; mean Kendall tau {tau:.2f}")
    return [
        curves(f"Test {metric} by seed", drawn, "seed", unit(metric)),
        Table(["method", "mean rank", "first"], cells, caption),
    ]


def costs(rows: Sequence[Row]) -> list[Figure | Table]:
    """Steps, tokens, seconds and memory of one run of each method."""
    head = ["method", "trained", "steps", "tokens", "seconds", "peak MB", "state MB"]
    cells = [
        [
            r["name"],
            f"{c['trained_parameters']:,}",
            f"{c['steps']:,}",
            f"{c['tokens']:,}",
            f"{c['seconds']:.1f}",
            f"{c['peak_bytes'] / 1e6:,.1f}",
            f"{c['state_bytes'] / 1e6:,.2f}",
        ]
        for r in rows
        for c in [r["costs"]]
    ]
    memory = {r["name"]: {"peak": r["costs"]["peak_bytes"] / 1e6} for r in rows}
    seconds = {r["name"]: {"seconds": r["costs"]["seconds"]} for r in rows}
    return [
        bars("Peak tensor bytes", memory, "MB"),
        bars("Seconds of a run", seconds, "s"),
        Table(head, cells),
    ]


def held_fixed(document: Mapping[str, Any]) -> Table:
    return Table(["what", "value"], [[k, v] for k, v in document["held_fixed"].items()])


def recipes(rows: Sequence[Row]) -> Table:
    """Each method's choice on each axis, with all its fields."""
    cells = [
        [row["name"], axis, choice["name"], fields_of(choice)]
        for row in rows
        for axis, choices in row["recipe"].items()
        for choice in (choices if isinstance(choices, list) else [choices])
    ]
    return Table(["method", "axis", "choice", "fields"], cells)


def fields_of(choice: Mapping[str, Any]) -> str:
    """Fields in command-line syntax, `rank=16, targets=[attn,mlp]`; empty ones are left out."""

    def typed(value: Any) -> str:
        return f"[{','.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)

    given = {k: v for k, v in choice.items() if k != "name" and v not in (None, "", (), [])}
    return ", ".join(f"{key}={typed(value)}" for key, value in given.items())
