"""Validation of one setting: its value converted to the key's type, or an error with its place.

Types are the annotations of a section or a method (`Annotated[int, Ge(1)] | Literal["auto"]`).
pydantic validates in strict mode: a bool is not accepted as a number, nor a string as a rank.
"""

from __future__ import annotations

import math
import types
import typing
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import TypeAdapter, ValidationError

from eckart.errors import UsageError, nearest
from eckart.jobs.settings.words import Setting

NONE_WORDS = ("none", "null", "")
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def checked(setting: Setting, hint: Any, default: Any, more: str) -> Any:
    """The setting's value, converted to the type. Raises UsageError naming key, place and range.

    `default` is the key's default; `more` ends the message with where all keys are listed.
    """
    value = shaped(setting.value, setting.text, hint)
    try:
        value = adapter(hint).validate_python(value, strict=True)
        wrong = "" if is_finite(value) else "out of range"
    except ValidationError as e:
        kinds = {error["type"] for error in e.errors()}
        out = any(kind.startswith(("greater_than", "less_than")) for kind in kinds)
        wrong = "out of range" if out else "of the wrong type"
    if wrong:
        words = nearest(setting.text, choices(hint)) if isinstance(value, str) else []
        usual = "" if default is None else f" for {written(default)}"
        advice = f"Did you mean {words[0]}?" if words else f"Leave it out{usual}."
        raise UsageError(
            f"{setting.name} is {wrong}" if not choices(hint) else f"no such {setting.name}",
            [(f"{setting.name} = {setting.text}", setting.place), ("allowed", expected(hint))],
            f"{advice} {more}",
        )
    return value


def choices(hint: Any) -> list[str]:
    """The choices of a type that consists of literals; empty for any other."""
    options = [o for o in alternatives(hint) if o is not type(None)]
    if any(typing.get_origin(o) is not Literal for o in options):
        return []
    return [w for o in options for w in typing.get_args(o)]


@cache
def adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint)


def is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def shaped(value: Any, text: str, hint: Any) -> Any:
    """The value in the form that the type needs, before validation.

    YAML reads `off` as a bool, `0001` as a number and `none` as text: if the type is text, the
    value as typed is used. A single value becomes a list of one.
    """
    options = alternatives(hint)
    words = [w for o in options if typing.get_origin(o) is Literal for w in typing.get_args(o)]
    if not isinstance(value, str | list | tuple | dict) and text in words:
        return text
    nothing = ("",) if str in options else NONE_WORDS  # a name may be `none`
    if type(None) in options and text.lower() in nothing and text not in words:
        return None
    if value is not None and str in options and not {int, float, bool} & set(options):
        return text if isinstance(value, int | float | bool) else value
    for option in options:
        if typing.get_origin(option) is tuple:
            inner = (typing.get_args(option) or (Any,))[0]
            if isinstance(value, list | tuple):
                return tuple(shaped(v, str(v), inner) for v in value)
            if isinstance(value, str) and value not in words and str in alternatives(inner):
                return (value,)
    return value


def alternatives(hint: Any) -> list[Any]:
    """The members of a union, without Annotated."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return alternatives(typing.get_args(hint)[0])
    if origin in (typing.Union, types.UnionType):
        return [a for member in typing.get_args(hint) for a in alternatives(member)]
    return [hint]


def expected(hint: Any) -> str:
    """A type and its range in words: `a whole number >= 1, or auto`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        marks = [
            f"{sign} {getattr(mark, attribute)}"
            for mark in args[1:]
            for attribute, sign in BOUNDS.items()
            if getattr(mark, attribute, None) is not None
        ]
        return " ".join([expected(args[0]), " and ".join(marks)]).strip()
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(expected(a) for a in args)
    if origin is Literal:
        return ", ".join(str(a) for a in args)
    if origin is tuple:
        inner = [a for a in args if a is not Ellipsis]
        length = f" of {len(inner)}" if len(inner) == len(args) else ""
        return f"a list{length}, each {expected(inner[0])}" if inner else "a list"
    if origin is dict or hint is dict:
        return "keys with values"
    return "null" if hint is type(None) else KINDS.get(hint, getattr(hint, "__name__", str(hint)))


def written(value: Any) -> str:
    """A value in the form in which it is typed."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(written(v) for v in value)}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) or '""'
