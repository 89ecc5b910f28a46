"""Data files to rows, each row knowing the file and line it came from.

Read: .txt and .md (a file is a document), .jsonl, .json, .csv, .tsv, .conll (a token and its
tag a line, blank lines between sentences), .parquet, .arrow, all of them also as .gz or .zst;
globs, folders, folders written by `Dataset.save_to_disk`, and hub ids. Whatever is malformed
is a FileError that names file and line.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from eckart.errors import FileError, UsageError, did_you_mean
from eckart.io.corpora import CORPORA, Corpus
from eckart.io.folder import sha256_of
from eckart.io.models import looks_like_hub_id, missing

TEXTS = (".txt", ".md", ".text")
TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".conll", ".parquet", ".arrow")
MADE = ("config.json", "adapter_config.json", "eckart.json", "run.json")  # by a training
PACKED = (".gz", ".zst")


@dataclass(frozen=True)
class Row:
    """One example as it was written. `key` decides on which side of the split it falls."""

    fields: Mapping[str, Any]
    where: str  # "notes.jsonl, line 7"
    key: str


@dataclass(frozen=True)
class DataSource:
    """One entry of the data list. A weight of 2 shows each example twice per epoch."""

    path: str | Corpus
    name: str
    weight: float = 1.0
    encoding: str = "utf-8"


def sources_of(given: Any) -> list[DataSource]:
    """A path, a corpus, a {path, weight, name, encoding} entry, or a list of these, as a list.

    A mapping without the key `path` is read as {path: weight}. Names are the files' stems,
    numbered where two are alike.
    """
    entries: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
    if len(entries) == 1 and isinstance(entries[0], Mapping) and "path" not in entries[0]:
        entries = [{"path": path, "weight": weight} for path, weight in entries[0].items()]
    known = ("path", "weight", "name", "encoding")
    sources: list[DataSource] = []
    for entry in entries:
        if isinstance(entry, str | Path | Corpus):
            entry = {"path": entry}
        if not isinstance(entry, Mapping) or "path" not in entry:
            raise UsageError(
                "a data entry has no path", [(repr(entry), "")], "Type {path: FILE, weight: 2}."
            )
        for key in entry:
            if key not in known:
                fix = did_you_mean(str(key), known)
                raise UsageError(f"unknown key {key} in a data entry", [(repr(entry), "")], fix)
        path = entry["path"]
        weight = entry.get("weight", 1.0)
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 < weight < math.inf:
            raise UsageError("a data weight is not a positive number", [(str(path), repr(weight))])
        for key in ("name", "encoding"):
            if not isinstance(entry.get(key) or "", str):
                raise UsageError(f"a data entry's {key} is not text", [(key, repr(entry[key]))])
        if not isinstance(path, Corpus):
            path = str(path)
            path = CORPORA[path]() if path in CORPORA and not Path(path).exists() else path
        name = entry.get("name") or (path.name if isinstance(path, Corpus) else stem(path))
        taken = {source.name for source in sources}
        numbered = [name, *(f"{name}-{i}" for i in range(2, len(entries) + 2))]
        name = next(n for n in numbered if n not in taken)
        sources.append(DataSource(path, name, float(weight), entry.get("encoding", "utf-8")))
    return sources


def in_order(names: Iterable[str]) -> list[str]:
    """Names of classes in the order of their numbers: numbers by size, names by alphabet."""
    return sorted(names, key=lambda n: (0, int(n), "") if n.lstrip("-").isdigit() else (1, 0, n))


def stem(path: str) -> str:
    """A short name for a source: the file's name without its endings, or a glob's folder."""
    if has_magic(path):
        parts = Path(path).parts
        fixed = [*parts[: next(i for i, part in enumerate(parts) if has_magic(part))], path]
        return fixed[-2] if len(fixed) > 1 else path
    return Path(path).name.split(".")[0] or Path(path).name or path


def ending(path: Path) -> str:
    """What decides how a file is read: its ending below .gz or .zst."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def files_of(source: DataSource) -> list[Path]:
    """The files of a path, a folder (all below it that can be read, sorted) or a glob."""
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
        inside = sorted(p for p in path.rglob("*") if p.is_file())
        visible = [p for p in inside if not any(s[0] == "." for s in p.relative_to(path).parts)]
        files = [p for p in visible if ending(p) in TEXTS + TABLES]
        if not files:
            kinds = ", ".join(TEXTS[:2] + TABLES)
            raise FileError(
                "no data in this folder",
                [(text, f"none of {kinds}")],
                "Type the folder that has one of them.",
            )
        return files
    if has_magic(text):
        files = [Path(p) for p in sorted(glob(str(path), recursive=True)) if Path(p).is_file()]
        if not files:
            raise FileError("no file matches", [(text, "")], "Type a path, or another glob.")
        return files
    raise missing(path)


