"""Data files to rows, each row knowing the file and line it came from.

Read: .txt and .md (a file is a document), .jsonl, .json, .csv, .tsv, .conll (a token and its
tag a line, blank lines between sentences), .parquet, .arrow, all of them also as .gz or .zst;
globs, folders, folders written by `Dataset.save_to_disk`, and hub ids. Whatever is malformed
is a FileError that names file and line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from eckart.errors import FileError, UsageError
from eckart.io.corpora import Corpus
from eckart.io.sources import KNOWN, TEXTS, DataSource, dataset_in, ending, files_of


@dataclass(frozen=True)
class Row:
    """One example as written in the file. `key` decides on which side of the split it falls."""

    fields: Mapping[str, Any]
    where: str  # "notes.jsonl, line 7"
    key: str


def in_order(names: Iterable[str]) -> list[str]:
    """Class names in the order of their numbers: numbers by value, names alphabetically."""
    return sorted(names, key=lambda n: (0, int(n), "") if n.lstrip("-").isdigit() else (1, 0, n))


def rows_of(source: DataSource) -> Iterator[Row]:
    """All rows of a source, in the order of its files. Raises FileError, by file and line."""
    if isinstance(source.path, Corpus):
        for name, text in source.path.documents:
            yield Row({"text": text}, name, name)
        return
    if (dataset := dataset_in(source.path)) is not None:
        for i, fields in enumerate(dataset, 1):
            yield keyed(fields, f"{source.path}, row {i}")
        return
    files = files_of(source)
    root = Path(source.path) if Path(source.path).is_dir() else files[0].parent
    for file in files:
        name = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name
        try:
            yield from rows_in(file, name, source.encoding)
        except OtherEncoding as fault:
            raise FileError(fault.what, fault.facts, naming_encoding(source, files)) from fault


class OtherEncoding(FileError):
    """A file that is not in the encoding it is read with."""


def naming_encoding(source: DataSource, files: list[Path]) -> str:
    """What to type for a source in another encoding, as the source was typed."""
    entry = f"'data=[{{path: {source.path}, encoding: latin-1}}]'"
    if len(files) == 1:
        return f"Name the encoding: {entry}"
    return f"Name the encoding of all its {len(files)} files: {entry}, or save this one as UTF-8."


def rows_in(file: Path, name: str, encoding: str = "utf-8") -> Iterator[Row]:
    """The rows of one file. `name` is the document's key if the file is one document."""
    kind, row, nothing = ending(file), None, "no rows"
    if file.stat().st_size == 0:
        raise FileError("the file is empty", [(str(file), "0 bytes")])
    if kind in (".parquet", ".arrow"):
        rows = arrow_rows(file, kind)
    elif kind in READERS:
        read, nothing = READERS[kind]
        rows = read(decoded(unpacked(file), file, encoding), file)
    elif kind in TEXTS:
        rows = iter([Row({"text": decoded(unpacked(file), file, encoding)}, str(file), name)])
    else:
        raise FileError("this kind of file is not read", [(str(file), kind or "no ending")], KNOWN)
    for row in rows:
        yield row
    if row is None:
        raise FileError("the file is empty", [(str(file), nothing)])


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


def decoded(content: bytes, file: Path, encoding: str) -> str:
    """Bytes as text. Raises FileError with the line of the first invalid byte."""
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as fault:
        line = 1 + content[: fault.start].count(b"\n")
        where = f"{file}, line {line}"
        found = f"byte 0x{content[fault.start]:02x}"
        raise OtherEncoding(f"this is not {encoding.upper()}", [(where, found)]) from fault
    except LookupError as fault:
        raise UsageError("no such encoding", [(encoding, str(file))]) from fault
    return text.removeprefix("\ufeff")


def keyed(fields: Any, where: str) -> Row:
    """A row whose side of the split depends on its content: equal rows stay together."""
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


def jsonl_rows(text: str, file: Path) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as fault:
            reason = f"column {fault.colno}: {fault.msg}"
            raise FileError("this line is not JSON", [(where, reason)]) from fault
        yield keyed(fields, where)


def json_rows(text: str, file: Path) -> Iterator[Row]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as fault:
        facts = [(f"{file}, line {fault.lineno}", f"column {fault.colno}: {fault.msg}")]
        fix = f"If each line is its own object, name it {file.stem}.jsonl."
        raise FileError("this file is not JSON", facts, fix) from fault
    rows = content["data"] if isinstance(content, dict) and "data" in content else content
    if not isinstance(rows, list):
        raise FileError("this JSON is not a list of rows", [(str(file), type(rows).__name__)])
    for i, fields in enumerate(rows, 1):
        yield keyed(fields, f"{file}, row {i}")


def csv_rows(text: str, file: Path, delimiter: str = ",") -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for fields in reader:
            where = f"{file}, line {reader.line_num}"
            if None in fields or None in fields.values():
                facts = [(where, f"not {len(reader.fieldnames or ())} as in line 1")]
                raise FileError("a line has another number of columns", facts)
            yield keyed(fields, where)
    except csv.Error as fault:
        where = f"{file}, line {reader.line_num}"
        raise FileError("this is not CSV", [(where, str(fault))]) from fault


def conll_rows(text: str, file: Path) -> Iterator[Row]:
    """Sentences of lines `token ... tag`: the first column and the last.

    Blank lines and -DOCSTART- end a sentence; lines that begin with `# ` are comments.
    """
    tokens: list[str] = []
    tags: list[str] = []
    start = 1
    for number, line in enumerate([*text.splitlines(), ""], 1):
        columns = line.split()
        if not columns or columns[0] == "-DOCSTART-":
            if tokens:
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


READERS: dict[str, tuple[Callable[[str, Path], Iterator[Row]], str]] = {
    # how the text of a file is read, and what one without rows has
    ".jsonl": (jsonl_rows, "blank lines only"),
    ".ndjson": (jsonl_rows, "blank lines only"),
    ".json": (json_rows, "a list without rows"),
    ".csv": (csv_rows, "a header and no rows"),
    ".tsv": (partial(csv_rows, delimiter="\t"), "a header and no rows"),
    ".conll": (conll_rows, "no sentences"),
}


def arrow_rows(file: Path, kind: str) -> Iterator[Row]:
    try:
        parquet = kind == ".parquet"
        batches = pyarrow.parquet.ParquetFile(file).iter_batches() if parquet else in_ipc(file)
        rows = (fields for batch in batches for fields in batch.to_pylist())
        for number, fields in enumerate(rows, 1):
            yield keyed(fields, f"{file}, row {number}")
    except (pa.ArrowException, OSError) as fault:
        reason = str(fault).splitlines()[0]
        raise FileError(f"this is not {kind[1:]}", [(str(file), reason)]) from fault


def in_ipc(file: Path) -> Iterator[Any]:
    """Record batches of an Arrow file, in either of its two forms (file or stream)."""
    with pa.memory_map(str(file)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            reader = pa.ipc.open_file(source)
            yield from map(reader.get_batch, range(reader.num_record_batches))
        else:
            yield from pa.ipc.open_stream(source)
