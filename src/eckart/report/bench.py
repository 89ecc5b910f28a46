"""The page of a bench: verdicts with their intervals, curves over learning rates, costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eckart.report.figures import Curve, Figure, bars, curves, intervals
from eckart.report.html import Section, Table, Text, html

Row = Mapping[str, Any]


def page(document: Mapping[str, Any]) -> str:
    """One self-contained HTML page from the document of `eckart bench`."""
    rows: Sequence[Row] = document["methods"]
    sections = [
        Section("Verdicts", verdicts(document, rows)),
        Section("Learning rates", rates(document, rows)),
        Section("Seeds", seeds(document, rows)),
        Section("Costs", costs(rows)),
        Section("What was held fixed", [fixed(document)]),
        Section("Recipes", [recipes(rows)]),
    ]
    title = f"{', '.join(r['name'] for r in rows[1:])} against {document['baseline']}"
    return html(title, lead(rows), sections, document["repeat"])


def lead(rows: Sequence[Row]) -> str:
    """The answer in a sentence."""
    said: dict[str, list[str]] = {}
    for row in rows[1:]:
        said.setdefault(row["verdict"], []).append(row["name"])
    return "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in said.items()) + "."


def verdicts(document: Mapping[str, Any], rows: Sequence[Row]) -> list[Figure | Table | Text]:
    others = [r for r in rows if r["difference"] and r["difference"]["interval"][0] is not None]
    drawn = [(r["name"], r["difference"]["mean"], *r["difference"]["interval"]) for r in others]
    head = ["method", "verdict", "better by", "from", "to", "p (Holm)", "visible from",
            "test loss", "over seeds"]  # fmt: skip
    cells = [
        [r["name"], r["verdict"], *between(r), loss(r["test"]["mean"]), loss(r["test"]["sd"])]
        for r in rows
    ]
    reasons = [f"{r['name']}: {r['reason']}." for r in rows if r.get("reason")]
    note = (
        "Differences are paired: in each seed all methods saw the same batches. Intervals are at "
        "95\u00a0%, p is corrected for the number of methods. Visible from: the smallest true "
        "difference that is seen in 80\u00a0% of such benches; below it nothing was looked for."
    )
    found: list[Figure | Table | Text] = [Table(head, cells)]
    if drawn:
        found.append(intervals("Better than the baseline by", drawn, "nats"))
    return [*found, *(Text(r) for r in reasons), Text(note)]


def between(r: Row) -> list[str]:
    d = r["difference"]
    if not d:
        return [""] * 5
    low, high = d["interval"]
    return [
        *(loss(value, "+") for value in (d["mean"], low, high)),
        shown(d["p_corrected"], 2), loss(d["smallest_visible"]),
    ]  # fmt: skip


def rates(document: Mapping[str, Any], rows: Sequence[Row]) -> list[Figure | Table]:
    """Held-out loss by learning rate with the band of seeds, and what a wrong rate costs."""
    drawn = []
    for row in rows:
        points = [p for p in row["lr_curve"] if p["mean"] is not None]
        low = [min(v for v in p["values"] if v is not None) for p in points]
        high = [max(v for v in p["values"] if v is not None) for p in points]
        x, y = [p["lr"] for p in points], [p["mean"] for p in points]
        drawn.append(Curve(row["name"], x, y, low, high, marks=True))
    head = ["method", "best lr", "at an edge", "basin, decades", "lost at its default lr",
            "lost at the baseline's lr", "diverged at", "runs"]  # fmt: skip
    cells = [
        [r["name"], f"{r['lr']:.2g}", "yes" if r["at_edge"] else "no", shown(r["basin_decades"], 2),
         loss(r["regret_at_default_lr"]), loss(r["regret_at_baseline_lr"]),
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
        curves("Held-out loss by learning rate", drawn, "learning rate", "nats", log_x=True),
        curves("Expected best after some rates tried", expected, "rates tried", "nats"),
    ]
    return [*figures, Table(head, cells)]


def seeds(document: Mapping[str, Any], rows: Sequence[Row]) -> list[Figure | Table]:
    """Test loss by seed, and how stable the order is."""
    drawn = [
        Curve(r["name"], range(1, len(r["test"]["values"]) + 1), r["test"]["values"], marks=True)
        for r in rows
    ]
    ranking = document["ranking"]
    cells = [
        [name, shown(rank, 3), f"{ranking['times_first'][name]} of {ranking['seeds']}"]
        for name, rank in ranking["mean_rank"].items()
    ]
    tau = ranking["kendall_tau"]
    caption = "Order over seeds" + ("" if tau is None else f"; mean Kendall tau {tau:.2f}")
    return [
        curves("Test loss by seed", drawn, "seed", "nats"),
        Table(["method", "mean rank", "first"], cells, caption),
    ]


def costs(rows: Sequence[Row]) -> list[Figure | Table]:
    """All four budgets of one run, whichever was the limit."""
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


def fixed(document: Mapping[str, Any]) -> Table:
    return Table(["what", "value"], [[k, v] for k, v in document["held_fixed"].items()])


def recipes(rows: Sequence[Row]) -> Table:
    """Every contestant's choice on each axis, with all fields."""
    cells = [
        [row["name"], axis, choice["name"], fields_of(choice)]
        for row in rows
        for axis, choices in row["recipe"].items()
        for choice in (choices if isinstance(choices, list) else [choices])
    ]
    return Table(["method", "axis", "choice", "fields"], cells)


def fields_of(choice: Mapping[str, Any]) -> str:
    """`rank=16, targets=[attn,mlp]`, as one types them; what is empty is left out."""

    def typed(value: Any) -> str:
        return f"[{','.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)

    given = {k: v for k, v in choice.items() if k != "name" and v not in (None, "", (), [])}
    return ", ".join(f"{key}={typed(value)}" for key, value in given.items())


def loss(value: float | None, sign: str = "") -> str:
    """In nats, to the fourth place."""
    return "" if value is None else f"{value:{sign}.4f}"


def shown(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}g}"