def content_hash(source: DataSource) -> str:
    """SHA-256 over a source's file names and bytes; over a hub data set's own fingerprint."""
    if isinstance(source.path, Corpus):
        return source.path.sha256
    if is_hub(source):
        return hub_dataset(source.path)._fingerprint
    digest = hashlib.sha256()
    for file in files_of(source):
        digest.update(f"{file.name}\0{sha256_of(file)}\n".encode())
    return digest.hexdigest()


def rows_of(source: DataSource) -> Iterator[Row]:
    """All rows of a source, in the order of its files. Raises FileError, by file and line."""
    if isinstance(source.path, Corpus):
        for name, text in source.path.documents:
            yield Row({"text": text}, name, name)
    elif is_hub(source):
        for i, fields in enumerate(hub_dataset(source.path)):
            yield keyed(fields, f"{source.path}, row {i + 1}")
    elif (Path(source.path) / "state.json").is_file():
        import datasets

        for i, fields in enumerate(datasets.load_from_disk(str(source.path))):
            yield keyed(fields, f"{source.path}, row {i + 1}")
    else:
        files = files_of(source)
        root = Path(source.path) if Path(source.path).is_dir() else Path(files[0]).parent
        for file in files:
            name = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name
            try:
                yield from rows_in(file, name, source.encoding)
            except OtherEncoding as fault:
                fix = naming_encoding(source, files)
                raise FileError(fault.what, fault.facts, fix) from fault


class OtherEncoding(FileError):
    """A file that is not in the encoding that it is read by."""


def naming_encoding(source: DataSource, files: list[Path]) -> str:
    """What to type for a source in another encoding, as the source was typed."""
    entry = f"'data=[{{path: {source.path}, encoding: latin-1}}]'"
    if len(files) == 1:
        return f"Name the encoding: {entry}"
    return f"Name the encoding of all its {len(files)} files: {entry}, or save this one as UTF-8."


def is_hub(source: DataSource) -> bool:
    """A name that is no path here and could be a data set on the hub."""
    text = str(source.path)
    suffixed = Path(text).suffix in TEXTS + TABLES + PACKED
    return not suffixed and not Path(text).expanduser().exists() and looks_like_hub_id(text)


def hub_dataset(name: Any) -> Any:
    """The train split of a hub data set. Raises FileError where it cannot be had."""
    import datasets

    repository, _, revision = str(name).partition("@")
    try:
        return datasets.load_dataset(repository, revision=revision or None, split="train")
    except Exception as fault:  # datasets raises a dozen types for one thing
        reason = str(fault).strip().splitlines()[0][:200]
        raise FileError(
            "this is no path here, and no data set of the hub that can be loaded",
            [(str(name), reason)],
            "Type a path such as ./data.jsonl.",
        ) from fault


def rows_in(file: Path, name: str, encoding: str = "utf-8") -> Iterator[Row]:
    """The rows of one file. `name` is the document's key where the file is one document."""
    kind = ending(file)
    if file.stat().st_size == 0:
        raise FileError("the file is empty", [(str(file), "0 bytes")])
    if kind in TEXTS:
        yield Row({"text": decoded(unpacked(file), file, encoding)}, str(file), name)
    elif kind in (".jsonl", ".ndjson"):
        yield from jsonl_rows(file, encoding)
    elif kind == ".json":
        yield from json_rows(file, encoding)
    elif kind in (".csv", ".tsv"):
        yield from csv_rows(file, encoding, "\t" if kind == ".tsv" else ",")
    elif kind == ".conll":
        yield from conll_rows(file, encoding)
    elif kind in (".parquet", ".arrow"):
        yield from arrow_rows(file, kind)
    else:
        kinds = ", ".join(TEXTS[:2] + TABLES)
        raise FileError("this kind of file is not read", [(str(file), kind or "no ending")], kinds)


def unpacked(file: Path) -> bytes:
    """A file's bytes, decompressed where it is .gz or .zst."""
    try:
        if file.suffix.lower() == ".gz":
            with gzip.open(file) as stream:
                return stream.read()
        if file.suffix.lower() == ".zst":
            with pa.input_stream(str(file), compression="zstd") as stream:
                return stream.read()
        return file.read_bytes()
    except (EOFError, OSError, pa.ArrowException) as fault:
        raise FileError("the file cannot be read", [(str(file), str(fault))]) from fault


def decoded(content: bytes, file: Path, encoding: str, line: int = 1) -> str:
    """Bytes as text. Raises FileError with the line of the first byte that does not fit."""
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as fault:
        line += content[: fault.start].count(b"\n")
        where = f"{file}, line {line}"
        found = f"byte 0x{content[fault.start]:02x}"
        raise OtherEncoding(f"this is not {encoding.upper()}", [(where, found)]) from fault
    except LookupError as fault:
        raise UsageError("no such encoding", [(encoding, str(file))]) from fault
    return text.removeprefix("\ufeff")


