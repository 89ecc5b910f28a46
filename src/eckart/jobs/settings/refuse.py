"""Errors for unknown keys, keys that exclude each other, and keys that a command does not read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from eckart.errors import UsageError, nearest
from eckart.jobs.settings.merge import AXES, EXCLUSIVE, Given, merge, says_something
from eckart.jobs.settings.other_tools import SILENT
from eckart.jobs.settings.tree import SECTIONS
from eckart.jobs.settings.words import COMMAND_LINE, HABITS, SWITCHES, Key, Setting, read_words
from eckart.recipe import registry

ALL = ("model", "data", "out", "track", "weights", "update", "precision", "attention", "objective",
       "train", "eval")  # fmt: skip
LENGTHS = ("steps", "epochs", "batch_size", "accumulate", "schedule", "warmup", "clip", "seed")
READS: dict[str, tuple[str, ...]] = {  # command -> its keys and sections
    **dict.fromkeys(("finetune", "pretrain"), ALL),
    "compress": ("model", "data", "out", "track", "precision", "compress", "heal", "train", "eval"),
    "bench": ("model", "data", "out", "eval.metrics", *(f"train.{name}" for name in LENGTHS)),
    "eval": ("model", "data", "precision", "eval.metrics", "train.batch_size", "train.seed"),
    "generate": ("model", "train.seed"),
    "convert": ("model", "data.train", "out", "convert"),
    "inspect": ("model", "data.train"),
}
PER_CANDIDATE = (*AXES, "train.lr")  # of which each candidate of a bench has its own: said there
TAKES = {"generate": ("MODEL",)}  # command -> positional words; others MODEL DATA


def unknown_key(setting: Setting, known: Sequence[str], more: str) -> UsageError:
    """The error for an unknown key, which suggests our name for it or the nearest key.

    `known` are all keys, the likeliest first; `more` says where they are listed.
    """
    what = f"unknown key {setting.name}     {setting.place}"
    name = ".".join(setting.key)
    section = name.rpartition(".")[0]
    hint = from_habit(setting, known)
    if not hint and (close := nearest_key(name, known)):
        hint = f"Did you mean {close}?"
    elif not hint and (there := [k.rpartition(".")[2] for k in known if in_section(k, section)]):
        hint = f"Keys of {section}: {', '.join(there)}."
    return UsageError(what, fix=f"{hint} {more}".strip())


def in_section(key: str, section: str) -> bool:
    return bool(section) and key.rpartition(".")[0] == section


def unknown_flag(word: str, following: str, options: Sequence[str]) -> UsageError:
    """The error for an unknown option: --lr 1e-3, which is train.lr=1e-3 here, or --jsn.

    `options` are the command's.
    """
    name, _, text = word.lstrip("-").partition("=")
    setting = Setting((name.replace("-", "_"),), None, COMMAND_LINE, text or following)
    hint = from_habit(setting, known := [*own_keys(), "model", "data", "track"])
    ends = {key.rpartition(".")[2] for key in known}
    close = nearest(f"--{name}", options) if setting.name not in ends else []
    if not hint and close:
        hint = f"Did you mean {close[0]}?"
    if not hint and (key := nearest_key(setting.name, known)):
        hint = f"Did you mean {key}={setting.text}?"
    return UsageError(f"unknown option {word}     {COMMAND_LINE}", fix=hint or "Type --help.")


def own_keys() -> list[str]:
    """The keys that every job has, and the fields of the default methods."""
    defaults = [registry.find(registry.DEFAULTS[axis]) for axis in ("weights", "update")]
    known = [f"{e.axis}.{field}" for e in defaults for field in e.fields]
    return known + [f"{s}.{f.name}" for s, cls in SECTIONS.items() for f in fields(cls)]


def refuse_word(word: str, command: str, place: int) -> None:
    """Raise UsageError for a positional word that the command does not take.

    `place` is its position from 0: MODEL, DATA.
    """
    takes = TAKES.get(command, ("MODEL", "DATA"))
    if not word.strip():
        raise UsageError(
            f"{takes[min(place, len(takes) - 1)]} is empty     {COMMAND_LINE}",
            fix="Type a path or a hub id; perhaps a variable of the shell is not set.",
        )
    if word.endswith((".yaml", ".yml")):
        raise UsageError(
            f"{word} is a job file, not {' or '.join(takes)}     {COMMAND_LINE}",
            fix=f"Type -c {word}",
        )
    if place < len(takes):
        return
    if word in own_keys():
        raise UsageError(f"{word} has no value     {COMMAND_LINE}", fix=f"Type {word}=VALUE")
    after = "After MODEL and DATA come key=value words; several files: data=[a.jsonl,b.jsonl]"
    raise UsageError(
        f"unexpected word {word}     {COMMAND_LINE}",
        fix=after if len(takes) > 1 else f"After {takes[0]} come key=value words and options.",
    )


def nearest_key(name: str, keys: Sequence[str]) -> str | None:
    """The key with the same or a similar last word, first looked for in its section."""
    head, _, tail = name.rpartition(".")
    everywhere = {key.rpartition(".")[2]: key for key in reversed(keys)}
    siblings = {key.rpartition(".")[2]: key for key in keys if in_section(key, head)}
    if exact := siblings.get(tail) or everywhere.get(tail):
        return exact
    for words in (siblings, everywhere):
        if close := nearest(tail, words):
            return words[close[0]]
    return None


def from_habit(setting: Setting, known: Sequence[str]) -> str:
    """A hint with our name for a key of another tool; empty if it is not known."""
    word = next((part for part in setting.key if part in SWITCHES), setting.key[-1])
    entries = registry.methods()
    slug = entries.get(word.removeprefix("peft_").removeprefix("use_").replace("_", "-"))
    if slug is not None:
        return f"A method is named: type {slug.axis}={slug.name}."
    if word in SWITCHES:
        return f"Here it is {SWITCHES[word]}."
    if word in SILENT:
        return "Leave it out: there is nothing to set here."
    key = HABITS.get(word) or HABITS.get("_".join(setting.key))
    if key is None:
        return ""
    axis, _, name = key.partition(".")
    if axis in AXES and not name and (typed := registry.elsewhere(setting.text)):
        return f"Here it is {typed}."
    if axis not in AXES or not name or key in known:
        return f"Here it is {key}: type {key}={setting.text}."
    have = [e.name for e in entries.values() if e.axis == axis and name in e.fields]
    return f"Here it is {key}, with {axis}={' or '.join(have)}." if have else ""


def refuse_alternatives(given: Given) -> None:
    """Raise UsageError if one layer sets two keys that exclude each other."""
    for group in EXCLUSIVE:
        said = [given[key] for key in group if key in given and says_something(given[key])]
        if len(said) > 1:
            raise UsageError(
                f"{' and '.join(s.name for s in said)} exclude each other",
                [(f"{s.name} = {s.text}", s.place) for s in said],
                "Leave one of them.",
            )


def refuse_unread(words: Sequence[str], command: str) -> None:
    """Raise UsageError for key=value words that the command does not read.

    Keys of a -c file are not checked: one file may serve several commands.
    """
    typed = merge([read_words(words)], command)
    if command == "compress":
        refuse_trained(typed)
    for key, setting in typed.items():
        readers = [name for name, names in READS.items() if is_among(key, names)]
        left = command == "bench" and is_among(key, PER_CANDIDATE)
        if command in READS and readers and command not in readers and not left:
            raise UsageError(
                f"eckart {command} does not read {setting.name}     {setting.place}",
                [
                    (f"{setting.name} = {setting.text}", f"a key of {', '.join(readers)}"),
                    (f"eckart {command} reads", ", ".join(READS[command])),
                ],
                "Leave it out.",
            )


def refuse_trained(typed: Given) -> None:
    """Raise UsageError for a compression with a method that trains."""
    for axis, words in (("weights", ""), ("update", "heal.update={} ")):
        said = typed.get((axis, "name"))
        if said is not None and said.value not in ("auto", "none"):
            others = [e.name for e in registry.methods().values() if e.axis == "compress"]
            raise UsageError(
                f"{said.value} trains and does not compress     {said.place}",
                [("compressions", ", ".join(others))],
                f"For a training afterwards type {words.format(said.value)}heal.steps=100.",
            )


def is_among(key: Key, names: Sequence[str]) -> bool:
    """Is this key one of `keys`, or in a section among them?"""
    return key[0] in names or ".".join(key) in names
