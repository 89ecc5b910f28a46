"""`eckart config`: prints the keys of a job or their JSON schema, or validates a job."""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter

from eckart.jobs.settings.config import Job
from eckart.jobs.settings.tree import SECTIONS, Source, Train
from eckart.recipe import registry


def show(job: Job) -> None:
    """Print every key with its value, and the reason if the value was decided."""
    print(job.dump_resolved(), end="")


def validate(job: Job) -> None:
    """Check a job, and print its command and methods."""
    chosen = [f"{axis}={choice.name}" for axis, choice in job.choices.items() if choice.method]
    print(f"valid    {job.command}   {' '.join(chosen)}")


def schema() -> None:
    """Print the JSON schema of all keys."""
    print(json.dumps(build(), indent=2))


def build() -> dict[str, Any]:
    """The schema: sections, and axes as a name or a mapping of name and the method's fields."""
    sections = {name: part(cls) for name, cls in SECTIONS.items()}
    axes: dict[str, Any] = {}
    for axis, question in registry.questions().items():
        entries = [e for e in registry.methods().values() if e.axis == axis]
        names = {"enum": ["auto", "none", *(e.name for e in entries)]}
        whole = [with_name(e.name, part(registry.load(e.name))) for e in entries]
        axes[axis] = {"description": question, "anyOf": [names, *whole]}
    axes["objective"] = {
        "anyOf": [axes["objective"], {"type": "array", "items": axes["objective"]}]
    }
    budget = sections["compress"]["properties"]
    for choice in axes["compress"]["anyOf"][1:]:
        choice["properties"] = {**budget, **choice["properties"]}
    heal = sections["heal"]["properties"]
    heal |= {"weights": axes["weights"], "update": axes["update"], "train": part(Train)}
    text = {"type": "string"}
    sources = {"type": "array", "items": {"anyOf": [text, part(Source)]}}
    sections["data"]["properties"]["train"] = paths = {"anyOf": [text, sources]}
    sections["data"] = {"anyOf": [sections["data"], paths]}
    words = {"type": "array", "items": text}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A job of eckart",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "model": {**text, "description": "A path or a hub id."},
            "out": {**text, "description": "The run's folder; {name} becomes the next number."},
            "track": {**words, "description": "Loggers besides metrics.jsonl."},
            "method": {**text, "description": "A method, whatever its axis."},
            **sections,
            **axes,
        },
    }


def part(cls: type) -> dict[str, Any]:
    """The object schema of one dataclass, without references."""
    schema = TypeAdapter(cls).json_schema()
    schema.pop("$defs", None)
    return schema


def with_name(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The schema of a method's fields and its name."""
    properties = {"name": {"const": name}, **fields.get("properties", {})}
    return {**fields, "properties": properties}
