"""Resolves command-line words and YAML files to a validated job, before anything is loaded.

    resolve("finetune", "m", "d.jsonl", ["method=lora", "train.lr=1e-3"], files=["job.yaml"])

Precedence, lowest first: the methods' and sections' defaults, each -c file in order, the
command line. Every key keeps the place where it was written, for error messages. A value `auto`
is decided later, with a reason, when model and data are known (`Job.settle`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from eckart.errors import UsageError
from eckart.io.run import refuse_elsewhere, require_run
from eckart.jobs.settings.check import checked, expected
from eckart.jobs.settings.job import (
    AUTO,
    NO_FLAGS,
    NONE,
    PLAIN,
    Choice,
    Flags,
    Healing,
    Job,
    value_at,
)
from eckart.jobs.settings.merge import AXES, BUDGET, Given, fields_of, merge
from eckart.jobs.settings.refuse import refuse_alternatives, unknown_key
from eckart.jobs.settings.tree import (
    OWN,
    SECTIONS,
    Budget,
    Convert,
    Data,
    Eval,
    Heal,
    Source,
    Train,
)
from eckart.jobs.settings.words import COMMAND_LINE, Key, Setting, read_file, read_words
from eckart.recipe import registry
from eckart.recipe.literals import REQUIRED
from eckart.recipe.registry import DEFAULTS, FULL, Entry

if TYPE_CHECKING:
    from eckart.recipe.method import Method

TRAINS = ("finetune", "pretrain", "linearize", "bench")  # commands that always have a recipe
NEEDS: dict[str, tuple[Key, ...]] = {  # command -> required keys
    **dict.fromkeys(TRAINS, (("model",), ("data", "train"))),
    "compress": (("model",),),
    "generate": (("model",),),
    "eval": (("model",), ("data", "train")),
    "convert": (("model",),),
    "inspect": (("model",),),
}
SHOWN = {"convert": "SOURCE --to FORM", "inspect": "SOURCE"}  # usage without a -c file
OUT = "runs/{name}"
SCHEMA = "All keys: eckart config schema"


def resolve(
    command: str,
    model: str | None = None,
    data: str | Sequence[str] | None = None,
    words: Sequence[str] = (),
    files: Sequence[str | Path] = (),
    flags: Flags = NO_FLAGS,
    options: Mapping[str, Any] | None = None,
    partial: bool = False,
) -> Job:
    """The job that words and files describe; a partial one may lack its model and data.

    `words` are key=value, `files` YAML in the order of -c; --resume RUN reads RUN's own
    config.yaml below all of them. Raises UsageError (a key, value, method or combination that
    cannot be, with place and nearest valid one) or FileError (a file that cannot be read).
    """
    resumed = [require_run(flags.resume) / "config.yaml"] if flags.resume else []
    layers = [read_file(file) for file in (*resumed, *files)]
    layers.append([*positional(model, data, flags), *read_words(words)])
    given = merge(layers, command)
    settled: dict[str, str] = {}
    entries = chosen_entries(given, command, settled)
    refuse_unknown(given, entries, command)
    refuse_alternatives(given)
    if not partial:
        require(given, command)
    train = section(Train, given, ("train",))
    choices = {axis: choice(given, axis, entries) for axis in AXES if axis != "objective"}
    choices["weights"] = suited(choices, {k[1] for k in given if k[0] == "weights"}, settled)
    job = Job(
        command=command,
        model=plain_value(given, "model", str | None, None),
        out=plain_value(given, "out", str, OUT),
        track=plain_value(given, "track", tuple[str, ...], ()),
        data=section(Data, given, ("data",)),
        choices=choices,
        objectives=tuple(
            Choice(e.name, build(e, given, key))
            for key, e in entries.items()
            if e is not None and key[0] == "objective"
        ),
        train=train,
        eval=section(Eval, given, ("eval",)),
        compress=budget(given, choices["compress"].method),
        heal=healing(given, entries, train),
        convert=section(Convert, given, ("convert",)),
        options=dict(options or {}),
        flags=flags,
        settled=settled,
    )
    if flags.resume:
        paths = [job.model or "", *(source.path for source in job.data.train)]
        refuse_elsewhere(require_run(flags.resume), command, paths)
    job = dataclasses.replace(job, given={k: value_at(job, k) for k in map(".".join, given)})
    from eckart.recipe.recipe import refuse_two_passes

    refuse_two_passes(job.recipe())
    return job


def positional(model: str | None, data: Any, flags: Flags) -> list[Setting]:
    """MODEL, DATA and the flags that stand for keys."""
    said = [
        (("model",), model, COMMAND_LINE),
        (("data", "train"), list(data) if isinstance(data, tuple) else data, COMMAND_LINE),
        (("out",), flags.out, "-o"),
        (("train", "seed"), flags.seed, "--seed"),
    ]
    return [
        Setting(key, value, place, str(value)) for key, value, place in said if value is not None
    ]


# Which method answers each axis

Entries = Mapping[Key, Entry | None]  # ("weights",), ("heal", "weights"), ...


def chosen_entries(given: Given, command: str, settled: dict[str, str]) -> Entries:
    """The registry's entry for each axis that has a choice; None for `auto` and `none`.

    `auto` is replaced by a method's name, and the reason is added to `settled`.
    """
    found: dict[Key, Entry | None] = {}

    def take(key: Key, name: str) -> Entry | None:
        entry = found[key] = None if name in ("auto", "none") else registry.find(name)
        if entry is not None:
            registry.refuse_idle(entry.name, entry.axis)
        return entry

    def name_of(*key: str) -> str:
        setting = given.get((*key, "name"))
        return setting.value if setting else "auto"

    def spoken(axis: str) -> bool:
        return bool(fields_of(given, (axis,)))

    for axis in ("update", "weights", "precision", "attention"):
        name = name_of(axis)
        if name == "auto" and (command in TRAINS or spoken(axis)):
            name, reason = automatic(axis, command, found)
            if reason:
                settled[f"{axis}.name"] = reason
        take((axis,), name)
    name = name_of("compress")
    if name == "auto" and (command == "compress" or spoken("compress")):
        name, settled["compress.name"] = DEFAULTS["compress"], "the default for compress"
    take(("compress",), name)
    take(("compose",), name_of("compose"))
    for key in dict.fromkeys(k[:2] for k in given if k[0] == "objective"):
        take(key, key[1])
    for axis in ("weights", "update"):
        if any(k[:2] == ("heal", axis) for k in given):
            name = name_of("heal", axis)
            take(("heal", axis), DEFAULTS[axis] if name == "auto" else name)
    return found


def automatic(axis: str, command: str, found: Entries) -> tuple[str, str]:
    """The method for `auto` on an axis, and the reason; precision stays `auto` until later."""
    if axis == "attention":
        return "none", ""
    if axis == "update":
        return DEFAULTS[axis], "the default"
    if axis == "weights":
        update = found.get(("update",))
        if command == "pretrain":
            return FULL, "pretraining trains the matrices themselves"
        if update is not None and update.wants == "matrices":
            return FULL, f"{update.name} acts on whole matrices"
        return DEFAULTS[axis], "the default"
    return "auto", ""


def choice(given: Given, axis: str, entries: Entries) -> Choice:
    """The validated choice on one axis."""
    entry = entries[(axis,)]
    if entry is not None:
        return Choice(entry.name, build(entry, given, (axis,)))
    setting = given.get((axis, "name"))
    undecided = axis == "precision" and (setting is None or setting.value == "auto")
    return AUTO if undecided else NONE


def suited(choices: Mapping[str, Choice], said: set[str], settled: dict[str, str]) -> Choice:
    """The weights method with the fields that the update asks for, where they were not given."""
    from eckart.recipe.recipe import fitted

    choice, update = choices["weights"], choices["update"]
    weights: Any = choice.method
    if weights is None or update.method is None:
        return choice
    rule: Any = update.method
    fitting = fitted(weights, rule, said)
    for f in dataclasses.fields(fitting):
        if getattr(fitting, f.name) != getattr(weights, f.name):
            settled[f"weights.{f.name}"] = f"{update.name} asks for it"
    return Choice(choice.name, fitting)


def build(entry: Entry, given: Given, prefix: Key) -> Method:
    """The method with the given fields."""
    cls = registry.load(entry.name)
    hints = get_type_hints(cls, include_extras=True)
    more = f"All keys: eckart methods {entry.name}"
    values: dict[str, Any] = {}
    for name, described in entry.fields.items():
        setting = given.get((*prefix, name))
        unsaid = setting is None or (prefix == ("compress",) and is_unset(setting))
        if not unsaid:
            values[name] = checked(given[(*prefix, name)], hints[name], described.default, more)
        elif described.default is REQUIRED:
            key = ".".join((*prefix, name))
            raise UsageError(
                f"{entry.name} needs {key}",
                [(key, expected(hints[name]))],
                f"Type {key}=... {more}",
            )
    if "overrides" in values:
        values["overrides"] = tuple(
            checked_override(o, entry, given[(*prefix, "overrides")], hints, more)
            for o in values["overrides"]
        )
    try:
        return cls(**values)
    except UsageError as e:  # fields that do not fit together: add where each was written
        places = [(f"{s.name} = {s.text}", s.place) for k, s in given.items() if k[:-1] == prefix]
        raise UsageError(e.what, [*e.facts, *places], e.fix) from None


def is_unset(setting: Setting) -> bool:
    """Is this a size of the compression that is null because another one was given?"""
    return setting.key[-1] in BUDGET and setting.value is None


def checked_override(
    override: Mapping[str, Any], entry: Entry, setting: Setting, hints: Mapping[str, Any], more: str
) -> dict[str, Any]:
    """Raise UsageError unless an override has `match` and otherwise only fields of its method."""
    if "match" not in override:
        raise UsageError(
            f"an override without match     {setting.place}",
            fix=f"Write {setting.name}=[{{match: layers.0-3, ...}}]",
        )
    own = [name for name in entry.fields if name not in ("targets", "overrides")]
    values: dict[str, Any] = {"match": override["match"]}
    for name, value in override.items():
        if name == "match":
            continue
        part = Setting((*setting.key, str(name)), value, setting.place, str(value))
        if name not in own:
            raise unknown_key(part, [f"{setting.name}.{n}" for n in ("match", *own)], more)
        values[name] = checked(part, hints[name], entry.fields[name].default, more)
    return values


# Sections


def section(cls: type, given: Given, prefix: Key, base: Any = None) -> Any:
    """A section's dataclass from the given keys, on top of `base` or of its defaults."""
    hints = get_type_hints(cls, include_extras=True)
    values: dict[str, Any] = {}
    base = cls() if base is None else base
    for f in dataclasses.fields(base):
        setting = given.get((*prefix, f.name))
        if setting is not None:
            if (*prefix, f.name) == ("data", "train"):
                said = () if setting.value is None else sources(setting)
                setting = dataclasses.replace(setting, value=said)
            values[f.name] = checked(setting, hints[f.name], getattr(base, f.name), SCHEMA)
    return dataclasses.replace(base, **values)


