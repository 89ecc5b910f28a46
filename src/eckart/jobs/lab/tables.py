"""A bench's results as text: the files in its folder, and the table on the terminal.

What a clock decides is kept apart: all files but costs.json and the page are the same bytes
after any interruption.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from eckart.io.folder import write_text
from eckart.io.run import Run

TIMED = ("seconds",)
COLUMNS = (
    "name", "verdict", "lr", "test", "sd", "difference", "low", "high", "p_corrected",
    "smallest_visible", "trained_parameters", "steps", "tokens", "peak_bytes", "trials",
)  # fmt: skip


def write(run: Run, document: Mapping[str, Any]) -> None:
    """Everything in the folder. What a clock decides is kept apart from what it does not."""
    from eckart.report import comparison

    timeless = without_time(document)
    lines = [json.dumps(row, sort_keys=True) + "\n" for row in timeless["methods"]]
    write_text(run.folder / "results.jsonl", "".join(lines))
    write_text(run.folder / "bench.json", json.dumps(timeless, indent=2, ensure_ascii=False) + "\n")
    write_text(run.folder / "table.csv", as_csv(timeless["methods"]))
    timed = {row["name"]: row["costs"] for row in document["methods"]}
    write_text(run.folder / "costs.json", json.dumps(timed, indent=2) + "\n")
    write_text(run.report, comparison(document))


def without_time(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document without what differs between two equal benches: times, and the folder."""
    methods = [
        row | {"costs": {k: v for k, v in row["costs"].items() if k not in TIMED}}
        for row in document["methods"]
    ]
    return {k: v for k, v in document.items() if k != "run"} | {"methods": methods}


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        d = row["difference"] or {}
        low, high = d.get("interval", ["", ""])
        known = {
            **row["costs"], **row, **d,
            "test": row["test"]["mean"], "sd": row["test"]["sd"],
            "difference": d.get("mean"), "low": low, "high": high,
        }  # fmt: skip
        writer.writerow(["" if known.get(c) is None else known[c] for c in COLUMNS])
    return out.getvalue()


def as_text(document: Mapping[str, Any]) -> str:
    """Aligned columns, the baseline first."""
    head = ["method", "test loss", "better by [95 %]", "p", "lr", "trained", "peak MB", "s",
            "verdict"]  # fmt: skip
    rows = [head]
    for row in document["methods"]:
        d, c = row["difference"], row["costs"]
        between = "" if not d or d["interval"][0] is None else (
            f"{d['mean']:+.4f} [{d['interval'][0]:+.4f}, {d['interval'][1]:+.4f}]"
        )  # fmt: skip
        sd = row["test"]["sd"]
        rows.append(
            [
                row["name"],
                f"{row['test']['mean']:.4f}" + (f" ±{sd:.4f}" if sd is not None else ""),
                between,
                "" if not d or d["p_corrected"] is None else f"{d['p_corrected']:.2g}",
                f"{row['lr']:.2g}" + (" edge" if row["at_edge"] else ""),
                f"{c['trained_parameters']:,}",
                f"{c['peak_bytes'] / 1e6:.1f}",
                f"{c['seconds']:.1f}",
                row["verdict"] + (f": {row['reason']}" if row.get("reason") else ""),
            ]
        )
    widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows
    )
