"""Writes a bench's results: the files in its folder, and the table for the terminal.

Measured times go to costs.json and the HTML page alone: all other files have the same bytes
after any interruption.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from typing import Any

from eckart.io.folder import write_text
from eckart.io.run import Run
from eckart.report.text import aligned, fixed

TIMED = ("seconds",)
COLUMNS = (
    "name", "verdict", "lr", "test", "sd", "difference", "low", "high", "p_corrected",
    "smallest_visible", "trained_parameters", "steps", "tokens", "peak_bytes", "trials", "metric",
)  # fmt: skip
BESIDE = ("{}", "{}_low", "{}_high", "{}_difference", "{}_difference_low", "{}_difference_high")


def write(run: Run, document: Mapping[str, Any]) -> None:
    """Write all result files of a bench into the run's folder."""
    from eckart.report import comparison

    timeless = without_time(document)
    lines = [json.dumps(row, sort_keys=True) + "\n" for row in timeless["methods"]]
    write_text(run.folder / "results.jsonl", "".join(lines))
    write_text(run.folder / "bench.json", json.dumps(timeless, indent=2, ensure_ascii=False) + "\n")
    write_text(run.folder / "table.csv", as_csv(timeless))
    timed = {row["name"]: row["costs"] for row in document["methods"]}
    write_text(run.folder / "costs.json", json.dumps(timed, indent=2) + "\n")
    write_text(run.report, comparison(document))


def without_time(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document without times and folder, which differ between two equal benches."""
    methods = [
        row | {"costs": {k: v for k, v in row["costs"].items() if k not in TIMED}}
        for row in document["methods"]
    ]
    return {k: v for k, v in document.items() if k != "run"} | {"methods": methods}


def as_csv(document: Mapping[str, Any]) -> str:
    """One line per method: the verdicts' metric, then the others with their intervals."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    metric, others = metrics_of(document)
    writer.writerow([*COLUMNS, *(name.format(other) for other in others for name in BESIDE)])
    for row in document["methods"]:
        test, d = row["test"][metric], row["differences"][metric]
        known = {
            **row["costs"], **row, **d, "metric": metric, "test": test["mean"], "sd": test["sd"],
            "difference": d["mean"], "low": d["interval"][0], "high": d["interval"][1],
        }  # fmt: skip
        beside = [
            value
            for other in others
            for part in (row["test"][other], row["differences"][other])
            for value in (part["mean"], *part["interval"])
        ]
        cells = [*(known.get(c) for c in COLUMNS), *beside]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return out.getvalue()


def metrics_of(document: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The metric that verdicts use, and the other reported metrics."""
    metric = document["metric"]
    return metric, [name for name in document["methods"][0]["test"] if name != metric]


def as_text(document: Mapping[str, Any]) -> str:
    """A table in aligned columns, the baseline first."""
    metric, others = metrics_of(document)
    beside = [f"{name} [95 %]" for name in others]
    head = ["method", f"test {metric}", "better by [95 %]", "p", *beside, "lr", "trained",
            "peak MB", "s", "verdict"]  # fmt: skip
    rows = [head]
    for row in document["methods"]:
        test, d, c = row["test"][metric], row["differences"][metric], row["costs"]
        sd = "" if test["sd"] is None else f" ±{test['sd']:.4f}"
        rows.append(
            [
                row["name"],
                fixed(test["mean"]) + sd,
                with_interval(d, "+"),
                "" if d["p_corrected"] is None else f"{d['p_corrected']:.2g}",
                *(with_interval(row["test"][name]) for name in others),
                f"{row['lr']:.2g}" + (" edge" if row["at_edge"] else ""),
                f"{c['trained_parameters']:,}",
                f"{c['peak_bytes'] / 1e6:.1f}",
                f"{c['seconds']:.1f}",
                row["verdict"] + (f": {row['reason']}" if row["reason"] else ""),
            ]
        )
    return aligned(rows, "  ")


def with_interval(found: Mapping[str, Any], sign: str = "") -> str:
    """`0.8125 [0.7944, 0.8306]`; the interval is left out where it is unknown."""
    low, high = (fixed(end, sign) for end in found["interval"])
    return fixed(found["mean"], sign) + (f" [{low}, {high}]" if low else "")
