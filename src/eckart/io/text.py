"""What a user names as DATA: recognised, split, encoded, masked and packed.

Nothing here is random. What is held out depends on names and contents, encoding is cached
under the hash of all it depends on, and shuffling (packing.order) is a function of seed,
epoch and row.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from eckart.errors import EckartError, FileError, UsageError
from eckart.io.corpora import is_held_out
from eckart.io.encoding import Batch, Encoder, class_names, label
from eckart.io.folder import close_with_manifest, manifest_holds, write_folder, write_json
from eckart.io.formats import FORMATS, LEARNT, PLAIN, UNITS, format_of, shown
from eckart.io.packing import (
    Collate,
    Shuffled,
    classified,
    isolates_documents,
    order,
    pack,
    repeated,
    rows,
)
from eckart.io.reading import DataSource, Row, content_hash, rows_of, sources_of

__all__ = ["Collate", "Data", "Shuffled", "cache_folder", "isolates_documents", "order", "read"]

CACHE_VERSION = 1  # raised when the same files would be encoded differently


@dataclass(frozen=True)
class Facts:
    """What is known of the data beside the rows; plain values, kept in the cache."""

    format: str
    """Formats found, joined by `, ` where sources differ."""
    summary: str
    """One line per source: what was recognised, what is learnt, what is held out."""
    example: str
    """The first example as the model sees it; the loss is taken between « and »."""
    sha256: str
    """Hash of all sources, for run.json."""
    hashes: dict[str, str]
    """The same by source."""
    bytes_per_token: dict[str, float]
    """Bytes of held-out text that one learnt token stands for, by source."""
    tokens: int
    """Tokens of the training rows, padding left out."""
    seq_len: int
    packed: bool
    pad: int
    chat_template: str | None = None
    """The plain template that was used because the tokenizer has none: save it with it."""
    labels: tuple[str, ...] = ()
    """Names of the classes, where the format is text+label."""


@dataclass(frozen=True)
class Data(Facts):
    """Encoded data: `train`, and held-out rows by source."""

    train: Dataset = field(kw_only=True)
    evaluation: dict[str, Dataset] = field(kw_only=True)

    @property
    def collate(self) -> Collate:
        """Rows of these data sets to a batch."""
        return Collate(self.pad)

    def bits_per_byte(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Mean losses in nats per token, by source, as bits per byte of text.

        Comparable between tokenizers, which perplexities are not.
        """
        return {
            name: loss / math.log(2) / self.bytes_per_token[name]
            for name, loss in losses.items()
            if self.bytes_per_token.get(name)
        }


def read(
    sources: Any,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    packing: bool = True,
    eval: Any = 0.02,
    format: str = "auto",
    cache: bool = True,
) -> Data:
    """Read, split, encode and pack data.

    `sources`: a path (file, folder, glob, hub id), the name of a corpus ("stdlib-code"), a
    {path, weight, name, encoding} entry, or a list of these. `eval`: the share held out (0 for
    none), or sources of its own; where `sources` is empty these are all there is. `packing`
    fills blocks of seq_len tokens with examples that do not attend to one another; ask
    `isolates_documents(model)` whether the model can.

    Documents longer than seq_len are cut into pieces; conversations and completions are cut
    off, and left out where nothing learnt remains. Raises FileError with file and line where a
    row is malformed or would teach nothing.
    """
    if seq_len < 2:
        raise UsageError("data.seq_len is too small", [(f"data.seq_len = {seq_len}", "at least 2")])
    given = sources_of(sources)
    share, others = held_out_share(eval)
    hashes = {source.name: content_hash(source) for source in given + others}
    key = cache_key(given, others, hashes, tokenizer, (seq_len, packing, share, format))
    folder = cache_folder() / "data" / key
    if cache and manifest_holds(folder):
        return load(folder)
    data = encode(given, others, share, hashes, tokenizer, seq_len, packing, format)
    if cache:
        save(data, folder)
    return data


