"""Encoded examples to rows a model is trained on: packed, padded, shuffled; no state, no RNG.

A packed row is a block of fixed length filled with whole examples. No example attends to
another: `position_ids` begin at 0 with each, which transformers turns into a block-diagonal
mask, but only while no key-value cache is made (with the default cache Llama, Qwen, Gemma and
GPT-2 attend across examples and say nothing), so every packed batch carries use_cache=False.
The first token of an example has no label: nothing stands before it.
"""

from __future__ import annotations

import hashlib
import inspect
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from datasets.table import InMemoryTable
from torch import nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel

IGNORE = -100  # the label that every loss in transformers leaves out


@dataclass(frozen=True)
class Encoded:
    """One example: ids [t], and a mask [t] of those that count in the loss."""

    ids: np.ndarray  # int32
    trained: np.ndarray  # bool

    def labels(self) -> np.ndarray:
        """ids that count in the loss; IGNORE elsewhere and on the first token. [t] int32"""
        labels = np.where(self.trained, self.ids, IGNORE).astype(np.int32)
        labels[:1] = IGNORE
        return labels


def pieces(example: Encoded, seq_len: int) -> list[Encoded]:
    """Split a document into pieces of at most seq_len tokens."""
    return [
        Encoded(example.ids[at : at + seq_len], example.trained[at : at + seq_len])
        for at in range(0, len(example.ids), seq_len)
    ]


def fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Indices of examples grouped into blocks of at most `room` tokens: best fit, longest first.

    Each example is placed where it leaves the least room; O(n log room). Within a block and among
    blocks the original order is kept, so that neighbours stay close.
    """
    blocks: list[list[int]] = []
    open_at: dict[int, list[int]] = {}  # free tokens -> blocks that have as many
    free: list[int] = []  # the keys of open_at, sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(free, lengths[i])
        if at == len(free):
            block, left = len(blocks), room - lengths[i]
            blocks.append([])
        else:
            had = free[at]
            block = open_at[had].pop()
            if not open_at[had]:
                del open_at[had], free[at]
            left = had - lengths[i]
        blocks[block].append(i)
        if left:
            if left not in open_at:
                open_at[left] = []
                insort(free, left)
            open_at[left].append(block)
    return sorted(sorted(block) for block in blocks)


def pack(examples: Sequence[Encoded], seq_len: int, pad: int) -> Dataset:
    """Blocks of exactly seq_len tokens: input_ids, labels, position_ids.

    The rest of a block is filled with an example of padding that nothing attends to.
    """
    blocks = fit([len(e.ids) for e in examples], seq_len)
    shape = (len(blocks), seq_len)
    ids = np.full(shape, pad, np.int32)
    labels = np.full(shape, IGNORE, np.int32)
    positions = np.zeros(shape, np.int32)
    for b, block in enumerate(blocks):
        at = 0
        for i in block:
            stop = at + len(examples[i].ids)
            ids[b, at:stop] = examples[i].ids
            labels[b, at:stop] = examples[i].labels()
            positions[b, at:stop] = np.arange(stop - at)
            at = stop
        positions[b, at:] = np.arange(seq_len - at)
    offsets = np.arange(len(blocks) + 1) * seq_len
    columns = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return dataset({name: lists(c.reshape(-1), offsets) for name, c in columns.items()})


def rows(examples: Sequence[Encoded]) -> Dataset:
    """One row per example, as long as it is: input_ids, labels."""
    return ragged(input_ids=[e.ids for e in examples], labels=[e.labels() for e in examples])


def ragged(**columns: Sequence[np.ndarray]) -> Dataset:
    """A data set of columns whose entries [t] have different lengths."""
    made = {}
    for name, entries in columns.items():
        offsets = np.cumsum([0, *(len(e) for e in entries)])
        made[name] = lists(np.concatenate([np.zeros(0, np.int32), *entries]), offsets)
    return dataset(made)


def classified(examples: Sequence[Encoded], classes: Sequence[int]) -> Dataset:
    """One row per example: input_ids, and its class as `labels`."""
    ids = ragged(input_ids=[e.ids for e in examples]).data.table["input_ids"]
    return dataset({"input_ids": ids, "labels": pa.array(classes, pa.int64())})


def lists(values: np.ndarray, offsets: np.ndarray) -> Any:
    """An Arrow column of int32 lists, from their concatenated values."""
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values))


def dataset(columns: Mapping[str, Any]) -> Dataset:
    return Dataset(InMemoryTable(pa.table(dict(columns))))


def repeated(data: Dataset, weight: float, key: str) -> Dataset:
    """A data set whose rows appear `weight` times: whole copies, and a fixed fraction once more.

    Which rows are in the fraction depends on `key` alone.
    """
    whole, share = divmod(weight, 1)
    chosen = order(len(data), int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big"), 0)
    extra = np.sort(chosen[: round(share * len(data))])
    if whole == 1 and not len(extra):
        return data
    indices = np.concatenate([*[np.arange(len(data))] * int(whole), extra])
    return dataset({n: data.data.table[n].take(pa.array(indices)) for n in data.column_names})


@dataclass(frozen=True)
class Collate:
    """Collates rows to a batch. Packed rows are stacked; others padded on the right to the longest.

    `pad` fills input_ids where there is no token.
    """

    pad: int = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        ids = [torch.as_tensor(np.asarray(r["input_ids"], np.int64)) for r in rows]  # [t] each
        if "position_ids" in rows[0]:
            names = ("labels", "position_ids")
            rest = {n: torch.as_tensor(np.asarray([r[n] for r in rows], np.int64)) for n in names}
            return {"input_ids": torch.stack(ids), **rest, "use_cache": False}
        ones = [torch.ones_like(i) for i in ids]
        batch = {"input_ids": padded(ids, self.pad), "attention_mask": padded(ones, 0)}
        if "labels" in rows[0]:
            if np.ndim(rows[0]["labels"]) == 0:
                batch["labels"] = torch.tensor([r["labels"] for r in rows])  # [b] classes
            else:
                labels = [torch.as_tensor(np.asarray(r["labels"], np.int64)) for r in rows]
                batch["labels"] = padded(labels, IGNORE)
        return batch


def padded(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
    """Rows [t] of different lengths as one tensor [b, max t], filled on the right."""
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of n rows that depends on (n, seed, epoch) alone. [n] int64"""
    return np.argsort(drawn(n, seed, epoch), kind="stable")