def keyed(fields: Any, where: str) -> Row:
    """A row whose side of the split hangs on its content: equal rows stay together."""
    if not isinstance(fields, dict):
        kind = type(fields).__name__
        raise FileError("a row is not an object", [(where, kind)], 'Each is {"text": ...}.')
    content = json.dumps(fields, sort_keys=True, default=str, ensure_ascii=False)
    try:
        content.encode()
    except UnicodeEncodeError as fault:
        half = f"half a surrogate pair, {content[fault.start]!r}"
        raise FileError("a row is not valid Unicode", [(where, half)]) from fault
    return Row(fields, where, content)


def jsonl_rows(file: Path, encoding: str) -> Iterator[Row]:
    found = False
    for number, content in enumerate(unpacked(file).split(b"\n"), 1):
        if not content.strip():
            continue
        found = True
        where = f"{file}, line {number}"
        try:
            fields = json.loads(decoded(content, file, encoding, number))
        except json.JSONDecodeError as fault:
            reason = f"column {fault.colno}: {fault.msg}"
            raise FileError("this line is not JSON", [(where, reason)]) from fault
        yield keyed(fields, where)
    if not found:
        raise FileError("the file is empty", [(str(file), "blank lines only")])


def json_rows(file: Path, encoding: str) -> Iterator[Row]:
    text = decoded(unpacked(file), file, encoding)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as fault:
        where = f"{file}, line {fault.lineno}"
        fix = f"If each line is its own object, name it {file.stem}.jsonl."
        raise FileError(
            "this file is not JSON", [(where, f"column {fault.colno}: {fault.msg}")], fix
        ) from fault
    rows = content["data"] if isinstance(content, dict) and "data" in content else content
    if rows == []:
        raise FileError("the file is empty", [(str(file), "a list without rows")])
    if not isinstance(rows, list):
        raise FileError("this JSON is not a list of rows", [(str(file), type(rows).__name__)])
    for i, fields in enumerate(rows, 1):
        yield keyed(fields, f"{file}, row {i}")


def csv_rows(file: Path, encoding: str, delimiter: str) -> Iterator[Row]:
    text = decoded(unpacked(file), file, encoding)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        count = 0
        for fields in reader:
            count += 1
            where = f"{file}, line {reader.line_num}"
            if None in fields or None in fields.values():
                width = len(reader.fieldnames or ())
                raise FileError(
                    "a line has another number of columns", [(where, f"not {width} as in line 1")]
                )
            yield keyed(fields, where)
    except csv.Error as fault:
        raise FileError("this is not CSV", [(f"{file}, line {reader.line_num}", str(fault))]) from (
            fault
        )
    if not count:
        raise FileError("the file is empty", [(str(file), "a header and no rows")])


def conll_rows(file: Path, encoding: str) -> Iterator[Row]:
    """Sentences of lines `token ... tag`: the first column and the last.

    Blank lines and -DOCSTART- end a sentence; lines that begin with `# ` are comments.
    """
    tokens: list[str] = []
    tags: list[str] = []
    start, found = 1, False
    text = decoded(unpacked(file), file, encoding)
    for number, line in enumerate([*text.splitlines(), ""], 1):
        columns = line.split()
        if not columns or columns[0] == "-DOCSTART-":
            if tokens:
                found = True
                yield keyed({"tokens": tokens, "tags": tags}, f"{file}, line {start}")
            tokens, tags = [], []
        elif line.startswith("# "):
            continue
        elif len(columns) == 1:
            raise FileError("a line has no tag", [(f"{file}, line {number}", line.strip())])
        else:
            start = start if tokens else number
            tokens.append(columns[0])
            tags.append(columns[-1])
    if not found:
        raise FileError("the file is empty", [(str(file), "no sentences")])


def arrow_rows(file: Path, kind: str) -> Iterator[Row]:
    number = 0
    try:
        for batch in parquet_batches(file) if kind == ".parquet" else ipc_batches(file):
            for fields in batch.to_pylist():
                number += 1
                yield keyed(fields, f"{file}, row {number}")
    except (pa.ArrowException, OSError) as fault:
        reason = str(fault).splitlines()[0]
        raise FileError(f"this is not {kind[1:]}", [(str(file), reason)]) from fault
    if not number:
        raise FileError("the file is empty", [(str(file), "no rows")])


def parquet_batches(file: Path) -> Iterable[Any]:
    return pyarrow.parquet.ParquetFile(file).iter_batches()


def ipc_batches(file: Path) -> Iterable[Any]:
    """Record batches of an Arrow file, in either of its two forms (file or stream)."""
    with pa.OSFile(str(file)) as source:
        is_file = source.read(6) == b"ARROW1"
    opened = pa.ipc.open_file if is_file else pa.ipc.open_stream
    with pa.memory_map(str(file)) as source:
        reader = partial(opened, source)()
        if is_file:
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            yield from reader
