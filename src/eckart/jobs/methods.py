"""`eckart methods`: lists the methods of each axis, or describes one.

Only the registry is read: neither torch nor a method is imported.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from eckart.recipe import registry
from eckart.recipe.literals import REQUIRED
from eckart.recipe.registry import Entry


def run(names: Sequence[str] = (), cite: bool = False, json: bool = False) -> dict[str, Any]:
    """Print the list, the pages of the named methods or BibTeX; returns the --json document."""
    entries = registry.methods()
    listed = not names or set(names) <= set(registry.questions())  # axes stand for their methods
    chosen = (
        [entry for entry in entries.values() if not names or entry.axis in names]
        if listed
        else [registry.find(name, place="command line") for name in names]
    )
    if not json:
        width = min(shutil.get_terminal_size((100, 24)).columns, 100)
        if cite:
            lines = list(citations(chosen))
        elif listed:
            lines = list(listing(chosen, width))
        else:
            lines = [line for entry in chosen for line in page(entry, entries, width)]
        print("\n".join(lines))
    return {"methods": [described(entry, entries) for entry in chosen]}


def listing(entries: list[Entry], width: int) -> Iterator[str]:
    """All methods by axis, one a line."""
    longest = max((len(e.name) for e in entries), default=0)
    for axis, question in registry.questions().items():
        here = [e for e in entries if e.axis == axis]
        if here:
            yield f"{axis:<10} {question}"
            for e in here:
                line = f"  {e.name:<{longest}}  {e.summary}"
                yield line if len(line) <= width else line[: width - 4].rsplit(" ", 1)[0] + " ..."
            yield ""
    yield "All about one: eckart methods NAME"


def page(entry: Entry, entries: Mapping[str, Entry], width: int) -> Iterator[str]:
    """Describe one method: docstring, fields, promises, and what it combines with."""
    yield f"{entry.name}   {entry.axis}"
    yield ""
    yield from entry.doc.splitlines()
    yield ""
    if entry.paper:
        venue = f", {entry.paper['venue']}" if entry.paper.get("venue") else ""
        yield f"paper      {entry.paper['title']}{venue}"
        yield f"           {entry.paper['url']}"
    for label, text in facts(entry, entries):
        yield from wrapped(text, width, f"{label:<11}", " " * 11)
    yield ""
    for field in entry.fields.values():
        default = "needed" if field.default is REQUIRED else typed(field.default)
        kind = " ".join([words_of(field.type), field.bounds]).strip()
        yield f"  {entry.axis}.{field.name} = {default}   ({kind})"
        yield from wrapped(field.doc, width, " " * 6, " " * 6)


BEYOND = "not one of the papers that eckart is built around, but a peer or a part of them"


def facts(entry: Entry, entries: Mapping[str, Entry]) -> Iterator[tuple[str, str]]:
    if not entry.mission:
        yield "beyond", f"the mission: {BEYOND}"
    if entry.promises:
        yield "promises", ", ".join(promise for promise in told(entry.promises))
    if entry.needs:
        yield "needs", ", ".join(told(entry.needs))
    if said := rates(entry):
        yield "train.lr", f"{said}, unless it is given"
    together = combines(entry, entries)
    for axis in ("weights", "update"):
        if axis in together:
            yield f"+ {axis}", ", ".join(together[axis]) or "none"


def rates(entry: Entry) -> str:
    """The method's default learning rates; empty if it has none of its own."""
    rate, scratch = (spoken(entry.declares.get(name)) for name in ("default_lr", "scratch_lr"))
    return f"{rate}; from random weights {scratch}" if scratch else rate


def spoken(rates: Any) -> str:
    """A learning rate as text, or several with their conditions; empty for None."""
    if isinstance(rates, Mapping):
        return ", ".join(told({f"{rate:g}": when for rate, when in rates.items()}))
    return "" if rates is None else f"{rates:g}"


def told(promises: Any) -> Iterator[str]:
    """Promises as text, with their conditions."""
    if not isinstance(promises, Mapping):
        yield from promises
        return
    for promise, conditions in promises.items():
        parts = []
        for name, value in (conditions or {}).items():
            values = value if isinstance(value, tuple | list) else (value,)
            parts.append(f"{name}={' or '.join(map(typed, values))}")
        yield f"{promise} ({', '.join(parts)})" if parts else promise


def citations(entries: list[Entry]) -> Iterator[str]:
    """BibTeX for the papers."""
    for e in entries:
        if e.paper:
            note = f",\n  note  = {{{e.paper['venue']}}}" if e.paper.get("venue") else ""
            yield f"@misc{{{e.name},\n  title = {{{e.paper['title']}}},"
            yield f"  url   = {{{e.paper['url']}}}{note}\n}}"


def described(entry: Entry, entries: Mapping[str, Entry]) -> dict[str, Any]:
    """One method's entry in the --json document."""
    return {
        "name": entry.name,
        "axis": entry.axis,
        "summary": entry.summary,
        "paper": entry.paper.get("title"),
        "arxiv": arxiv(entry.paper.get("url", "")),
        "mission": entry.mission,
        "fields": [
            {
                "name": f.name,
                "type": f.type,
                "default": None if f.default is REQUIRED else f.default,
                "required": f.default is REQUIRED,
                "range": dict(f.range),
                "doc": f.doc,
            }
            for f in entry.fields.values()
        ],
        "combines": combines(entry, entries),
        "promises": entry.promises,
    }


def combines(entry: Entry, entries: Mapping[str, Entry]) -> dict[str, list[str]]:
    """The weights that an update can act on, and the updates that can act on these weights."""
    if entry.axis == "weights":
        return {"update": [e.name for e in entries.values() if acts_on(e, entry)]}
    if entry.axis == "update":
        return {"weights": [e.name for e in entries.values() if acts_on(entry, e)]}
    return {}


def acts_on(update: Entry, weights: Entry) -> bool:
    """Can this update rule train these weights?"""
    if (update.axis, weights.axis) != ("update", "weights"):
        return False
    return update.wants in ("any", *weights.declares.get("offers", ()))


def arxiv(url: str) -> str | None:
    """The arXiv number in a paper's address, if it has one."""
    found = re.search(r"arxiv\.org/\w+/(\d{4}\.\d{4,5})", url)
    return found[1] if found else None


def words_of(kind: str) -> str:
    """A type in a method's source, in the words of the command line."""
    kind = re.sub(r"Literal\[(.*?)\]", lambda m: m[1].replace("'", "").replace(", ", "|"), kind)
    kind = kind.replace("tuple[dict[str, Any], ...]", "list of mappings")
    kind = re.sub(r"tuple\[(\w+), \.\.\.\]", r"list of \1", kind)
    kind = re.sub(r"tuple\[(\w+), \1\]", r"two of \1", kind)
    for name, word in (("int", "whole number"), ("float", "number"), ("bool", "true or false")):
        kind = re.sub(rf"\b{name}\b", word, kind)
    return re.sub(r"\bstr\b", "text", kind).replace(" | None", " or null")


def typed(value: Any) -> str:
    """A default value as it is typed."""
    if isinstance(value, tuple | list):
        return f"[{','.join(map(typed, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def wrapped(text: str, width: int, first: str, rest: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=rest)