def drawn(count: int, *key: int) -> np.ndarray:
    """`count` random uint64 numbers, a function of the key. [count]

    Philox's raw numbers are the same in every version of numpy; its permutations need not be.
    """
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)


class Shuffled(Sampler[int]):
    """Every row once, in `order(n, seed, epoch)`; the loop calls `set_epoch`.

    `tell` is called with each epoch too, for rows that change with it.
    """

    def __init__(self, n: int, seed: int, tell: Callable[[int], None] | None = None):
        self.n = n
        self.seed = seed
        self.tell = tell
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if self.tell is not None:
            self.tell(epoch)

    def __iter__(self) -> Iterator[int]:
        return iter(order(self.n, self.seed, self.epoch).tolist())

    def __len__(self) -> int:
        return self.n


@torch.no_grad()
def isolates_documents(model: PreTrainedModel) -> bool:
    """Does this model keep packed examples apart? Tested with two short forward passes.

    Two sequences differ in their first example only. Packed, the second example's logits must not
    depend on the difference; as one text they do, which gives the scale. A model that takes no
    position_ids (or ignores them, as OPT does) fails, and must be trained unpacked.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    embedding: torch.Tensor = model.get_input_embeddings().weight  # [v, d]
    vocab, device = embedding.shape[0], embedding.device
    ids = torch.arange(1, 13, device=device).repeat(2, 1) * 7 % vocab  # [2, 12]
    ids[1, :6] = (ids[1, :6] + 1 + vocab // 2) % vocab
    one = torch.arange(12, device=device).expand(2, -1)  # [2, 12]: one text
    two = one % 6  # two examples of 6 tokens
    was_training = model.training
    model.eval()
    try:
        leak, seen = (
            float((out[0, 6:].float() - out[1, 6:].float()).abs().max())
            for out in (
                model(input_ids=ids, position_ids=p, use_cache=False).logits for p in (two, one)
            )
        )
    finally:
        model.train(was_training)
    return leak <= 1e-2 * seen  # kernels may round the two batch rows differently, by 1e-6 or so
