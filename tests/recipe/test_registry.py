"""The registry reads files without importing them: what it says is what the import says."""

import ast
import subprocess
import sys
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Annotated, Any

import pytest

from eckart.errors import FileError, UsageError
from eckart.jobs.settings.config import resolve
from eckart.recipe import Recipe, registry
from eckart.recipe.literals import REQUIRED

FILE = '''"""Thing: a method of one number.

    y = W x
"""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from annotated_types import Ge

from eckart.recipe import Paper, Weights

Size = Annotated[int, Ge(1)]


@dataclass(frozen=True)
class Thing(Weights):
    """A thing."""

    size: Size = 3
    """How large. Paper: 3."""

    other: Size | None = None

    more: dict[str, int] = field(default_factory=dict)

    paper: ClassVar = Paper("On Things", "https://arxiv.org/abs/2501.00001")
    promises: ClassVar = ("merges",)
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of methods that is listed while the test runs."""
    monkeypatch.setattr(registry, "folders", [])
    (tmp_path / "weights").mkdir()
    return registry.add_folder(tmp_path)


ENTRIES = registry.methods(registry.BUILTIN)


@pytest.fixture(params=ENTRIES, ids=str)
def entry(request):
    return ENTRIES[request.param]


def bare(hint: Any) -> Any:
    """A type hint without Annotated, and the bounds that it had."""
    bounds: dict[str, Any] = {}
    if typing.get_origin(hint) is Annotated:
        kind, *marks = typing.get_args(hint)
        for mark in marks:
            for name in ("ge", "gt", "le", "lt", "min_length", "max_length"):
                if getattr(mark, name, None) is not None:
                    bounds[name] = getattr(mark, name)
        return bounds | bare(kind)
    for argument in typing.get_args(hint):
        bounds |= bare(argument)
    return bounds


def test_a_file_says_what_its_import_says(entry):
    cls = registry.load(entry.name)
    hints = typing.get_type_hints(cls, include_extras=True)
    assert cls.__name__ == entry.class_name and cls.axis == entry.axis
    assert {f.name for f in fields(cls)} == set(entry.fields)
    for f in fields(cls):
        read = entry.fields[f.name]
        assert read.range == bare(hints[f.name])
        if f.default is not MISSING:
            assert read.default == f.default and type(read.default) is type(f.default)
        elif f.default_factory is not MISSING:
            assert read.default == f.default_factory()
        else:
            assert read.default is REQUIRED


def test_class_variables_are_read_as_they_are(entry):
    cls = registry.load(entry.name)
    for name, value in entry.declares.items():
        actual = getattr(cls, name)
        if name == "paper" and actual is not None:
            shown = {k: v for k, v in vars(actual).items() if v}
            assert {k: v for k, v in value.items() if v} == shown
        else:
            assert value == actual, name


def test_every_field_is_explained(entry):
    missing = [f.name for f in entry.fields.values() if not f.doc]
    assert not missing


def test_a_rate_that_a_field_decides_is_there_for_all_its_values(entry):
    cls = registry.load(entry.name)
    for scratch, rates in enumerate((cls.default_lr, cls.scratch_lr)):
        conditions = rates.values() if isinstance(rates, Mapping) else ()
        for name in {name for condition in conditions for name in condition}:
            for value in typing.get_args(typing.get_type_hints(cls)[name]) or (False, True):
                assert cls(**{name: value}).usual_lr(bool(scratch)) in rates


def test_a_method_has_an_instance_slug_like_its_file(entry):
    needed = [f for f in entry.fields.values() if f.default is REQUIRED]
    if not needed:
        assert registry.load(entry.name)().slug == entry.name


def test_listing_imports_neither_torch_nor_pydantic():
    code = (
        "import sys; from eckart.recipe import registry; found = registry.methods();"
        "print(len(found), [m for m in ('torch', 'pydantic', 'omegaconf') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split(None, 1) == [str(len(registry.methods())), "[]\n"]


def test_a_file_in_another_folder_is_a_method(folder):
    (folder / "weights" / "my_thing.py").write_text(FILE)
    entry = registry.find("my-thing")
    assert entry is registry.find("my_thing")
    assert (entry.axis, entry.class_name, entry.summary) == (
        "weights",
        "Thing",
        "a method of one number.",
    )
    assert entry.paper["title"] == "On Things" and entry.promises == ("merges",)
    assert entry.base == "frozen"  # the axis' own
    size, other = entry.fields["size"], entry.fields["other"]
    assert (size.type, size.default, size.doc, size.range) == (
        "int",
        3,
        "How large. Paper: 3.",
        {"ge": 1},
    )
    assert (other.type, other.default, other.range) == ("int | None", None, {"ge": 1})
    assert (entry.fields["more"].type, entry.fields["more"].default) == ("dict[str, int]", {})
    assert list(entry.fields) == ["size", "other", "more", "targets", "overrides"]
    assert registry.load("my-thing")(size=4).slug == "my-thing"
    assert registry.load("my-thing") is registry.load("my_thing")


def test_the_environment_names_folders(tmp_path, monkeypatch):
    (tmp_path / "a" / "weights").mkdir(parents=True)
    (tmp_path / "a" / "weights" / "here.py").write_text(FILE)
    monkeypatch.setenv("ECKART_METHODS", str(tmp_path / "a"))
    assert registry.find("here").name == "here"
    monkeypatch.delenv("ECKART_METHODS")
    with pytest.raises(UsageError, match="unknown method here"):
        registry.find("here")


def test_an_edited_file_is_read_again(folder):
    path = folder / "weights" / "my_thing.py"
    path.write_text(FILE)
    assert registry.find("my-thing").fields["size"].default == 3
    path.write_text(FILE.replace("Size = 3", "Size = 12"))
    assert registry.find("my-thing").fields["size"].default == 12


def test_a_public_name_for_every_method(entry):
    import eckart

    assert getattr(eckart, entry.class_name) is registry.load(entry.name)
    assert entry.class_name in dir(eckart)


def test_unknown_names_are_answered_with_the_nearest(folder):
    (folder / "weights" / "my_thing.py").write_text(FILE)
    with pytest.raises(UsageError) as e:
        registry.find("my-thin", place="command line")
    assert str(e.value) == (
        "unknown method my-thin     command line\n"
        "Did you mean my-thing? All methods: eckart methods"
    )


def test_a_method_on_another_axis_is_sent_there(folder):
    (folder / "weights" / "my_thing.py").write_text(FILE)
    with pytest.raises(UsageError) as e:
        registry.find("my-thing", "update")
    assert str(e.value) == (
        "my-thing is not a choice for update\nIt is one for weights: type weights=my-thing"
    )


@pytest.mark.parametrize("axis", registry.IDLE)
def test_a_method_that_nothing_carries_out_is_refused(folder, axis):
    (folder / axis).mkdir()
    (folder / axis / "my_thing.py").write_text(FILE.replace("Weights", axis.capitalize()))
    said = f"nothing carries out {axis} yet\n  {axis} = my-thing  unused\nLeave it out."
    with pytest.raises(UsageError, match=said):
        resolve("finetune", "m", "d", [f"{axis}=my-thing"])
    with pytest.raises(UsageError, match=f"unknown key {axis}.size"):
        resolve("finetune", "m", "d", [f"{axis}.size=3"])
    with pytest.raises(UsageError, match=said if axis == "attention" else "not a choice for"):
        Recipe(attention=registry.load("my-thing")())


def test_files_that_are_no_methods_are_named(folder):
    path = folder / "weights" / "broken.py"
    path.write_text("x = = 1\n")
    with pytest.raises(FileError, match=r"broken\.py, line 1"):
        registry.methods()
    path.write_text("x = 1\n")
    with pytest.raises(FileError, match="one class that derives from Weights"):
        registry.methods()
    path.rename(folder / "weights" / "_broken.py")
    assert "broken" not in registry.methods()


def test_two_files_of_one_name_are_refused(folder):
    (folder / "update").mkdir()
    (folder / "weights" / "my_thing.py").write_text(FILE)
    (folder / "update" / "my_thing.py").write_text(FILE.replace("Weights", "Update"))
    with pytest.raises(FileError, match="two methods are called my-thing"):
        registry.methods()


def test_the_stub_lists_the_methods():
    path = registry.BUILTIN / "__init__.pyi"
    assert path.read_text() == registry.stub(), "run `make stubs`"
    ast.parse(registry.stub())


def test_the_defaults_exist():
    for axis, name in registry.DEFAULTS.items():
        assert registry.find(name, axis)
    assert registry.find(registry.FULL, "weights").base == "trained"
