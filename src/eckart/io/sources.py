"""Resolves what a user names as data: entries with weights, and their files or data sets."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from eckart.errors import FileError, UsageError, did_you_mean
from eckart.io.corpora import CORPORA, Corpus
from eckart.io.folder import sha256_of
from eckart.io.models import looks_like_hub_id, missing

TEXTS = (".txt", ".md", ".text")
TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".conll", ".parquet", ".arrow")
KNOWN = ", ".join(TEXTS[:2] + TABLES)
PACKED = (".gz", ".zst")
MADE = ("config.json", "adapter_config.json", "eckart.json", "run.json")  # by a training
KEYS = ("path", "weight", "name", "encoding")  # of an entry


@dataclass(frozen=True)
class DataSource:
    """One entry of the data list. A weight of 2 shows each example twice per epoch."""

    path: str | Corpus
    name: str
    weight: float = 1.0
    encoding: str = "utf-8"

    def described(self, *facts: str) -> str:
        """The source's line of a summary; empty facts are left out."""
        weight = f"weight {self.weight:g}" if self.weight != 1 else ""
        return f"{self.name}: " + "; ".join(fact for fact in (*facts, weight) if fact)


def sources_of(given: Any) -> list[DataSource]:
    """A path, a corpus, a {path, weight, name, encoding} entry, or a list of these, as a list.

    A mapping without the key `path` is read as {path: weight}. Names are the files' stems,
    numbered where two are alike.
    """
    entries: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
    if len(entries) == 1 and isinstance(entries[0], Mapping) and "path" not in entries[0]:
        entries = [{"path": path, "weight": weight} for path, weight in entries[0].items()]
    sources: list[DataSource] = []
    for entry in map(checked, entries):
        path = entry["path"]
        if not isinstance(path, Corpus):
            path = str(path)
            path = CORPORA[path]() if path in CORPORA and not Path(path).exists() else path
        name = entry.get("name") or (path.name if isinstance(path, Corpus) else stem(path))
        taken = {source.name for source in sources}
        numbered = [name, *(f"{name}-{i}" for i in range(2, len(entries) + 2))]
        name = next(n for n in numbered if n not in taken)
        weight, encoding = float(entry.get("weight", 1.0)), entry.get("encoding") or "utf-8"
        sources.append(DataSource(path, name, weight, encoding))
    return sources


def checked(entry: Any) -> Mapping[str, Any]:
    """An entry as a mapping. Raises UsageError for an unknown key or an invalid value."""
    if isinstance(entry, str | Path | Corpus):
        return {"path": entry}
    if not isinstance(entry, Mapping) or "path" not in entry:
        fix = "Type {path: FILE, weight: 2}."
        raise UsageError("a data entry has no path", [(repr(entry), "")], fix)
    for key in entry:
        if key not in KEYS:
            fix = did_you_mean(str(key), KEYS)
            raise UsageError(f"unknown key {key} in a data entry", [(repr(entry), "")], fix)
    weight = entry.get("weight", 1.0)
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not 0 < weight < math.inf:
        facts = [(str(entry["path"]), repr(weight))]
        raise UsageError("a data weight is not a positive number", facts)
    for key in ("name", "encoding"):
        if not isinstance(entry.get(key) or "", str):
            raise UsageError(f"a data entry's {key} is not text", [(key, repr(entry[key]))])
    return entry


def held_out_share(eval: Any) -> tuple[float, list[DataSource]]:
    """`data.eval` as the share to hold out, or as sources of its own."""
    if eval is None:
        return 0.0, []
    if not isinstance(eval, int | float):
        return 0.0, sources_of(eval)
    if not 0 <= eval <= 0.5:
        fact = (f"data.eval = {eval}", "a share from 0 to 0.5, or a file")
        raise UsageError("data.eval is out of range", [fact])
    return float(eval), []


def stem(path: str) -> str:
    """A short name for a source: the file's name without its suffixes, or a glob's folder."""
    if has_magic(path):
        parts = Path(path).parts
        fixed = [*parts[: next(i for i, part in enumerate(parts) if has_magic(part))], path]
        return fixed[-2] if len(fixed) > 1 else path
    return Path(path).name.split(".")[0] or Path(path).name or path


# --- files ---------------------------------------------------------------------------------


def ending(path: Path) -> str:
    """The suffix that decides how a file is read, without .gz or .zst."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def files_of(source: DataSource) -> list[Path]:
    """The files of a path, a folder (all supported ones below it, sorted) or a glob."""
    text = str(source.path)
    path = Path(text).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        if made := next((name for name in MADE if (path / name).is_file()), None):
            raise FileError(
                "this folder holds a model, no data",
                [(text, f"has {made}")],
                "MODEL comes first, then DATA: a file, a folder of files or a glob.",
            )
        files = [p for p in files_below(path) if ending(p) in TEXTS + TABLES]
        if not files:
            facts, fix = [(text, f"none of {KNOWN}")], "Type the folder that has one of them."
            raise FileError("no data in this folder", facts, fix)
        return files
    if has_magic(text):
        if files := matches(text):
            return files
        raise FileError("no file matches", [(text, "")], "Type a path, or another glob.")
    raise missing(path)


def files_below(root: Path) -> list[Path]:
    """All files below a folder that are not hidden, sorted."""
    inside = sorted(p for p in root.rglob("*") if p.is_file())
    return [p for p in inside if not any(s[0] == "." for s in p.relative_to(root).parts)]


def matches(pattern: str) -> list[Path]:
    """The files that match a glob, sorted."""
    found = sorted(glob(str(Path(pattern).expanduser()), recursive=True))
    return [path for path in map(Path, found) if path.is_file()]


def content_hash(source: DataSource) -> str:
    """SHA-256 over a source's file names and bytes, or a hub data set's own fingerprint."""
    if isinstance(source.path, Corpus):
        return source.path.sha256
    if is_hub(source.path):
        return hub_dataset(source.path)._fingerprint
    digest = hashlib.sha256()
    for file in files_of(source):
        digest.update(f"{file.name}\0{sha256_of(file)}\n".encode())
    return digest.hexdigest()


# --- data sets of `datasets` ---------------------------------------------------------------


def is_hub(name: str) -> bool:
    """Is it a name that is not an existing path and could be a data set on the hub?"""
    suffixed = Path(name).suffix in TEXTS + TABLES + PACKED
    return not suffixed and not Path(name).expanduser().exists() and looks_like_hub_id(name)


def hub_dataset(name: str) -> Any:
    """The train split of a hub data set. Raises FileError if it is not available."""
    import datasets

    repository, _, revision = name.partition("@")
    try:
        return datasets.load_dataset(repository, revision=revision or None, split="train")
    except Exception as fault:  # datasets raises a dozen types for one thing
        reason = str(fault).strip().splitlines()[0][:200]
        raise FileError(
            "this is no path here, and no data set of the hub that can be loaded",
            [(name, reason)],
            "Type a path such as ./data.jsonl.",
        ) from fault


def dataset_in(name: str) -> Any:
    """A folder written by `Dataset.save_to_disk`, or a hub data set; None for others."""
    folder = Path(name).expanduser()
    if (folder / "state.json").is_file():
        import datasets

        return datasets.load_from_disk(str(folder))
    return hub_dataset(name) if is_hub(name) else None
