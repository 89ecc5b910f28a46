"""Encoded data: its rows, facts about it, and the cache."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from eckart.errors import EckartError
from eckart.io.folder import close_with_manifest, write_folder, write_json
from eckart.io.packing import Collate
from eckart.io.sources import DataSource

CACHE_VERSION = 4  # to increase when the encoding or the cache format changes
Rows = Any  # a Dataset, or rows corrupted on the fly (noise.Noised)


@dataclass(frozen=True)
class Facts:
    """Facts about the data besides its rows; plain values, stored in the cache."""

    format: str
    """Formats found, joined by `, ` where sources differ."""
    summary: str
    """One line per source: what was recognised, what is learnt, what is held out."""
    example: str
    """The first example as the model sees it; the loss is taken between « and »."""
    hashes: dict[str, str] = field(default_factory=dict)
    """Hashes of the contents by source."""
    bytes_per_token: dict[str, float] = field(default_factory=dict)
    """Bytes of held-out text that one learnt token stands for, by source."""
    tokens: int = 0
    """Tokens of the training rows, padding left out; 0 where they are no text."""
    seq_len: int = 0
    packed: bool = False
    pad: int = 0
    chat_template: str | None = None
    """The plain template that was used because the tokenizer has none: save it with it."""
    labels: tuple[str, ...] = ()
    """Names of the classes or tags, where the task has any."""
    task: str = "causal"
    """What a model learns from the rows (io/tasks.py)."""
    holed: bool = False
    """Are the rows text alone, in which holes are made as they are read (io/noise.py)?"""


@dataclass(frozen=True)
class Data(Facts):
    """Encoded data: `train`, and held-out rows by source."""

    train: Rows = field(kw_only=True)
    evaluation: dict[str, Rows] = field(kw_only=True)

    @property
    def sha256(self) -> str:
        """Hash of all sources, for run.json."""
        return hashlib.sha256(json.dumps(sorted(self.hashes.items())).encode()).hexdigest()

    @property
    def tokens_in_a_row(self) -> float:
        """The average without padding; 0 if rows are not text."""
        return self.tokens / max(1, len(self.train))

    @property
    def collate(self) -> Collate:
        """The function that collates rows of these data sets to a batch."""
        return Collate(self.pad)

    def lengths(self, rows: Rows) -> list[int]:
        """The length of each row: of its input, plus labels if they are not one per input token."""
        return [len(row["input_ids"]) + np.size(row["labels"]) for row in rows]

    def unit(self, count: int) -> str:
        """A number of rows as text, for messages."""
        most = "" if self.packed else "at most "
        return f"{count:,} row{'' if count == 1 else 's'} of {most}{self.seq_len} tokens"

    def keeping(self, reader: Any) -> Any:
        """The reader to save with the model: a tokenizer with the chat template that was used."""
        if self.chat_template:
            reader.chat_template = self.chat_template
        return reader

    def bits_per_byte(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Mean losses in nats per token, by source, as bits per byte of text.

        Comparable between tokenizers, which perplexities are not.
        """
        return {
            name: loss / math.log(2) / self.bytes_per_token[name]
            for name, loss in losses.items()
            if self.bytes_per_token.get(name)
        }


# --- the cache -----------------------------------------------------------------------------


def cache_folder() -> Path:
    """The cache of encoded data and built models: $ECKART_CACHE, or the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ECKART_CACHE") or Path(home) / "eckart")


def cache_key(
    given: Sequence[DataSource],
    others: Sequence[DataSource],
    hashes: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
    settings: Sequence[Any],
) -> str:
    """A hash of everything that the encoded rows depend on."""
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
    """Store encoded data in the cache; if the cache cannot be written, do nothing."""
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
    """Write a data set's columns as an Arrow stream, which is memory-mapped when read."""
    table = data.data.table
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)


def load(folder: Path) -> Data:
    """Encoded data from the cache, memory-mapped."""
    facts = json.loads((folder / "facts.json").read_bytes())
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
