"""The Markdown page of all claims, from the JSON documents of `eckart reproduce`.

`python -m eckart.report.claims FOLDER` prints the page for FOLDER/*.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eckart.report.text import significant

HEAD = """# What was confirmed, not seen and refuted

Made by `eckart reproduce -o FOLDER` from the documents beside this page; not written by hand.
Each claim is tested on a model that a laptop trains in seconds. Every arm has its own best
learning rate, found on other data than it is judged on; the numbers are differences within
seeds, in which all arms saw the same batches. An interval is at 95 %, p is corrected by Holm
over a claim's statements, and *visible from* is the smallest true difference that would have
been seen in 80 % of such experiments: what is smaller than that was not looked for.
"""


def page(documents: Sequence[Mapping[str, Any]]) -> str:
    """The page in Markdown: a table of verdicts, then a section for each claim."""
    order = sorted(documents, key=lambda d: d["name"])
    counts = {v: sum(d["verdict"] == v for d in order) for v in VERDICTS}
    parts = [HEAD, ", ".join(f"{n} {v}" for v, n in counts.items() if n) + ".\n"]
    parts += [table(["claim", "verdict", "what is claimed", "visible from"], map(summary, order))]
    return "\n".join([*parts, *(section(d) for d in order)])


VERDICTS = ("confirmed", "refuted", "not seen", "no verdict")


def summary(d: Mapping[str, Any]) -> list[str]:
    visible = d["smallest_visible_difference"]
    link = f"[{d['name']}](#{d['name']})"
    return [link, f"**{d['verdict']}**", d["claim"], "" if visible is None else f"{visible:.2g}"]


def section(d: Mapping[str, Any]) -> str:
    """The section of one claim."""
    e = d["evidence"]
    parts = [f"## {d['name']}\n", f"**{d['verdict'].capitalize()}**: {d['claim']}."]
    if d.get("reason"):
        parts += ["", f"Because: {d['reason']}."]
    rows = [row(s["verdict"], s) for s in e["statements"]]
    if "control" in e:
        rows.append(row(f"control: {e['control']['verdict']}", e["control"]))
    if rows:
        head = ["statement", "excess", "95 % interval", "p", "visible from", "verdict"]
        parts += ["", table(head, rows)]
    if e["arms"]:
        parts += [table(["arm", "lr", "loss", "over seeds", "trained"], map(arm, e["arms"]))]
        parts += [f"{e['seeds']} seeds, {e['seconds']:.0f} s, budget {e['budget']}."]
    if e.get("left_out"):
        parts += [f"Left out: {', '.join(e['left_out'])}."]
    if e.get("not_visible_at_this_scale"):
        parts += [f"Cannot be seen at this scale: {e['not_visible_at_this_scale']}."]
    return "\n".join([*parts, "", f"    {d['command']}", ""])


def row(verdict: str, s: Mapping[str, Any]) -> list[str]:
    low, high = s["interval"]
    return [
        s["statement"],
        f"{significant(s['excess'])} {s['unit']}".strip(),
        f"{significant(low)} to {significant(high)}",
        significant(s["p_corrected"], 2),
        significant(s["smallest_visible_difference"], 2),
        f"**{verdict}**",
    ]


def arm(a: Mapping[str, Any]) -> list[str]:
    loss = a["quantities"].get("loss", {})
    trained = a["quantities"].get("parameters", {}).get("mean")
    return [
        a["name"],
        "" if a["lr"] is None else f"{a['lr']:.2g}" + (" (edge)" if a["at_edge"] else ""),
        significant(loss.get("mean")),
        significant(loss.get("sd"), 2),
        "" if trained is None else f"{trained:,.0f}",
    ]


def table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    found = sorted(Path(sys.argv[1]).glob("*.json"))
    sys.stdout.write(page([json.loads(path.read_bytes()) for path in found]))
