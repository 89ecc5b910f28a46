"""How well a model predicts each row, and how far it has drifted from another model.

Numbers are kept per row, so that intervals can be taken over rows: tokens of one text are
not independent. Only positions with a label count; logits are compared in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eckart.jobs.measuring.devices import model_device, on_device

IGNORE = -100  # a label that does not count
BYTES = 2**28  # of logits that may live at once


@dataclass(frozen=True)
class Scores:
    """Sums over the labels of each row, in nats or counts; float64 [rows] each."""

    loss: np.ndarray
    count: np.ndarray  # labels
    right: np.ndarray  # labels that are the model's first choice
    other: np.ndarray  # loss of the other model; empty without one, as the next two
    kl: np.ndarray  # KL(other || model): what it costs to code the other's words by the model
    same: np.ndarray  # labels at which both have the same first choice

    @property
    def exact(self) -> np.ndarray:
        """Rows whose every label is the first choice: greedy decoding would write them."""
        return (self.right == self.count).astype(float)


def joined(parts: Sequence[Scores]) -> Scores:
    """The rows of several sources as one."""
    names = Scores.__dataclass_fields__
    return Scores(**{n: np.concatenate([getattr(p, n) for p in parts]) for n in names})


def is_answered(model: Any) -> bool:
    """Does the model read its labels, to go on from them?"""
    return bool(getattr(model.config, "is_encoder_decoder", False))


@torch.inference_mode()
def score(
    model: Any,
    rows: Any,
    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]],
    other: Any = None,
    batch_size: int | None = None,
    lengths: Sequence[int] | None = None,
    shifted: bool = True,
) -> Scores:
    """Score all rows; `other` is a model with the same tokens (or classes).

    Rows are batched by length, that of their input_ids where none is given, `batch_size` at a
    time or as many as keep the logits small. `shifted` where logits at a position are about
    the next one, as in models that go on from a text.
    """
    lengths = lengths or [len(row["input_ids"]) for row in rows]
    waiting = sorted(range(len(rows)), key=lambda i: -lengths[i])
    found = np.zeros((6, len(rows)))
    while waiting:
        size = batch_size or rows_at_once(model, lengths[waiting[0]], other is not None)
        batch, waiting = waiting[:size], waiting[size:]
        collated = collate([rows[i] for i in batch])
        found[:, batch] = score_batch(model, collated, other, shifted)
    empty = np.zeros(0)
    return Scores(*found[:3], *(found[3:] if other is not None else (empty, empty, empty)))


def rows_at_once(model: Any, length: int, two: bool) -> int:
    """Rows of this length whose logits fit."""
    width = getattr(model.config, "vocab_size", None) or 1
    return int(max(1, min(64, BYTES // (4 * length * width * (2 if two else 1)))))


def score_batch(
    model: nn.Module,
    batch: dict[str, Any],
    other: nn.Module | None,
    shifted: bool,
) -> np.ndarray:
    """The six sums of `Scores` for each row of a batch, [6, b]."""
    device = model_device(model)
    inputs = on_device(batch, device)
    labels: Tensor = inputs["labels"] if is_answered(model) else inputs.pop("labels")
    shifted = shifted and labels.ndim == 2
    labels = labels[:, 1:] if shifted else labels  # [b], one label a row, or [b, t]
    at = labels != IGNORE
    where = at.nonzero()[:, 0]  # [k], the row of each label
    labels = labels[at]

    def first_and_all(one: nn.Module) -> tuple[Tensor, Tensor]:
        logits = one(**inputs).logits
        logits = (logits[:, :-1] if shifted else logits)[at]  # [k, v]
        return logits.argmax(-1), logits.float().log_softmax(-1)

    rows = len(batch["labels"])
    choice, logp = first_and_all(model)

    def by_row(values: Tensor) -> np.ndarray:
        sums = torch.zeros(rows, dtype=torch.float64, device=device)
        return sums.index_add(0, where, values.double()).cpu().numpy()

    def loss_of(logp: Tensor) -> np.ndarray:
        return by_row(-logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1))

    sums = [loss_of(logp), by_row(torch.ones_like(labels)), by_row(choice == labels)]
    if other is None:
        return np.stack([*sums, *(np.zeros(rows) for _ in range(3))])
    choice_other, logp_other = first_and_all(other)
    kl = (logp_other.exp() * (logp_other - logp)).nansum(-1)  # [k]; 0 * -inf counts as 0
    return np.stack([*sums, loss_of(logp_other), by_row(kl), by_row(choice == choice_other)])
