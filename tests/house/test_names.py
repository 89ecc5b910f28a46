"""Names and sizes of files, and what the package offers."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

import eckart
from eckart.recipe import registry

SRC = Path(eckart.__file__).parent
FILES = sorted(SRC.rglob("*.py"))
SAYS_NOTHING = {"utils", "util", "common", "misc", "helpers", "helper", "base", "core", "manager"}


def test_files_are_named_for_what_they_hold():
    assert not [p for p in FILES if set(p.stem.split("_")) & SAYS_NOTHING]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_every_file_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_public_names_are_found():
    for name, module in eckart.PUBLIC.items():
        assert getattr(eckart, name) is getattr(import_module(module), name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        eckart.nothing  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        eckart.Nothing  # noqa: B018


def test_no_file_but_the_registry_knows_a_method_by_name():
    slugs = set(registry.methods())
    slugs -= {"fp32", "bf16", "dense"}  # also words for a dtype and a file format
    for path in FILES:
        if path.is_relative_to(SRC / "methods") or path == SRC / "recipe" / "registry.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare | ast.Dict | ast.Call):
                found = [c for c in ast.iter_child_nodes(node) if isinstance(c, ast.Constant)]
                named = {c.value for c in found if isinstance(c.value, str)} & slugs
                assert not named, f"{path.relative_to(SRC)}:{node.lineno} names {named}"
