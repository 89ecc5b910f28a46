"""A job's keys and values as YAML text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import yaml

from eckart.jobs.settings.tree import Source


def plain(value: Any) -> Any:
    """The value as lists, dicts and scalars."""
    if isinstance(value, Source):
        given = {f.name: getattr(value, f.name) for f in fields(value)}
        unusual = {f.name: given[f.name] for f in fields(value)[1:] if given[f.name] != f.default}
        return {"path": value.path, **unusual} if unusual else value.path
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return value


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} -> {"a": {"b": 1}}; objectives as a list of mappings."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *above, last = key.split(".")
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[last] = value
    if "objective" in tree:
        tree["objective"] = list(tree["objective"].values())
    return tree


def flow(value: Any) -> str:
    """A value on one line, in the form typed after `key=`."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def emit(tree: Mapping[str, Any], reasons: Mapping[str, str] | None = None, above: str = "") -> str:
    """A nested dict as YAML, with reasons as comments."""
    lines = []
    for key, value in tree.items():
        name = f"{above}{key}"
        indent = "  " * name.count(".")
        if isinstance(value, Mapping):
            lines.append(f"{indent}{key}:\n{emit(value, reasons, name + '.')}")
        else:
            text = flow(value)
            reason = (reasons or {}).get(name)
            lines.append(f"{indent}{key}: {text}{f'  # {reason}' if reason else ''}\n")
    return "".join(lines)