def held_out_share(eval: Any) -> tuple[float, list[DataSource]]:
    """`data.eval` as the share to hold out, or as sources of its own."""
    if eval is None or eval is False:
        return 0.0, []
    if isinstance(eval, int | float):
        if not 0 <= eval <= 0.5:
            fact = (f"data.eval = {eval}", "a share from 0 to 0.5, or a file")
            raise UsageError("data.eval is out of range", [fact])
        return float(eval), []
    return 0.0, sources_of(eval)


def encode(
    given: Sequence[DataSource],
    others: Sequence[DataSource],
    share: float,
    hashes: dict[str, str],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    packing: bool,
    format: str,
) -> Data:
    """`read` without its cache."""
    encoder = Encoder(tokenizer, seq_len)
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    read_in = [(source, *recognised(source, format)) for source in [*given, *others]]
    kinds = {kind for _, kind, _ in read_in}
    if len(kinds) > 1 and "text+label" in kinds:
        raise UsageError("classes and text cannot be mixed", [(k, "") for k in sorted(kinds)])
    labelled = "text+label" in kinds
    classes = class_names(row for _, _, found in read_in for row in found) if labelled else []
    packing = packing and not labelled

    def finished(found: Sequence[Row], kind: str) -> tuple[Dataset, Batch]:
        if kind == "text+label":
            batch = encoder.labelled(found)
            return classified(batch.encoded, [classes.index(label(r)) for r in found]), batch
        batch = encoder(found, kind)
        return (pack(batch.encoded, seq_len, pad) if packing else rows(batch.encoded)), batch

    train, evaluation, bytes_per_token, lines, tokens = [], {}, {}, [], 0
    for i, (source, kind, found) in enumerate(read_in):
        told = i >= len(given)  # a source named for evaluation
        kept, held = ([], found) if told else split(found, kind, share)
        note = "for evaluation" if told and given else ""
        left_out = cut_off = 0
        for part, learnt in ((kept, True), (held, False)):
            if not part:
                continue
            made, batch = finished(part, kind)
            left_out, cut_off = left_out + batch.left_out, cut_off + batch.cut_off
            if not len(made):
                continue
            if learnt:
                train.append(repeated(made, source.weight, source.name))
                tokens += batch.tokens
            else:
                evaluation[source.name] = made
                bytes_per_token[source.name] = batch.bytes / max(batch.learnt, 1)
        if not told:
            amount = len(held) / len(found) if len(kept) < len(found) else share
            note = f"{amount:.1%} held out" if source.name in evaluation else "nothing held out"
        lines.append(described(source, kind, found, note, left_out, cut_off))
    if not (train if given else evaluation):
        what = "nothing to train on" if given else "nothing to measure on"
        raise FileError(what, [(s.name, "no rows left") for s, _, _ in read_in])
    plain = kinds & {"messages", "instruction"} and not tokenizer.chat_template
    if plain:
        lines.append("the tokenizer has no chat template: a plain one is used (### User:)")
    first, kind = read_in[0][2][0], read_in[0][1]
    return Data(
        format=", ".join(sorted(kinds)),
        summary="\n".join(lines),
        example=example_of(first, kind, encoder),
        sha256=hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest(),
        hashes=hashes,
        bytes_per_token=bytes_per_token,
        tokens=tokens,
        seq_len=seq_len,
        packed=packing,
        pad=pad,
        chat_template=PLAIN if plain else None,
        labels=tuple(classes),
        train=concatenate_datasets(train) if train else Dataset.from_dict({}),
        evaluation=evaluation,
    )


def recognised(source: DataSource, format: str) -> tuple[str, list[Row]]:
    """A source's format and all its rows."""
    found = list(rows_of(source))
    if not found:
        raise FileError("no rows in the data", [(str(source.path), "")])
    return format_of(found[0], format), found


