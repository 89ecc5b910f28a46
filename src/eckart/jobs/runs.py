"""`eckart runs [DIR]`: lists runs with their recipe, state and score."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from eckart.errors import FileError
from eckart.io.run import is_open, read_metrics
from eckart.recipe import registry
from eckart.report.text import aligned

ENDS = {0: "done", 4: "out of room", 5: "diverged", 130: "interrupted"}  # by exit code


def run(folder: str = "runs", as_json: bool = False) -> dict[str, Any]:
    """Print a line for each run in a folder, oldest first; returns the --json document.

    Raises FileError if the folder does not exist.
    """
    root = Path(folder)
    if not root.is_dir():
        what = "this is a file, not a folder" if root.exists() else "no such folder"
        raise FileError(what, [(folder, "")], "Runs are made by eckart finetune, pretrain, ...")
    found = [described(path) for path in runs_in(root)]
    found.sort(key=lambda each: each["changed"])
    if not as_json:
        print(table(found) if found else f"no runs in {folder}")
    return {"command": "runs", "exit": 0, "folder": folder, "runs": found}


def runs_in(root: Path) -> Iterator[Path]:
    """Folders with a run.json, at or below the root, without the stages of a run."""
    if (root / "run.json").is_file():
        yield root
        return
    for child in sorted(root.iterdir()):
        if child.is_dir() and not child.name.startswith("."):
            yield from runs_in(child)


def described(folder: Path) -> dict[str, Any]:
    """One run as a document; values missing in its run.json are null."""
    path = folder / "run.json"
    changed = datetime.fromtimestamp(path.stat().st_mtime)
    known: dict[str, Any] = {"run": str(folder), "changed": changed.isoformat(" ", "minutes")}
    try:
        facts = json.loads(path.read_bytes())
        metrics = read_metrics(folder)
    except ValueError:
        return {**known, "state": "unreadable", "command": None, "recipe": "", "steps": None,
                "before": None, "after": None}  # fmt: skip
    scores = facts.get("eval") or {}
    held_out = [line["eval_loss"] for line in metrics if "eval_loss" in line]
    after = (scores.get("after") or {}).get("loss", held_out[-1] if held_out else None)
    return {
        **known,
        "state": state_of(folder, facts),
        "command": facts.get("command") if isinstance(facts.get("command"), str) else None,
        "recipe": recipe_line(facts.get("recipe") or {}) or methods_of(facts),
        "steps": max((line["step"] for line in metrics if "step" in line), default=None),
        "before": (scores.get("before") or {}).get("loss"),
        "after": after,
        "accuracy": (scores.get("after") or {}).get("accuracy"),
        "error": facts.get("error"),
    }


def state_of(folder: Path, facts: Mapping[str, Any]) -> str:
    """running, done, interrupted, diverged, out of room, failed, or killed."""
    if is_open(folder):
        return "running"
    code = facts.get("exit")
    return "killed" if code is None else ENDS.get(code, f"failed ({code})")


def recipe_line(recipe: Mapping[str, Any]) -> str:
    """`lora 16`, `dense + galore 128`: each non-default method with its rank."""
    words = []
    for axis in ("weights", "compress", "update", "attention"):
        chosen = recipe.get(axis) or {}
        name = chosen.get("name")
        if name and not (axis == "update" and name == registry.DEFAULTS[axis]):
            rank = chosen.get("rank")
            words.append(f"{name} {rank}" if isinstance(rank, int) else name)
    words += [each["name"] for each in recipe.get("objective") or []]
    return " + ".join(words)


def methods_of(facts: Mapping[str, Any]) -> str:
    """What a bench compares, as it was typed; empty for other runs."""
    return str((facts.get("options") or {}).get("methods", ""))


def table(found: list[dict[str, Any]]) -> str:
    """Aligned lines under a head."""
    rows = [("run", "command", "recipe", "steps", "held out", "state", "changed")]
    rows += [
        (
            each["run"],
            each["command"] or "",
            each["recipe"],
            "" if each["steps"] is None else str(each["steps"]),
            score(each),
            each["state"],
            each["changed"],
        )
        for each in found
    ]
    return aligned(rows)


def score(each: Mapping[str, Any]) -> str:
    """`5.578 -> 5.343`, with the accuracy for classifiers."""
    before, after = each["before"], each["after"]
    text = " -> ".join(f"{value:.3f}" for value in (before, after) if value is not None)
    accuracy = each.get("accuracy")
    return text if accuracy is None else f"{text}, {100 * accuracy:.0f} % right"
