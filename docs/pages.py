"""A page per method, made from its file, and each job's options, made from the command line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files

from eckart.cli import app
from eckart.jobs.methods import BEYOND, combines, rates, told
from eckart.recipe import registry
from eckart.recipe.literals import REQUIRED
from eckart.recipe.registry import Entry

RECORDED = Path(__file__).parent.parent / "benchmarks" / "results" / "claims"
DOCUMENTS = [json.loads(file.read_text()) for file in sorted(RECORDED.glob("*.json"))]
CLAIMS = {document["name"]: document for document in DOCUMENTS}


def on_files(files: Files, config: Any) -> Files:
    """Add methods.md and methods/<slug>.md."""
    entries = registry.methods()
    files.append(File.generated(config, "methods.md", content="\n".join(index(entries))))
    for entry in entries.values():
        name = f"methods/{entry.name}.md"
        files.append(File.generated(config, name, content="\n".join(page(entry, entries))))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """A job's page with its options at the end, as the command line itself has them."""
    command = typer.main.get_command(app).commands.get(page.file.src_uri.removesuffix(".md"))
    return "\n".join([markdown, "", *options(command)]) if command else markdown


def options(command: Any) -> Iterator[str]:
    """The table of a command's options; those of a group are of its commands."""
    yield "## Options\n"
    yield "| option | meaning |\n|---|---|"
    commands = getattr(command, "commands", {"": command})
    seen = set()
    for each in commands.values():
        for p in each.params:
            if p.opts[0].startswith("-") and p.name not in seen:
                seen.add(p.name)
                metavar = "" if p.is_flag or p.name == "help" else f" {p.metavar or 'VALUE'}"
                yield f"| `{', '.join(p.opts)}{metavar}` | {p.help} |"
    yield "\nWhat it may end with: [exit codes](exit-codes.md)."


def index(entries: dict[str, Entry]) -> Iterator[str]:
    """All methods by axis."""
    yield "# Methods\n"
    yield "On the command line `eckart methods` lists them, `eckart methods NAME` says all about"
    yield "one (formula, when to take it, fields, what it combines with), `--cite` prints BibTeX."
    yield f"*Beyond the mission* stands for: {BEYOND}.\n"
    for axis, question in registry.questions().items():
        here = [e for e in entries.values() if e.axis == axis]
        if here:
            yield f"## {axis}\n\n{question}\n"
            yield from (line(entry) for entry in here)
            yield ""


def line(entry: Entry) -> str:
    """One method in the list of all."""
    beyond = "" if entry.mission else " *Beyond the mission.*"
    return f"- [{entry.name}](methods/{entry.name}.md): {entry.summary}{beyond}"


def page(entry: Entry, entries: dict[str, Entry]) -> Iterator[str]:
    """One method: its file's first words, its fields, its paper, what it combines with."""
    yield f"# {entry.name}\n"
    yield from paragraphs(entry.doc)
    yield f"\n    eckart {'compress MODEL' if entry.axis == 'compress' else 'finetune MODEL DATA'}"
    yield f"        {entry.axis}={entry.name}\n"
    if entry.paper:
        yield f"Paper: [{entry.paper['title']}]({entry.paper['url']})\n"
    if claim := CLAIMS.get(entry.name):
        yield f"Its claim, on a small scale: [{claim['verdict']}](../claims.md#{entry.name})."
        yield f"Losses there, each arm with its own best learning rate: {losses(claim)}.\n"
    if not entry.mission:
        yield f"Beyond the mission: {BEYOND}.\n"
    if said := rates(entry):
        yield f"Default `train.lr`: {said}\n"
    if entry.promises:
        yield f"Promises: {', '.join(told(entry.promises))}\n"
    for axis, names in combines(entry, entries).items():
        links = ", ".join(f"[{name}]({name}.md)" for name in names)
        yield f"Combines with {axis}: {links or 'none'}\n"
    yield "## Fields\n"
    yield "| key | default | type | meaning |\n|---|---|---|---|"
    for field in entry.fields.values():
        default = "needed" if field.default is REQUIRED else f"`{field.default}`"
        kind = " ".join([field.type, field.bounds]).strip().replace("|", "\\|")
        text = " ".join(field.doc.split()).replace("|", "\\|")
        yield f"| `{entry.axis}.{field.name}` | {default} | {kind} | {text} |"


def losses(claim: dict[str, Any]) -> str:
    """What each arm of a claim's record ended with, in nats where it is text."""
    arms = ((arm["name"], arm["quantities"].get("loss")) for arm in claim["evidence"]["arms"])
    return "; ".join(f"{name} {loss['mean']:.3g}" for name, loss in arms if loss)


def paragraphs(text: str) -> Iterator[str]:
    """A docstring as Markdown: formulas are indented already, the rest is prose."""
    for block in text.split("\n\n"):
        code = all(line.startswith("    ") for line in block.splitlines() if line)
        yield (block if code else block.replace("|", "\\|").replace("*", "\\*")) + "\n"
