"""Checks a method's fields, types and ranges, when it is constructed in Python."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from eckart.errors import UsageError

COMPARISONS: tuple[tuple[str, str, Callable[[Any, Any], bool]], ...] = (
    ("ge", ">=", lambda a, b: a >= b),
    ("gt", ">", lambda a, b: a > b),
    ("le", "<=", lambda a, b: a <= b),
    ("lt", "<", lambda a, b: a < b),
)


def check_fields(method: Any) -> None:
    """Raise UsageError for the first field of the wrong type or outside its range.

    Overrides are checked in the same way; names in them that are not fields belong to the targets.
    """
    hints = typing.get_type_hints(type(method), include_extras=True)
    for f in dataclasses.fields(method):
        check_value(method.slug, f.name, getattr(method, f.name), hints[f.name])
    for number, override in enumerate(getattr(method, "overrides", ())):
        for name, hint in {**hints, "match": str}.items():
            if name in override:
                check_value(method.slug, f"overrides[{number}].{name}", override[name], hint)


def check_value(slug: str, name: str, value: Any, hint: Any) -> None:
    """Raise UsageError for a value of the wrong type or outside its range."""
    if not fits(value, hint):
        raise UsageError(
            f"{slug}: {name} has the wrong type",
            [(f"{name} = {value!r}", f"expected {spell(hint)}")],
        )
    for limit in broken(value, hint):
        raise UsageError(
            f"{slug}: {name} is out of range", [(f"{name} = {value!r}", f"needs {limit}")]
        )


def broken(value: Any, hint: Any) -> Iterator[str]:
    """The limits of a type annotation that a value of that type violates."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for option in typing.get_args(hint):
            if fits(value, option):
                yield from broken(value, option)
        return
    if typing.get_origin(hint) is not Annotated:
        return
    for bound in typing.get_args(hint)[1:]:
        for attribute, sign, holds in COMPARISONS:
            limit = getattr(bound, attribute, None)
            if limit is not None and not holds(value, limit):
                yield f"{sign} {limit}"


def fits(value: Any, hint: Any) -> bool:
    """Is the value of this type? A bool does not count as a number; an int is a float."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, a) for a in args)
    if origin is Annotated:
        return fits(value, args[0])
    if hint in (int, float):
        numbers = int if hint is int else int | float
        return isinstance(value, numbers) and not isinstance(value, bool)
    if origin is tuple:
        if args[-1:] == (Ellipsis,):
            return isinstance(value, tuple) and all(fits(v, args[0]) for v in value)
        return (
            isinstance(value, tuple)
            and len(value) == len(args)
            and all(fits(v, a) for v, a in zip(value, args, strict=True))
        )
    return isinstance(value, origin or (type(None) if hint is None else hint))


def spell(hint: Any) -> str:
    """A type as it is written in error messages."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return spell(args[0])
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(spell(a) for a in args)
    return "none" if hint is type(None) else getattr(hint, "__name__", str(hint))