def sources(setting: Setting) -> tuple[Source, ...]:
    """The sources in data.train: a path, or a list of paths and {path: ..., weight: ...}."""
    items = setting.value if isinstance(setting.value, list) else [setting.value]
    found: list[Source] = []
    for item in items:
        fields = item if isinstance(item, Mapping) else {"path": item}
        text = setting.text if len(items) == 1 and item is not None else None
        parts: Given = {
            (str(k),): Setting((*setting.key, str(k)), v, setting.place, text or str(v))
            for k, v in fields.items()
        }
        for key, part in parts.items():
            names = [f.name for f in dataclasses.fields(Source)]
            if key[0] not in names:
                raise unknown_key(part, [f"data.train.{name}" for name in names], SCHEMA)
        if ("path",) not in parts:
            raise UsageError(
                f"a source without a path     {setting.place}",
                fix="Write data.train=[{path: a.jsonl, weight: 2}, b.jsonl]",
            )
        found.append(section(Source, parts, (), Source(path="")))
    return tuple(found)


def budget(given: Given, method: Method | None) -> Budget:
    """The compression's size over the method's defaults; a given rank or error replaces `keep`."""
    own = {name: getattr(method, name) for name in BUDGET if hasattr(method, name)}
    said: Budget = section(Budget, given, ("compress",), Budget(**own))
    if ("compress", "keep") not in given and (said.rank is not None or said.error is not None):
        return dataclasses.replace(said, keep=None)
    return said


