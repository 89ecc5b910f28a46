"""Reads what a class body declares from its source, without running it.

Fields (with types, ranges, defaults and help) and class variables are literals in methods' files;
names bound at the top level of the module are looked up.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eckart.errors import FileError

NOT_LISTED = {"stages"}  # made of calls, or of fields: a thing for the runner, not for a list


@dataclass(frozen=True)
class Field:
    """One hyper-parameter as the file declares it."""

    name: str
    type: str  # without Annotated
    default: Any  # a literal; the source text where it is none; REQUIRED
    doc: str
    range: Mapping[str, Any] = field(default_factory=dict)  # {"ge": 1, "le": 64}

    @property
    def bounds(self) -> str:
        """The range as text: `>= 1, <= 64`."""
        signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
        return ", ".join(f"{signs.get(k, k)} {v}" for k, v in self.range.items())


class Required:
    """Marks a field without a default."""

    def __repr__(self) -> str:
        return "required"


REQUIRED = Required()


def parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"), str(path))
    except SyntaxError as e:
        place = f"{path}, line {e.lineno}"
        raise FileError("a method's file is not valid Python", [(place, e.msg)]) from None


def first_sentence(doc: str) -> str:
    """The first sentence on one line, without a leading `Name: `."""
    text = " ".join(doc.strip().split("\n\n")[0].split())
    head, colon, rest = text.partition(": ")
    text = rest if colon and len(head.split()) <= 3 else text
    return re.split(r"(?<=[.?!]) ", text)[0]


def read_fields(node: ast.ClassDef, names: Mapping[str, ast.expr]) -> Iterator[tuple[str, Field]]:
    """The dataclass fields of one class body, in order."""
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or is_classvar(statement.annotation):
            continue
        assert isinstance(statement.target, ast.Name)  # dataclass bodies annotate plain names
        kind, bounds = plain_type(statement.annotation, names)
        name = statement.target.id
        yield name, Field(name, kind, default(statement, names), docstring(following), bounds)


def plain_type(node: ast.expr, names: Mapping[str, ast.expr]) -> tuple[str, dict[str, Any]]:
    """A type's text without `Annotated`, and the bounds found in it at any depth."""
    node = resolve(node, names)
    parts: list[tuple[str, dict[str, Any]]] = []
    if isinstance(node, ast.BinOp):
        parts = [plain_type(side, names) for side in (node.left, node.right)]
        text = " | ".join(kind for kind, _ in parts)
    elif not isinstance(node, ast.Subscript) or ends(node.value, "Literal"):
        text = ast.unparse(node)
    elif ends(node.value, "Annotated") and isinstance(node.slice, ast.Tuple):
        kind, *marks = node.slice.elts
        parts = [plain_type(kind, names), *(("", dict(read_bounds(m, names))) for m in marks)]
        text = parts[0][0]
    else:
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        parts = [plain_type(part, names) for part in inner]
        text = f"{ast.unparse(node.value)}[{', '.join(kind for kind, _ in parts)}]"
    return text, {key: bound for _, bounds in parts for key, bound in bounds.items()}


def read_declares(node: ast.ClassDef, names: Mapping[str, ast.expr]) -> Iterator[tuple[str, Any]]:
    """Class variables with a value: `x: ClassVar = ...` and plain `x = ...`."""
    target: ast.expr
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and is_classvar(statement.annotation):
            target, value = statement.target, statement.value
        elif isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target, value = statement.targets[0], statement.value
        else:
            continue
        if isinstance(target, ast.Name) and value is not None and target.id not in NOT_LISTED:
            yield target.id, literal(value, names)


def is_classvar(annotation: ast.expr) -> bool:
    return ends(
        annotation.value if isinstance(annotation, ast.Subscript) else annotation, "ClassVar"
    )


def ends(node: ast.expr, name: str) -> bool:
    return ast.unparse(node).rsplit(".", 1)[-1] == name


def docstring(node: ast.stmt | None) -> str:
    """The docstring under a field, on one line."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return " ".join(str(node.value.value).split())
    return ""


def default(statement: ast.AnnAssign, names: Mapping[str, ast.expr]) -> Any:
    """A field's default; `field(default=...)` and `field(default_factory=dict)` included."""
    value = statement.value
    if value is None:
        return REQUIRED
    if isinstance(value, ast.Call) and ends(value.func, "field"):
        options = {k.arg: k.value for k in value.keywords}
        if "default" in options:
            return literal(options["default"], names)
        if "default_factory" in options:
            made: dict[str, Any] = {"dict": {}, "list": [], "tuple": ()}
            text = ast.unparse(options["default_factory"])
            return made.get(text, text)
        return REQUIRED
    return literal(value, names)


def read_bounds(mark: ast.expr, names: Mapping[str, ast.expr]) -> Iterator[tuple[str, Any]]:
    """`Ge(1)` -> ge 1; `Interval(gt=0, le=1)` -> gt 0, le 1; `MinLen(1)` -> minlen 1."""
    mark = resolve(mark, names)
    if not isinstance(mark, ast.Call):
        return
    kind = ast.unparse(mark.func).rsplit(".", 1)[-1].lower()
    yield from ((kind, literal(argument, names)) for argument in mark.args)
    yield from ((str(k.arg), literal(k.value, names)) for k in mark.keywords)


def literal(node: ast.expr, names: Mapping[str, ast.expr]) -> Any:
    """The value of a literal; `Paper(...)` as a dict; any other expression as its source text."""
    node = resolve(node, names)
    if isinstance(node, ast.Call) and ends(node.func, "Paper"):
        given = dict(zip(("title", "url", "venue"), node.args, strict=False))
        given |= {str(k.arg): k.value for k in node.keywords}
        return {name: literal(value, names) for name, value in given.items()}
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def resolve(node: ast.expr, names: Mapping[str, ast.expr]) -> ast.expr:
    """A name bound at the module's top level, replaced by its value."""
    return names.get(node.id, node) if isinstance(node, ast.Name) else node


def module_literals(tree: ast.Module) -> dict[str, ast.expr]:
    """Top-level `NAME = ...` of a module."""
    return {
        statement.targets[0].id: statement.value
        for statement in tree.body
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }
