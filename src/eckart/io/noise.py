"""Corruption of text into training examples, for models that are not decoders.

    masked     15 % of the tokens are to be predicted: of these 80 % become the mask, 10 % another
               token and 10 % stay (Devlin et al. 2019, section 3.1)
    spans      15 % of the tokens are left out in spans of 3, a sentinel in each one's place;
               the target is the removed text (Raffel et al. 2020, section 3.1.4)
    continued  the text is cut in its middle half; the target is the second part

The corruption is a function of (seed, epoch, row) alone, so that a resumed run and all processes
see the same. Every row has a token to predict.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from eckart.errors import FileError
from eckart.io.packing import IGNORE, drawn

SHARE = 0.15  # of the tokens are learnt
MASKED, OTHER = 0.8, 0.1  # of these become the mask, and another token
SPAN = 3  # tokens left out at one place, on average
HELD_OUT = -1  # the epoch of evaluation rows: their corruption is fixed


@dataclass(frozen=True)
class Noise:
    """The corruption that turns the ids [t] of a text into input_ids and labels."""

    kind: str  # masked, spans or continued
    vocab: int
    fixed: tuple[int, ...] = ()  # special tokens: their places are known, so they are not predicted
    mask: int = 0
    sentinels: tuple[int, ...] = ()
    end: tuple[int, ...] = ()  # what closes a text and its answer

    @property
    def learnt(self) -> str:
        """The objective, for the line about the data."""
        return {
            "masked": "loss on 15 % of the tokens, masked",
            "spans": "loss on spans left out, 15 % of the tokens",
            "continued": "loss on the second part of each text",
        }[self.kind]

    def __call__(self, ids: np.ndarray, draws: np.ndarray) -> dict[str, np.ndarray]:
        """ids [t], t >= 2; draws [3, t], whole numbers below 2**64 -> input_ids and labels."""
        if self.kind == "masked":
            return masked(ids, np.isin(ids, self.fixed), self.mask, self.vocab, draws)
        if self.kind == "spans":
            return spans(ids, self.sentinels, self.end, draws)
        return continued(ids, self.end, draws)


def noise_for(tokenizer: PreTrainedTokenizerBase, task: str) -> Noise:
    """The corruption for a task with this tokenizer. FileError if a mask token is missing."""
    vocab = len(tokenizer)
    fixed = tuple(sorted(tokenizer.all_special_ids))
    if task == "masked":
        if tokenizer.mask_token_id is None:
            raise FileError(
                "the tokenizer has no mask token",
                [(str(tokenizer.name_or_path or type(tokenizer).__name__), f"{vocab:,} tokens")],
                "Name one and save it: tokenizer.add_special_tokens({'mask_token': '[MASK]'}).",
            )
        return Noise("masked", vocab, fixed, mask=tokenizer.mask_token_id)
    end = (tokenizer.eos_token_id,) if tokenizer.eos_token_id is not None else ()
    sentinels = sentinels_of(tokenizer)
    return Noise("spans" if sentinels else "continued", vocab, fixed, 0, sentinels, end)


def sentinels_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of T5's sentinel tokens <extra_id_0>, <extra_id_1>, ..."""
    vocab = tokenizer.get_vocab()
    found: list[int] = []
    while (name := f"<extra_id_{len(found)}>") in vocab:
        found.append(vocab[name])
    return tuple(found)


# --- the three kinds -----------------------------------------------------------------------


def masked(
    ids: np.ndarray, fixed: np.ndarray, mask: int, vocab: int, draws: np.ndarray
) -> dict[str, np.ndarray]:
    """Mask 15 % of the tokens that are not fixed, at least one. All arrays [t], draws [3, t]."""
    free = np.flatnonzero(~fixed)
    count = max(1, round(SHARE * len(free)))
    chosen = free[np.argsort(draws[0, free], kind="stable")[:count]]
    share = draws[1, chosen] / 2.0**64
    inputs, labels = ids.copy(), np.full_like(ids, IGNORE)
    labels[chosen] = ids[chosen]
    inputs[chosen[share < MASKED]] = mask
    other = chosen[(share >= MASKED) & (share < MASKED + OTHER)]
    inputs[other] = draws[2, other] % np.uint64(vocab)
    return {"input_ids": inputs, "labels": labels}


def spans(
    ids: np.ndarray, sentinels: Sequence[int], end: Sequence[int], draws: np.ndarray
) -> dict[str, np.ndarray]:
    """Replace spans by sentinels; kept and removed spans alternate, a kept one first."""
    total = len(ids)
    lost = min(max(1, round(SHARE * total)), total - 1)
    count = min(max(1, round(lost / SPAN)), lost, total - lost, len(sentinels))
    source: list[int] = []
    target: list[int] = []
    at = 0
    sizes = zip(
        partition(total - lost, count, draws[0]), partition(lost, count, draws[1]), strict=True
    )
    for sentinel, (kept, left_out) in zip(sentinels, sizes, strict=False):
        source += [*ids[at : at + kept].tolist(), sentinel]
        at += kept
        target += [sentinel, *ids[at : at + left_out].tolist()]
        at += left_out
    return answered([*source, *end], [*target, *end])


def partition(total: int, parts: int, draws: np.ndarray) -> list[int]:
    """A uniformly random partition of `total` into `parts` sizes >= 1; draws [>= total - 1]."""
    cuts = np.sort(np.argsort(draws[: total - 1], kind="stable")[: parts - 1]) + 1
    sizes: list[int] = np.diff([0, *cuts.tolist(), total]).tolist()
    return sizes


def continued(ids: np.ndarray, end: Sequence[int], draws: np.ndarray) -> dict[str, np.ndarray]:
    """Cut a text at a point between its first and its last quarter."""
    low = max(1, len(ids) // 4)
    high = max(low, len(ids) - 1 - len(ids) // 4)
    at = low + int(draws[0, 0] % np.uint64(high - low + 1))
    return answered([*ids[:at].tolist(), *end], [*ids[at:].tolist(), *end])


def answered(source: Sequence[int], target: Sequence[int]) -> dict[str, np.ndarray]:
    return {"input_ids": np.array(source, np.int32), "labels": np.array(target, np.int32)}


# --- rows ----------------------------------------------------------------------------------


class Noised(Dataset[dict[str, Any]]):
    """Rows of text whose corruption changes with the epoch; the loop calls `set_epoch`."""

    def __init__(
        self,
        rows: Any,  # a data set with input_ids
        noise: Noise,
        seed: int,
        epoch: int = 0,
        numbers: Sequence[int] | None = None,
    ):
        self.rows, self.noise, self.seed, self.epoch = rows, noise, seed, epoch
        self.numbers = range(len(rows)) if numbers is None else numbers

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> dict[str, Any]:
        number = int(self.numbers[i])
        ids = np.asarray(self.rows[number]["input_ids"], np.int32)
        draws = drawn(3 * len(ids), self.seed, self.epoch, number).reshape(3, -1)
        return self.noise(ids, draws)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def select(self, indices: Sequence[int]) -> Noised:
        """A subset of the rows, each with the same corruption as here."""
        chosen = [self.numbers[i] for i in indices]
        return Noised(self.rows, self.noise, self.seed, self.epoch, chosen)
