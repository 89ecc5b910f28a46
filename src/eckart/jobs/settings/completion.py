"""Shell completions: keys, methods, choices and presets.

Only the registry and the tree of keys are read, so that completing imports neither torch nor a
method. MODEL and DATA are completed as file names by the shell.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from eckart.io.shapes import PRESETS
from eckart.jobs.settings.tree import OWN, SECTIONS
from eckart.recipe import registry

ANY = "method"  # method=NAME sets the axis of that method
PLAIN = ("model", "data", "out", "track")  # keys without a section
PLACES = {"convert": 1, "inspect": 1, "generate": 1, "compress": 1}  # path arguments; others 2


def method_names() -> list[str]:
    return list(registry.methods())


def completions(command: str, typed: Sequence[str], begun: str) -> list[str]:
    """Completions of the word `begun` after the words `typed`, sorted.

    Bash splits `method=lo` into three words; then only the part after the `=` is returned.
    """
    *before, word, whole = joined([*typed, begun])
    words = [w for w in before if isinstance(w, str)]
    key, equals, value = str(word).partition("=")
    if equals:
        found = [v for v in values(key, chosen(words)) if v.startswith(value)]
        return [f"{key}={v}" for v in found] if whole else found
    paths = [w for w in words if "=" not in w or w.partition("=")[0] in ("model", "data")]
    if len(paths) < PLACES.get(command, 2):
        names = PRESETS if command == "pretrain" and not paths else ()
        return sorted(name for name in names if name.startswith(begun))
    return sorted(f"{k}=" for k in keys(command, chosen(words)) if k.startswith(begun))


def joined(words: Sequence[str]) -> list[Any]:
    """The words, joined again around each `=`, and whether the last was not split."""
    found: list[Any] = []
    after = False
    for word in words:
        if (word == "=" or after) and found:
            found[-1] += word
        else:
            found.append(word)
        after = word == "="
    return [*found, len(words) < 2 or not (after or words[-2] == "=")]


def chosen(words: Sequence[str]) -> dict[str, registry.Entry]:
    """The method chosen by these words on each axis, or the axis' default."""
    entries = registry.methods()
    found = {axis: entries[name] for axis, name in registry.DEFAULTS.items() if name in entries}
    for word in words:
        key, _, value = word.partition("=")
        entry = entries.get(value.replace("_", "-"))
        if entry is not None and key.removesuffix(".name") in (ANY, entry.axis):
            found[entry.axis] = entry
    return found


def keys(command: str, methods: Mapping[str, registry.Entry]) -> Iterator[str]:
    """Every key of a job with these methods."""
    yield ANY
    yield from PLAIN
    yield from registry.questions()
    yield from OWN.get(command, ())
    for section, cls in SECTIONS.items():
        yield from (f"{section}.{field.name}" for field in dataclasses.fields(cls))
    for axis, entry in methods.items():
        yield from (f"{axis}.{name}" for name in entry.fields)


def values(key: str, methods: Mapping[str, registry.Entry]) -> list[str]:
    """The values that a key may have; empty if they cannot be listed."""
    section, _, name = key.partition(".")
    axis = None if key == ANY else section
    if axis in (None, *registry.questions()) and name in ("", "name"):
        return [e.name for e in registry.methods().values() if axis in (None, e.axis)]
    if section in methods and name in methods[section].fields:
        return literals(methods[section].fields[name].type)
    if section in SECTIONS:
        types = {field.name: field.type for field in dataclasses.fields(SECTIONS[section])}
        return sorted(set(choices(types[name]))) if name in types else []
    return []


def choices(kind: Any) -> Iterator[str]:
    """The words of a type: its literals, and true and false for a bool."""
    if kind is bool:
        yield from ("false", "true")
    elif get_origin(kind) is Literal:
        yield from map(str, get_args(kind))
    else:
        for part in get_args(kind):
            yield from choices(part)


def literals(text: str) -> list[str]:
    """As `choices`, of a type given as source text."""
    if text == "bool":
        return ["false", "true"]
    nodes = ast.walk(ast.parse(text, mode="eval"))
    return sorted(
        n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)
    )
