"""The registry of methods: reads from the folder which there are, without importing them.

A method is one file, `methods/<axis>/<slug>.py`, with one dataclass that derives from the axis'
class in `recipe/method.py`. Its fields (types, ranges, defaults, help) and its declarations
(paper, promises, needs, ...) are literals, so `ast` can read them: listing all methods takes
milliseconds and imports neither torch nor the methods. Loading a method imports its file alone.

More folders of the same form are added by `add_folder` and by the environment variable
ECKART_METHODS (separated like PATH).
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eckart.errors import FileError, UsageError, nearest
from eckart.recipe.literals import (
    Field,
    first_sentence,
    module_literals,
    parse,
    read_declares,
    read_fields,
)

if TYPE_CHECKING:
    from eckart.recipe.method import Method

BUILTIN = Path(__file__).parent.parent / "methods"
CONTRACT = Path(__file__).with_name("method.py")

# What `auto` and an unnamed axis stand for, where no other rule decides. The one place
# outside a method's file that knows a slug.
DEFAULTS = {"weights": "lora", "update": "adamw", "compress": "svd"}
IDLE = ("attention", "compose")  # axes whose methods nothing carries out yet
FULL = "dense"  # the weights choice that trains the matrices themselves
# Names that other tools use for a choice -> what to type.
ELSEWHERE = {
    "full": "weights=dense",
    "qlora": "weights=lora precision=int8",
    "lora+": "weights=lora weights.lr_ratio=16",
    "lora-plus": "weights=lora weights.lr_ratio=16",
    "rslora": "weights=lora weights.scaling=rslora",
    "lora-ga": "weights=lora weights.init=gradient",
    **{start: f"weights=lora weights.init={start}" for start in ("pissa", "olora", "eva")},
    **dict.fromkeys(("adam", "adamw-torch"), "update=adamw"),
    **dict.fromkeys(
        ["adam8bit", "adamw8bit", "adamw-8bit", "adamw-bnb-8bit", "paged-adamw-8bit"],
        "update=galore update.inner=adam8bit: a projected Adam has moments in 8 bits",
    ),
    "galore-adamw-8bit": "update=galore update.inner=adam8bit",
    "galore-adafactor": "update=galore update.inner=adafactor",
    "galore-adamw-layerwise": "update=galore train.layerwise=true",
    "q-galore": "update=galore update.inner=adam8bit update.basis_dtype=int4 update.adaptive=0.4",
    **dict.fromkeys(("fp16", "float16", "half", "bfloat16"), "precision=bf16"),
    **dict.fromkeys(("8bit", "8-bit", "4bit", "nf4"), "precision=int8"),
}

folders: list[Path] = []  # besides the built-in one and ECKART_METHODS


@dataclass(frozen=True)
class Entry:
    """What one method's file declares."""

    name: str  # with hyphens
    axis: str
    class_name: str
    path: Path
    module: str
    summary: str  # the first line of the file's docstring, without the name
    doc: str  # the file's docstring
    fields: Mapping[str, Field]  # the method's own, then the axis'
    declares: Mapping[str, Any]  # class variables: base, wants, needs, promises, peft_type, ...

    @property
    def paper(self) -> Mapping[str, str]:
        """Title, url and venue; empty where the method has no paper."""
        return self.declares.get("paper") or {}

    @property
    def mission(self) -> bool:
        return bool(self.declares.get("mission"))

    @property
    def promises(self) -> Any:
        """Names, or {name: {field: values for which it holds}}."""
        return self.declares.get("promises") or ()

    @property
    def needs(self) -> Any:
        """Names, or {name: {field: values for which it holds}}."""
        return self.declares.get("needs") or ()

    @property
    def base(self) -> str | None:
        return self.declares.get("base")

    @property
    def wants(self) -> str | None:
        return self.declares.get("wants")


