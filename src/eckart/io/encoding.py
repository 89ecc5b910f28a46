"""Encodes parts of text to token ids with their loss mask."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from eckart.errors import FileError
from eckart.io.formats import Part, examples, pairs, tagged
from eckart.io.formats import field as text_field
from eckart.io.packing import IGNORE, Encoded, pieces
from eckart.io.reading import Row, in_order


@dataclass
class Batch:
    """Encoded rows, with statistics of the encoding."""

    encoded: list[Encoded] = field(default_factory=list)
    targets: list[np.ndarray] = field(default_factory=list)  # labels [t] that are not the ids
    tokens: int = 0
    learnt: int = 0  # tokens with a label
    bytes: int = 0  # of learnt text
    left_out: int = 0  # rows without a token to learn
    cut_off: int = 0  # examples longer than seq_len


class Encoder:
    """Encodes rows to token ids, with a mask of the tokens that count in the loss.

    The parts are encoded one by one, so that a prompt has the ids it has in generation. Tokenizers
    that change the beginning of a text (SentencePiece's space) get the whole text, and a token
    counts in the loss if it overlaps a trained part.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seq_len: int):
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        ends = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        self.pad = next((t for t in ends if t is not None), 0)
        bare, framed = self.ids(["a"])[0], tokenizer("a")["input_ids"]
        at = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), 0)
        self.before, self.after = framed[:at], framed[at + len(bare) :]
        self.by_parts = tokenizer.decode(bare + self.ids(["b"])[0]) == "ab"

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts without special tokens around them."""
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def __call__(self, found: Sequence[Row], kind: str) -> Batch:
        """Encode rows of one format."""
        batch = Batch()
        if kind == "input_ids":
            for row in found:
                self.add(batch, given_ids(row, len(self.tokenizer)), row, kind)
            return batch
        for at in range(0, len(found), 512):
            made = [
                (row, parts)
                for row in found[at : at + 512]
                for parts in examples(row, kind, self.tokenizer)
            ]
            encoded_parts = self.encode([parts for _, parts in made], kind)
            for (row, parts), encoded in zip(made, encoded_parts, strict=True):
                batch.bytes += sum(
                    len(t.encode("utf-8", "surrogatepass"))
                    for t, trained in parts
                    if trained and t != self.tokenizer.eos_token
                )
                self.add(batch, encoded, row, kind)
        return batch

    def labelled(self, found: Sequence[Row]) -> Batch:
        """Encode the texts of classified rows, truncated to seq_len."""
        batch = Batch()
        for ids in self.ids([str(row.fields["text"]) for row in found]):
            batch.tokens += self.take(batch, ids[: self.room])
        return batch

    def pieces_of(self, found: Sequence[Row], kind: str, frame: bool) -> Batch:
        """Encode documents in pieces of at most seq_len, with special tokens if `frame`.

        Pieces with fewer than two tokens that are not special are left out: nothing can be masked
        in them.
        """
        batch, special = Batch(), set(self.tokenizer.all_special_ids)
        if kind == "input_ids":
            given = [given_ids(row, len(self.tokenizer)).ids.tolist() for row in found]
        else:
            given = self.ids([text_field(row, "text") for row in found])
        room = self.room if frame else self.seq_len - 1  # an end may come behind
        for ids in given:
            cut = [ids[at : at + room] for at in range(0, len(ids), room)]
            whole = [piece for piece in cut if sum(i not in special for i in piece) > 1]
            batch.left_out += not whole
            for piece in whole:
                batch.tokens += self.take(batch, piece, frame)
        return batch

    def answered(self, found: Sequence[Row], kind: str) -> Batch:
        """Encode questions, with their answers as targets, each truncated to seq_len."""
        batch = Batch()
        made = [(row, pair) for row in found for pair in pairs(row, kind, self.tokenizer)]
        given = self.ids([g for _, (g, _) in made])
        answers = self.ids([a for _, (_, a) in made])
        for (row, (_, text)), ids, answer in zip(made, given, answers, strict=True):
            if not answer:
                raise FileError("nothing to learn from", [(row.where, "the answer has no token")])
            end = self.after or [i for i in (self.tokenizer.eos_token_id,) if i is not None]
            target = self.before + answer[: self.seq_len - len(self.before) - len(end)] + end
            batch.cut_off += len(ids) > self.room or len(target) < len(answer) + len(end)
            batch.tokens += self.take(batch, ids[: self.room]) + len(target)
            batch.targets.append(np.array(target, np.int32))
            batch.learnt += len(target)
            batch.bytes += len(text.encode("utf-8", "surrogatepass"))
        return batch

    def tagged(self, found: Sequence[Row], names: Sequence[str]) -> Batch:
        """Encode sentences word by word; a word's first piece has its tag's number as label."""
        batch, number = Batch(), {name: i for i, name in enumerate(names)}
        for row in found:
            words = tagged(row)
            ids, first = self.pieces_of_words([word for word, _ in words])
            labels = [IGNORE if i == IGNORE else number[words[i][1]] for i in first]
            batch.cut_off += len(ids) > self.room
            batch.tokens += self.take(batch, ids[: self.room])
            target = np.array(self.unlearnt_ends(labels[: self.room]), np.int32)
            batch.targets.append(target)
            batch.learnt += int((target != IGNORE).sum())
        return batch

    def pieces_of_words(self, words: Sequence[str]) -> tuple[list[int], list[int]]:
        """Ids of words, and for each id the number of the word that starts there, else IGNORE."""
        spaced = [("" if i == 0 else " ") + word for i, word in enumerate(words)]
        ids: list[int] = []
        first: list[int] = []
        for i, found in enumerate(self.ids(spaced)):
            ids += found
            first += [i, *[IGNORE] * len(found)][: len(found)]
        return ids, first

    def words(self, words: Sequence[str]) -> tuple[list[int], list[int]]:
        """`pieces_of_words` with the tokenizer's own first and last tokens."""
        ids, first = self.pieces_of_words(words)
        return self.before + ids + self.after, self.unlearnt_ends(first)

    def unlearnt_ends(self, labels: list[int]) -> list[int]:
        """Labels with IGNORE for the tokenizer's own first and last tokens."""
        return [IGNORE] * len(self.before) + labels + [IGNORE] * len(self.after)

    @property
    def room(self) -> int:
        """The number of tokens of a row besides the tokenizer's own first and last ones."""
        return max(1, self.seq_len - len(self.before) - len(self.after))

    def take(self, batch: Batch, ids: list[int], frame: bool = True) -> int:
        """Add an example whose tokens all count in the loss, framed or not; returns its length."""
        ids = self.before + ids + self.after if frame else ids
        batch.encoded.append(Encoded(np.array(ids, np.int32), np.ones(len(ids), bool)))
        return len(ids)

    def encode(self, made: Sequence[Sequence[Part]], kind: str) -> list[Encoded]:
        """Many examples at once."""
        if self.by_parts:
            flat = iter(self.ids([t for parts in made for t, _ in parts]))
            joined = [[(next(flat), trained) for _, trained in parts] for parts in made]
            pairs = [
                ([i for ids, _ in parts for i in ids], [b for ids, b in parts for _ in ids])
                for parts in joined
            ]
        else:
            pairs = [self.whole(parts) for parts in made]
        framed = kind != "messages" or not self.tokenizer.chat_template
        return [self.framed(ids, trained, framed) for ids, trained in pairs]

    def whole(self, parts: Sequence[Part]) -> tuple[list[int], list[bool]]:
        """Encode one example as a single text."""
        text = "".join(t for t, _ in parts)
        found = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        marks = np.zeros(len(text) + 1, bool)
        at = 0
        for t, trained in parts:
            marks[at : at + len(t)] = trained
            at += len(t)
        spans = found["offset_mapping"]  # of characters; empty for some special tokens
        return found["input_ids"], [bool(marks[a : max(b, a + 1)].any()) for a, b in spans]

    def framed(self, ids: list[int], trained: list[bool], frame: bool) -> Encoded:
        """Ids with the tokenizer's own first and last tokens, if these are missing."""
        if frame and ids[: len(self.before)] != self.before:
            ids, trained = self.before + ids, [False] * len(self.before) + trained
        if frame and self.after and ids[-len(self.after) :] != self.after:
            ids, trained = ids + self.after, trained + [True] * len(self.after)
        return Encoded(np.array(ids, np.int32), np.array(trained, bool))

    def add(self, batch: Batch, encoded: Encoded, row: Row, kind: str) -> None:
        """Truncate, count and add an example. Raises FileError if no token counts in the loss."""
        if kind != "text" and not encoded.trained[1:].any():
            raise FileError("nothing to learn from", [(row.where, "every label is masked")])
        cut = pieces(encoded, self.seq_len)
        if kind != "text":
            batch.cut_off += len(cut) > 1
            cut = cut[:1]
        cut = [piece for piece in cut if piece.trained[1:].any()]
        batch.left_out += not cut
        batch.encoded += cut
        batch.tokens += sum(len(piece.ids) for piece in cut)
        batch.learnt += sum(int(piece.trained.sum()) for piece in cut)