def split(found: Sequence[Row], kind: str, share: float) -> tuple[list[Row], list[Row]]:
    """Rows to learn from and rows held out, by the hash of their names or contents.

    Documents too few to hold whole ones out are cut instead: the last part of each. Of any
    other rows at least one is held out where there are two.
    """
    if not share:
        return list(found), []
    if kind == "text" and len(found) < 1 / share:
        parts = [tail_cut(row, share) for row in found]
        return [a for a, _ in parts], [b for _, b in parts if b.fields["text"].strip()]
    held = {i for i, row in enumerate(found) if is_held_out(row.key, share)}
    if not held and len(found) > 1:
        digests = [
            hashlib.sha256(row.key.encode("utf-8", "surrogatepass")).digest() for row in found
        ]
        held = {min(range(len(found)), key=digests.__getitem__)}
    if len(held) == len(found):
        held = set()
    return (
        [row for i, row in enumerate(found) if i not in held],
        [row for i, row in enumerate(found) if i in held],
    )


def tail_cut(row: Row, share: float) -> tuple[Row, Row]:
    """A document without its last part, and that part, cut at the start of a line."""
    text = row.fields.get("text")
    if not isinstance(text, str):
        return row, replace(row, fields={"text": ""})  # what is wrong with it is said later
    at = round(len(text) * (1 - share))
    at = text.rfind("\n", 0, at) + 1 or at
    return (
        replace(row, fields={**row.fields, "text": text[:at]}),
        replace(row, fields={**row.fields, "text": text[at:]}),
    )


def described(
    source: DataSource, kind: str, found: Sequence[Row], note: str, left_out: int, cut_off: int
) -> str:
    """A source's line of the summary."""
    unit = UNITS.get(kind, "examples")
    unit = unit[:-1] if len(found) == 1 else unit
    facts = [f"{len(found):,} {unit} ({' + '.join(FORMATS[kind])})", LEARNT[kind], note]
    facts += [f"{left_out:,} left out (nothing to learn)"] if left_out else []
    facts += [f"{cut_off:,} cut off"] if cut_off else []
    facts += [f"weight {source.weight:g}"] if source.weight != 1 else []
    return f"{source.name}: " + "; ".join(fact for fact in facts if fact)


def example_of(row: Row, kind: str, encoder: Encoder) -> str:
    """The first example, shown with its loss mask."""
    if kind == "input_ids":
        return encoder.tokenizer.decode(row.fields["input_ids"])[:800]
    if kind == "text+label":
        return f"{row.fields['text'][:800]} «{label(row)}»"
    return shown(encoder.parts(row, kind)[0])


# The cache


def cache_folder() -> Path:
    """Where encoded data and made models are kept: $ECKART_CACHE, or the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ECKART_CACHE") or Path(home) / "eckart")


def cache_key(
    given: Sequence[DataSource],
    others: Sequence[DataSource],
    hashes: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
    settings: Sequence[Any],
) -> str:
    """A hash of all that the encoded rows depend on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = [
        CACHE_VERSION,
        [[s.name, s.weight, s.encoding, hashes[s.name]] for s in given],
        [[s.name, s.encoding, hashes[s.name]] for s in others],
        backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
        str(tokenizer.chat_template),
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        list(settings),
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def save(data: Data, folder: Path) -> None:
    """Keep encoded data; a cache that cannot be written is done without."""
    names = list(data.evaluation)
    facts = {f: getattr(data, f) for f in Facts.__dataclass_fields__}
    try:
        with write_folder(folder, overwrite=True) as beside:
            write_table(data.train, beside / "train.arrow")
            for i, name in enumerate(names):
                write_table(data.evaluation[name], beside / f"evaluation-{i}.arrow")
            write_json(beside / "facts.json", {"evaluation": names, **facts})
            close_with_manifest(beside)
    except EckartError:
        return


def write_table(data: Dataset, path: Path) -> None:
    """Write a data set's columns as an Arrow stream, which is mapped into memory when read."""
    table = data.data.table
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)


def load(folder: Path) -> Data:
    """Encoded data from the cache, mapped into memory."""
    facts = json.loads((folder / "facts.json").read_text())
    names = facts.pop("evaluation")
    facts["labels"] = tuple(facts["labels"])
    return Data(
        **facts,
        train=Dataset.from_file(str(folder / "train.arrow")),
        evaluation={
            name: Dataset.from_file(str(folder / f"evaluation-{i}.arrow"))
            for i, name in enumerate(names)
        },
    )
