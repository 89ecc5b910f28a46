"""Merges layers of settings: shorthands are expanded, and later layers override earlier ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from eckart.errors import UsageError
from eckart.jobs.settings.tree import OWN
from eckart.jobs.settings.words import Key, Setting, settings_of
from eckart.recipe import registry
from eckart.recipe.registry import Entry

AXES = ("weights", "update", "precision", "attention", "objective", "compress", "compose")
BUDGET = OWN["compress"]  # compress.X that hold whatever the method
OPTIONAL = ("attention", "objective")  # axes where `none` is a choice
METHOD: tuple[Key, ...] = (("method",), ("method", "name"))
EXCLUSIVE: tuple[tuple[Key, ...], ...] = (
    (("compress", "keep"), ("compress", "rank"), ("compress", "error")),
    (("train", "steps"), ("train", "epochs")),
)

Given = dict[Key, Setting]


def merge(layers: Sequence[Sequence[Setting]], command: str) -> Given:
    """The settings in force, by full key.

    Keys are (section, field), (axis, "name" or field), ("heal", axis, field) and
    ("objective", slug, field). A layer that names another method for an axis drops the earlier
    method's fields. A layer that names objectives replaces all earlier ones.
    """
    given: Given = {}
    method: Entry | None = None  # the method that method.X belongs to
    for layer in layers:
        settings, method = write_out(layer, command, method, given)
        if any(renames_objectives(s) for s in settings):
            drop(given, [k for k in given if k[0] == "objective"])
        for s in settings:
            before = given.get(s.key)
            if s.key[-1] == "name" and before is not None and before.value != s.value:
                drop(given, fields_of(given, s.key[:-1]))
            rivals = [k for group in EXCLUSIVE if s.key in group for k in group]
            if says_something(s):  # of keep, rank and error the last layer's counts
                drop(given, set(rivals) - {other.key for other in settings})
        given.update({s.key: s for s in settings if s.key != ("objective",)})
    return given


def write_out(
    layer: Sequence[Setting], command: str, method: Entry | None, given: Given
) -> tuple[list[Setting], Entry | None]:
    """One layer with full keys, and the method that method.X belongs to after it.

    method.X belongs to the method=NAME before it, else to the layer's first, else to the last
    one of an earlier layer.
    """
    named = [registry.find(word_of(s), place=s.place) for s in layer if s.key in METHOD]
    ahead = iter(named)
    current = named[0] if named else method
    found: list[Setting] = []
    for s in layer:
        if s.key in METHOD:
            current = next(ahead)
            found.append(s.moved(*home(current), "name", value=current.name))
        elif s.key[0] == "method":
            if current is None:
                raise UsageError(
                    f"{s.name} without a method     {s.place}",
                    fix=f"Type method=NAME {s.name}={s.text}",
                )
            found.append(s.moved(*home(current), *s.key[1:]))
        elif s.key[0] == "objective":
            found += objectives(s, layer, given)
        elif prefix := axis_prefix(s.key):
            found.append(named_setting(s, prefix) if s.key in (prefix, (*prefix, "name")) else s)
        elif s.key == ("data",):
            found.append(s.moved("data", "train"))
        elif len(s.key) == 1 and s.key[0] in OWN.get(command, ()):
            found.append(s.moved(command, *s.key))
        else:
            found.append(s)
    return found, current


def home(entry: Entry) -> Key:
    """The prefix of a method's keys."""
    return (entry.axis, entry.name) if entry.axis == "objective" else (entry.axis,)


def axis_prefix(key: Key) -> Key | None:
    """("weights",) or ("heal", "weights") for a key on an axis."""
    if key[0] in AXES:
        return key[:1]
    return key[:2] if key[0] == "heal" and key[1:2] in (("weights",), ("update",)) else None


def named_setting(s: Setting, prefix: Key) -> Setting:
    """The setting of a method's name, from `weights=lora` or `weights.name=lora`."""
    word = word_of(s)
    undecided = word == "auto" or (word == "none" and prefix[-1] in OPTIONAL)
    name = word if undecided else registry.find(word, prefix[-1], s.place).name
    return s.moved(*prefix, "name", value=name)


def word_of(s: Setting) -> str:
    """A method's name; null is `none`."""
    return "none" if s.value is None else str(s.value) if isinstance(s.value, str) else s.text


def objectives(s: Setting, layer: Sequence[Setting], given: Given) -> Iterator[Setting]:
    """`objective`, a name, a list of names and mappings, one mapping's field, or slug.field."""
    if s.key in (("objective",), ("objective", "name")):
        yield Setting(("objective",), None, s.place, s.text)
        for item in s.value if isinstance(s.value, list) else [s.value]:
            fields = item if isinstance(item, dict) else {"name": item}
            if fields.get("name") in (None, "none"):
                continue
            slug = registry.find(str(fields["name"]), "objective", s.place).name
            for part in settings_of({**fields, "name": slug}, s.place):
                yield part.moved("objective", slug, *part.key)
    elif len(s.key) == 2:
        here = [o for o in layer if o.key in (("objective",), ("objective", "name"))]
        slugs = [word_of(o) for o in here] or [k[1] for k in given if k[0] == "objective"]
        if len(set(slugs)) != 1:
            raise UsageError(
                f"{s.name} belongs to no single objective     {s.place}",
                fix=f"Type objective.NAME.{s.key[1]}={s.text}",
            )
        slug = registry.find(slugs[0], "objective", s.place).name
        yield s.moved("objective", slug, s.key[1])
    else:
        slug = registry.find(s.key[1], "objective", s.place).name
        yield s.moved("objective", slug, *s.key[2:])


def says_something(s: Setting) -> bool:
    return s.value is not None and s.value != "auto"


def renames_objectives(s: Setting) -> bool:
    return s.key[0] == "objective" and (len(s.key) == 1 or s.key[-1] == "name")


def fields_of(given: Given, prefix: Key) -> list[Key]:
    """The keys of one axis' method and its name, without the compression's size."""
    keys = [k for k in given if k[:-1] == prefix]
    return [k for k in keys if not (prefix == ("compress",) and k[-1] in BUDGET)]


def drop(given: Given, keys: Iterable[Key]) -> None:
    for key in keys:
        given.pop(key, None)