def healing(given: Given, entries: Entries, train: Train) -> Healing:
    """The training after a compression."""
    parts: dict[str, Choice] = {}
    for axis in ("weights", "update"):
        entry = entries.get(("heal", axis))
        parts[axis] = Choice(entry.name, build(entry, given, ("heal", axis))) if entry else AUTO
    heal: Heal = section(Heal, given, ("heal",))
    return Healing(steps=heal.steps, train=section(Train, given, ("heal", "train"), train), **parts)


def plain_value(given: Given, name: str, hint: Any, default: Any) -> Any:
    """A key without a section."""
    setting = given.get((name,))
    return default if setting is None else checked(setting, hint, default, SCHEMA)


# What cannot be


def refuse_unknown(given: Given, entries: Entries, command: str = "") -> None:
    """Raise UsageError for the first key that is in no section and no chosen method."""
    known: list[Key] = [(name,) for name in (*OWN.get(command, ()), *PLAIN)]
    for prefix, entry in entries.items():
        known += [(*prefix, name) for name in ("name", *(entry.fields if entry else ()))]
    known += [(s, f.name) for s, cls in SECTIONS.items() for f in dataclasses.fields(cls)]
    known += [("heal", "train", f.name) for f in dataclasses.fields(Train)]
    for key, setting in given.items():
        if key not in known:
            entry = next((e for p, e in entries.items() if e and key[:-1] == p), None)
            more = f"All keys: eckart methods {entry.name}" if entry else SCHEMA
            raise unknown_key(setting, [".".join(k) for k in known], more)


def require(given: Given, command: str) -> None:
    """Raise UsageError where the command lacks its model or data."""
    lacking = [k for k in NEEDS.get(command, ()) if k not in given or given[k].value is None]
    if not lacking:
        return
    if command in SHOWN:
        raise UsageError(
            f"eckart {command} needs a source", fix=f"Type eckart {command} {SHOWN[command]}"
        )
    raise UsageError(
        f"eckart {command} needs {' and '.join(k[0] for k in lacking)}",
        fix=f"Type eckart {command} {' '.join(k[0].upper() for k in NEEDS[command])}, or set "
        f"{' and '.join('.'.join(k) for k in lacking)} in a file: -c FILE",
    )