def add_folder(path: str | os.PathLike[str]) -> Path:
    """Add a folder of methods (`<path>/<axis>/<slug>.py`); returns it resolved."""
    folder = Path(path).resolve()
    if not folder.is_dir():
        raise FileError(f"no folder of methods at {path}")
    if folder not in folders:
        folders.append(folder)
    return folder


def methods(folder: str | os.PathLike[str] | None = None) -> dict[str, Entry]:
    """All methods by slug, sorted; only those of `folder` if it is given."""
    environment = [Path(p) for p in os.environ.get("ECKART_METHODS", "").split(os.pathsep) if p]
    places = [Path(folder)] if folder is not None else [BUILTIN, *environment, *folders]
    found: dict[str, Entry] = {}
    for path in dict.fromkeys(p.resolve() for place in places for p in method_files(place)):
        stamp = path.stat()
        entry = read(path, stamp.st_mtime_ns, stamp.st_size)
        if entry.name in found:
            raise FileError(
                f"two methods are called {entry.name}",
                [("one", str(found[entry.name].path)), ("other", str(path))],
                "Rename one of the files.",
            )
        found[entry.name] = entry
    return dict(sorted(found.items()))


def method_files(folder: Path) -> list[Path]:
    """`<axis>/<slug>.py` in a folder; names with a leading underscore are not methods."""
    axes = axis_classes()
    return sorted(p for p in folder.glob("*/*.py") if p.parent.name in axes and p.name[0] != "_")


def find(name: str, axis: str | None = None, place: str = "") -> Entry:
    """The entry of a slug, with hyphens or underscores; UsageError suggests the nearest one.

    `axis` is the axis that it must belong to; `place` is where the name was typed, for the
    message.
    """
    entries = methods()
    entry = entries.get(spelled(name))
    at = f"     {place}" if place else ""
    if entry is None:
        fix = f"{meant(name, axis, entries)} All methods: eckart methods".strip()
        raise UsageError(f"unknown method {name}{at}", fix=fix)
    if axis not in (None, entry.axis):
        raise UsageError(
            f"{entry.name} is not a choice for {axis}{at}",
            fix=f"It is one for {entry.axis}: type {entry.axis}={entry.name}",
        )
    return entry


def refuse_idle(name: str, axis: str) -> None:
    """Raise UsageError for a method of an axis that would be left unused."""
    if axis in IDLE:
        raise UsageError(
            f"nothing carries out {axis} yet", [(f"{axis} = {name}", "unused")], "Leave it out."
        )


def spelled(name: str) -> str:
    """A name as it is listed."""
    return name.strip().replace("_", "-").lower()


def elsewhere(name: str) -> str | None:
    """What to type for a name that other tools use for a choice; None for any other word."""
    return ELSEWHERE.get(spelled(name))


def meant(name: str, axis: str | None, entries: Mapping[str, Entry]) -> str:
    """What to type for an unknown method name; empty if no name is close."""
    if said := elsewhere(name):
        return f"Here it is {said}."
    parts = [entry for word in re.split("[+,]", name) if (entry := entries.get(spelled(word)))]
    if len(parts) > 1:
        if len({entry.axis for entry in parts}) == len(parts):
            return f"Type {' '.join(f'{entry.axis}={entry.name}' for entry in parts)}."
        names = ",".join(entry.name for entry in parts)
        return f"A run has one; to compare: eckart bench MODEL DATA --methods {names}."
    close = nearest(name, [e.name for e in entries.values() if axis in (None, e.axis)])
    return f"Did you mean {close[0]}?" if close else ""


def load(name: str) -> type[Method]:
    """Import a method's file and return its class."""
    entry = find(name)
    if entry.path.is_relative_to(BUILTIN.resolve()):
        module = importlib.import_module(entry.module)
    else:
        module = sys.modules.get(entry.module) or import_file(entry.module, entry.path)
    cls: type[Method] = getattr(module, entry.class_name)
    return cls


