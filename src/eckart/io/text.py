"""Text data: recognised, split, encoded, masked and packed.

Nothing here is random. The held-out rows depend on names and contents, encoding is cached under a
hash of everything it depends on, and shuffling (packing.order) is a function of seed, epoch and
row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import astuple, dataclass, replace
from itertools import islice
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from eckart.errors import FileError, UsageError
from eckart.io.corpora import is_held_out
from eckart.io.data import Data, cache_folder, cache_key, load, save
from eckart.io.encoding import Batch, Encoder, class_names, label
from eckart.io.folder import manifest_holds
from eckart.io.formats import (
    CLASSES,
    FORMATS,
    LEARNT,
    PAIRS,
    PLAIN,
    UNITS,
    examples,
    format_of,
    require_alike,
    shown,
    tagged,
)
from eckart.io.noise import HELD_OUT, Noise, Noised, noise_for
from eckart.io.packing import (
    Collate,
    Shuffled,
    classified,
    isolates_documents,
    order,
    pack,
    ragged,
    repeated,
    rows,
)
from eckart.io.reading import Row, rows_of
from eckart.io.sources import DataSource, content_hash, held_out_share, sources_of

__all__ = [
    "Collate",
    "Data",
    "Shuffled",
    "cache_folder",
    "first_rows",
    "isolates_documents",
    "order",
    "read",
]


def read(
    sources: Any,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    packing: bool = True,
    eval: Any = 0.02,
    format: str = "auto",
    cache: bool = True,
    task: str = "causal",
    seed: int = 0,
    labels: Sequence[str] = (),
) -> Data:
    """Read, split, encode and pack data for a task on text; labelled data decides its own task.

    `sources`: a path (file, folder, glob, hub id), the name of a corpus ("stdlib-code"), a {path,
    weight, name, encoding} entry, or a list of these. `eval`: the share to hold out (0 for none),
    or sources of its own; if `sources` is empty these are all there is. `packing` fills blocks of
    seq_len tokens with examples that do not attend to one another; `isolates_documents(model)`
    tells whether the model supports this.

    Documents longer than seq_len are split into pieces; conversations and completions are
    truncated, and left out if no trained token remains. Corruption of text (io/noise.py) depends on
    `seed`; that of held-out rows does not. `labels` are the classes in the order of the model's
    numbers; by default they are the data's. Raises FileError with file and line if a row is
    malformed or has nothing to train on, UsageError for a format that the task cannot be trained
    on.
    """
    if seq_len < 2:
        raise UsageError("data.seq_len is too small", [(f"data.seq_len = {seq_len}", "at least 2")])
    form = Form(seq_len, packing, format, task, tuple(labels))
    given, (share, others) = sources_of(sources), held_out_share(eval)
    hashes = {source.name: content_hash(source) for source in given + others}
    key = cache_key(given, others, hashes, tokenizer, [share, *astuple(form)])
    folder = cache_folder() / "data" / key
    if cache and manifest_holds(folder):
        data = load(folder)
    else:
        data = replace(encode(given, others, share, tokenizer, form), hashes=hashes)
        if cache:
            save(data, folder)
    return noised(data, tokenizer, seed)


def first_rows(
    sources: Any,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    format: str,
    task: str,
    count: int,
) -> Data:
    """At most `count` rows of each source as `read` returns them, unpacked."""
    form = Form(seq_len, packing=False, format=format, task=task)
    return noised(encode(sources_of(sources), [], 0.0, tokenizer, form, count), tokenizer, 0)


@dataclass(frozen=True)
class Form:
    """How rows are to be encoded, as requested; `encode` completes it from the data."""

    seq_len: int
    packing: bool
    format: str
    task: str
    labels: tuple[str, ...] = ()


def noised(data: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> Data:
    """Data whose rows are text alone, as corrupted rows; other data unchanged."""
    if not data.holed:
        return data
    noise = noise_for(tokenizer, data.task)
    held = {n: Noised(r, noise, 0, HELD_OUT) for n, r in data.evaluation.items()}
    return replace(data, train=Noised(data.train, noise, seed), evaluation=held)


def encode(
    given: Sequence[DataSource],
    others: Sequence[DataSource],
    share: float,
    tokenizer: PreTrainedTokenizerBase,
    form: Form,
    first: int | None = None,
) -> Data:
    """`read` without its cache and before corruption, for the `first` rows or all."""
    encoder = Encoder(tokenizer, form.seq_len)
    read_in = [(source, *recognised(source, form.format, first)) for source in [*given, *others]]
    kinds = {kind for _, kind, _ in read_in}
    form = settled(form, read_in)
    noise = noise_for(tokenizer, form.task) if holed(kinds, form.task) else None
    train, evaluation, bytes_per_token, lines, tokens = [], {}, {}, [], 0
    for i, (source, kind, found) in enumerate(read_in):
        teaches = i < len(given)  # others are named for evaluation
        kept, held = split(found, kind, share) if teaches else ([], found)
        (learnt, batch), (measured, apart) = (
            made(part, kind, encoder, form, noise) for part in (kept, held)
        )
        tokens += batch.tokens
        if len(learnt):
            train.append(repeated(learnt, source.weight, source.name))
        if len(measured):
            evaluation[source.name] = measured
            if form.task in ("causal", "seq2seq") and noise is None:
                bytes_per_token[source.name] = apart.bytes / max(apart.learnt, 1)
        if not teaches:
            note = "for evaluation" if given else ""
        elif len(measured):
            # a last part of each document is held out where no document is
            amount = len(held) / len(found) if len(kept) < len(found) else share
            note = f"{amount:.1%} held out"
        else:
            note = "nothing held out"
        left_out, cut_off = batch.left_out + apart.left_out, batch.cut_off + apart.cut_off
        lines.append(
            source.described(
                f"{counted(found, kind)} ({' + '.join(FORMATS[kind])})",
                noise.learnt if noise is not None else LEARNT[kind],
                note,
                f"{left_out:,} left out (nothing to learn)" if left_out else "",
                f"{cut_off:,} cut off" if cut_off else "",
            )
        )
    if not (train if given else evaluation):
        what = "nothing to train on" if given else "nothing to measure on"
        raise FileError(what, [(s.name, "no rows left") for s, _, _ in read_in])
    plain = kinds & {"messages", "instruction"} and not tokenizer.chat_template
    if plain:
        lines.append("the tokenizer has no chat template: a plain one is used (### User:)")
    _, kind, (row, *_) = read_in[0]
    return Data(
        format=", ".join(sorted(kinds)),
        summary="\n".join(lines),
        example=example_of(row, kind, encoder, noise is not None),
        bytes_per_token=bytes_per_token,
        tokens=tokens,
        seq_len=form.seq_len,
        packed=form.packing,
        pad=encoder.pad,
        chat_template=PLAIN if plain else None,
        labels=form.labels,
        task=form.task,
        holed=noise is not None,
        train=concatenate_datasets(train) if train else Dataset.from_dict({}),
        evaluation=evaluation,
    )


def settled(form: Form, read_in: Sequence[tuple[DataSource, str, Sequence[Row]]]) -> Form:
    """The form with the task, the classes and the packing that the data allows."""
    task = task_for({source.name: kind for source, kind, _ in read_in}, form.task)
    labels = form.labels
    if task in CLASSES.values() and not labels:
        _, kind, _ = read_in[0]
        labels = tuple(class_names((row for _, _, found in read_in for row in found), kind))
    return replace(form, task=task, labels=labels, packing=form.packing and task == "causal")


def made(
    found: Sequence[Row], kind: str, encoder: Encoder, form: Form, noise: Noise | None
) -> tuple[Dataset, Batch]:
    """Rows of one format as the task needs them, with statistics of the encoding."""
    if form.task == "classification":
        batch = encoder.labelled(found)
        return classified(batch.encoded, [form.labels.index(label(r)) for r in found]), batch
    if noise is not None:
        batch = encoder.pieces_of(found, kind, frame=form.task == "masked")
        return ragged(input_ids=[e.ids for e in batch.encoded]), batch
    if form.task in ("seq2seq", "tagging"):
        tags = form.task == "tagging"
        batch = encoder.tagged(found, form.labels) if tags else encoder.answered(found, kind)
        return ragged(input_ids=[e.ids for e in batch.encoded], labels=batch.targets), batch
    batch = encoder(found, kind)
    if form.packing:
        return pack(batch.encoded, form.seq_len, encoder.pad), batch
    return rows(batch.encoded), batch


def task_for(formats: Mapping[str, str], task: str) -> str:
    """The task on which data of these formats, {name: format}, trains a model made for `task`.

    Raises UsageError if formats have different tasks, or the model cannot use them.
    """
    kinds = set(formats.values())
    found = {CLASSES.get(kind, task) for kind in kinds}
    if len(found) > 1:
        texts = all("text" in FORMATS[kind] for kind in kinds)
        raise UsageError(
            "classes and text cannot be mixed",
            [(name, " + ".join(FORMATS[kind])) for name, kind in formats.items()],
            "Type data.format=text to learn the texts alone." if texts else "",
        )
    (task,) = found
    asked = sorted(kinds & set(PAIRS))
    if task == "masked" and asked:
        raise UsageError(
            "this model fills in words and does not answer",
            [(kind, LEARNT[kind]) for kind in asked],
            "Give it text, text + label or tokens + tags, or take a decoder (llama, gpt2, ...).",
        )
    if task == "seq2seq" and asked and set(kinds) - set(PAIRS):
        raise UsageError(
            "text and questions with answers cannot be mixed here", [(k, "") for k in sorted(kinds)]
        )
    return task


def holed(kinds: Set[str], task: str) -> bool:
    """Are the rows text alone, corrupted as they are read?"""
    return task in ("masked", "seq2seq") and not kinds & set(PAIRS)


def recognised(source: DataSource, format: str, first: int | None) -> tuple[str, list[Row]]:
    """A source's format and its rows."""
    found = list(islice(rows_of(source), first))
    if not found:
        raise FileError("no rows in the data", [(str(source.path), "")])
    kind = format_of(found[0], format)
    require_alike(found, kind)
    return kind, found


