"""Loss, accuracy and divergence from another model, for each row of a data set.

Numbers are kept per row for intervals over rows, since tokens of one text are not independent.
Only positions with a label count; logits are compared in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eckart.jobs.measuring.devices import model_device, on_device

IGNORE = -100  # label of positions that do not count
BYTES = 2**28  # most bytes of logits in a batch


@dataclass(frozen=True)
class Scores:
    """Sums over the labels of each row, in nats or counts; float64 [rows] each."""

    loss: np.ndarray
    count: np.ndarray  # number of labels
    right: np.ndarray  # labels that are the model's top prediction
    other: np.ndarray  # loss of the other model; this and the next two are empty without one
    kl: np.ndarray  # KL(other || model)
    same: np.ndarray  # labels at which both models have the same top prediction

    @property
    def exact(self) -> np.ndarray:
        """1.0 for rows whose every label is the top prediction (greedy decoding), else 0.0."""
        return (self.right == self.count).astype(float)


def joined(parts: Sequence[Scores]) -> Scores:
    """The scores of several sources, concatenated."""
    names = Scores.__dataclass_fields__
    return Scores(**{n: np.concatenate([getattr(p, n) for p in parts]) for n in names})


def is_encoder_decoder(model: Any) -> bool:
    """Is the model an encoder-decoder, whose decoder reads the labels?"""
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
    """Score all rows; `other` is a model with the same vocabulary (or classes).

    Rows are batched by length (`lengths`, default that of their input_ids), `batch_size` at a
    time, default as many as keep the logits below `BYTES`. `shifted`: logits predict the next
    position, as in causal language models.
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
    """The number of rows of this length whose logits fit into `BYTES`, at most 64."""
    width = getattr(model.config, "vocab_size", None) or 1
    return int(max(1, min(64, BYTES // (4 * length * width * (2 if two else 1)))))


def score_batch(
    model: nn.Module,
    batch: dict[str, Any],
    other: nn.Module | None,
    shifted: bool,
) -> np.ndarray:
    """The six fields of `Scores` for each row of a batch, [6, b]."""
    device = model_device(model)
    inputs = on_device(batch, device)
    labels: Tensor = inputs["labels"] if is_encoder_decoder(model) else inputs.pop("labels")
    shifted = shifted and labels.ndim == 2
    labels = labels[:, 1:] if shifted else labels  # [b], one label a row, or [b, t]
    at = labels != IGNORE
    where = at.nonzero()[:, 0]  # [k], the row of each label
    labels = labels[at]

    def choice_and_logp(one: nn.Module) -> tuple[Tensor, Tensor]:
        logits = one(**inputs).logits
        logits = (logits[:, :-1] if shifted else logits)[at]  # [k, v]
        return logits.argmax(-1), logits.float().log_softmax(-1)

    rows = len(batch["labels"])
    choice, logp = choice_and_logp(model)

    def by_row(values: Tensor) -> np.ndarray:
        sums = torch.zeros(rows, dtype=torch.float64, device=device)
        return sums.index_add(0, where, values.double()).cpu().numpy()

    def loss_of(logp: Tensor) -> np.ndarray:
        return by_row(-logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1))

    sums = [loss_of(logp), by_row(torch.ones_like(labels)), by_row(choice == labels)]
    if other is None:
        return np.stack([*sums, *(np.zeros(rows) for _ in range(3))])
    choice_other, logp_other = choice_and_logp(other)
    kl = (logp_other.exp() * (logp_other - logp)).nansum(-1)  # [k]; 0 * -inf counts as 0
    return np.stack([*sums, loss_of(logp_other), by_row(kl), by_row(choice == choice_other)])
