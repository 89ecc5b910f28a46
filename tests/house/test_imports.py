"""No arrow between rooms points the wrong way, and foreign packages stay where they belong."""

import ast
from pathlib import Path

import pytest

import eckart

SRC = Path(eckart.__file__).parent
# A file imports from its own room or from rooms further down.
ORDER = [
    {"__main__"},
    {"cli"},
    {"jobs"},
    {"report", "claims"},
    {"hf"},
    {"io"},
    {"methods"},
    {"recipe"},
    {"kernels"},
    {"linear", "optim", "attention", "precision"},
    {"decompose"},
    {"errors"},
]
RANK = {room: i for i, rooms in enumerate(ORDER) for room in rooms}
ONLY = {  # package -> the rooms that may import it
    "transformers": {"io", "hf", "jobs"},
    "trl": {"jobs"},
    "accelerate": {"jobs"},
    "safetensors": {"io"},
    "datasets": {"io"},
    "typer": {"cli"},
    "pydantic": {"jobs"},
    "omegaconf": {"jobs"},
    "yaml": {"jobs"},
    "peft": set(),
    "torchvision": set(),
    "timm": set(),
}
FILES = sorted(p for p in SRC.rglob("*.py") if p != SRC / "__init__.py")


def imports(path: Path) -> list[tuple[str, int]]:
    """Every module that a file imports, with its line; those for type checkers left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            found.append((node.module, node.lineno))
            if node.module == "eckart":
                found += [(f"eckart.{alias.name}", node.lineno) for alias in node.names]
    return found


def room_of(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_arrows_point_downwards(path):
    here = room_of(path)
    for module, line in imports(path):
        package, _, rest = module.partition(".")
        place = f"{path.relative_to(SRC)}:{line} imports {module}"
        if package in ONLY:
            assert here in ONLY[package], place
        there = rest.partition(".")[0]
        if package != "eckart" or there not in RANK or there == here:
            continue
        assert RANK[there] > RANK[here], place
        assert there != "kernels" or path.name == "attachment.py", place


def test_arrows_between_the_rooms_of_jobs_point_downwards():
    """Commands stand above all; a bench in the lab takes from them how a model is opened."""
    rank = {room: i for i, room in enumerate(("lab", "training", "settings", "measuring"))}
    for path in (SRC / "jobs").glob("*/*.py"):
        here = path.parent.name
        for module, line in imports(path):
            if not module.startswith("eckart.jobs."):
                continue
            there = module.split(".")[2]
            if there in rank:
                assert rank[there] >= rank[here], f"{path}:{line} imports {module}"
            else:
                assert here == "lab", f"{path}:{line} imports {module}"


def test_every_room_has_its_place():
    rooms = {room_of(p) for p in FILES}
    assert rooms <= set(RANK)


@pytest.mark.parametrize("path", sorted((SRC / "methods").glob("*/*.py")), ids=lambda p: p.stem)
def test_a_method_imports_no_other_method(path):
    assert not [m for m, _ in imports(path) if m.startswith("eckart.methods")]


def test_a_claim_imports_no_job():
    for path in sorted((SRC / "claims").glob("*.py")):
        assert not [m for m, _ in imports(path) if m.startswith("eckart.jobs")], path