def given_ids(row: Row, vocab: int) -> Encoded:
    """A row of token ids. Raises FileError if ids or labels are invalid."""
    ids = row.fields.get("input_ids")
    if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < vocab for i in ids):
        raise FileError(
            "input_ids are not ids of this tokenizer", [(row.where, f"0 to {vocab - 1}")]
        )
    labels = row.fields.get("labels") or ids
    fitting = isinstance(labels, list) and len(labels) == len(ids)
    if not fitting or any(b not in (a, -100) for a, b in zip(ids, labels, strict=True)):
        raise FileError("labels do not fit input_ids", [(row.where, "each its id, or -100")])
    trained = np.array([b != -100 for b in labels], bool)
    return Encoded(np.array(ids, np.int32), trained)


def label(row: Row) -> str:
    """A row's class name."""
    if row.fields.get("label") is None:
        raise FileError("the row has no label", [(row.where, "")])
    found = row.fields["label"]
    if isinstance(found, float) and not found.is_integer():
        raise FileError(
            "a label is a class, and this is an amount",
            [(row.where, f"label {found}")],
            "Name the classes, or number them: amounts are not learnt.",
        )
    return str(found)


def class_names(found: Iterable[Row], kind: str = "text+label") -> list[str]:
    """All classes (or tags), numbers by value, names alphabetically."""
    if kind == "tokens+tags":
        names = {tag for row in found for _, tag in tagged(row)}
    else:
        names = {label(row) for row in found}
    return in_order(names)