PART = 40  # letters: held-out last parts that are shorter on average measure nothing


def split(found: Sequence[Row], kind: str, share: float) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows, by the hash of their names or contents.

    If there are too few documents to hold out whole ones, the last part of each is held out
    instead, where it is long enough to be meaningful. Of two or more rows of another kind at least
    one is held out.
    """
    if not share:
        return list(found), []
    letters = sum(len(str(row.fields.get("text"))) for row in found)
    if kind == "text" and len(found) < 1 / share and letters * share >= PART * len(found):
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
    """A document without its last part, and that part; the cut is at the start of a line."""
    text = row.fields.get("text")
    if not isinstance(text, str):
        return row, replace(row, fields={"text": ""})  # what is wrong with it is said later
    at = round(len(text) * (1 - share))
    at = text.rfind("\n", 0, at) + 1 or at
    return (
        replace(row, fields={**row.fields, "text": text[:at]}),
        replace(row, fields={**row.fields, "text": text[at:]}),
    )


def counted(found: Sequence[Row], kind: str) -> str:
    """A number of rows as text."""
    unit = UNITS.get(kind, "examples")
    return f"{len(found):,} {unit[:-1] if len(found) == 1 else unit}"


def example_of(row: Row, kind: str, encoder: Encoder, holed: bool = False) -> str:
    """The first example with its loss mask marked; unmarked if the mask changes."""
    if kind == "input_ids":
        return encoder.tokenizer.decode(row.fields["input_ids"])[:800]
    if holed:
        return str(row.fields["text"])[:800]
    if kind == "tokens+tags":
        return " ".join(f"{token}«{tag}»" for token, tag in tagged(row))[:800]
    if kind == "text+label":
        return f"{row.fields['text'][:800]} «{label(row)}»"
    return shown(examples(row, kind, encoder.tokenizer)[0])