def import_file(module_name: str, path: Path) -> Any:
    """Import a file outside the package under the given module name."""
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None  # a .py file always has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses looks its own module up while it runs
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def class_names() -> dict[str, str]:
    """{class name: slug} of all methods: the public names of `eckart.methods`."""
    return {entry.class_name: entry.name for entry in methods().values()}


def questions() -> dict[str, str]:
    """{axis: its question}, in order: the docstrings of the axes' classes."""
    classes = {axis: contract()[name] for axis, name in axis_classes().items()}
    return {axis: first_sentence(ast.get_docstring(c) or "") for axis, c in classes.items()}


def stub() -> str:
    """The text of `methods/__init__.pyi`: the built-in classes, for type checkers."""
    entries = sorted(methods(BUILTIN).values(), key=lambda e: e.module)
    lines = [f"from {e.module} import {e.class_name} as {e.class_name}" for e in entries]
    return "\n".join(["# Made by `make stubs`.", *lines, ""])


# Reading one file


@cache
def read(path: Path, mtime: int, size: int) -> Entry:
    """The entry of one file. `mtime` and `size` are in the cache key: edited files are reread."""
    tree = parse(path)
    axis = path.parent.name
    base = axis_classes()[axis]
    node = method_class(tree, path, base)
    names = module_literals(tree)
    own = dict(read_fields(node, names))
    inherited = {n: f for n, f in contract_fields(base).items() if n not in own}
    doc = ast.get_docstring(tree) or ""
    slug = path.stem.replace("_", "-")
    return Entry(
        name=slug,
        axis=axis,
        class_name=node.name,
        path=path,
        module=module_name(path, axis),
        summary=first_sentence(doc) or first_sentence(ast.get_docstring(node) or ""),
        doc=doc,
        fields={**own, **inherited},
        declares={**contract_declares(base), **dict(read_declares(node, names))},
    )


def module_name(path: Path, axis: str) -> str:
    """The name under which the file is imported; its last part is the file's name, the slug."""
    if path.is_relative_to(BUILTIN.resolve()):
        return f"eckart.methods.{axis}.{path.stem}"
    digest = sha256(str(path.parent.parent).encode()).hexdigest()[:8]
    return f"eckart_methods_{digest}.{axis}.{path.stem}"


def method_class(tree: ast.Module, path: Path, base: str) -> ast.ClassDef:
    """The one class in a file that derives from the axis' class."""
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef)]
    found = [n for n in classes if base in {ast.unparse(b).rsplit(".", 1)[-1] for b in n.bases}]
    if len(found) != 1:
        raise FileError(
            f"a method's file holds one class that derives from {base}",
            [(str(path), f"has {len(found)}")],
        )
    return found[0]


# The axes' classes in recipe/method.py


@cache
def contract() -> dict[str, ast.ClassDef]:
    """The class definitions of recipe/method.py by name."""
    return {n.name: n for n in parse(CONTRACT).body if isinstance(n, ast.ClassDef)}


@cache
def axis_classes() -> dict[str, str]:
    """{axis: class name}, in the order of recipe/method.py."""
    found = {n: dict(read_declares(c, {})).get("axis") for n, c in contract().items()}
    return {axis: name for name, axis in found.items() if axis}


def lineage(name: str) -> list[ast.ClassDef]:
    """A contract class, after its base classes."""
    node = contract()[name]
    above = [lineage(ast.unparse(b)) for b in node.bases if ast.unparse(b) in contract()]
    return [c for chain in above for c in chain] + [node]


@cache
def contract_fields(name: str) -> dict[str, Field]:
    return {k: v for node in lineage(name) for k, v in read_fields(node, {})}


@cache
def contract_declares(name: str) -> dict[str, Any]:
    return {k: v for node in lineage(name) for k, v in read_declares(node, {})}


if __name__ == "__main__":
    sys.stdout.write(stub())
