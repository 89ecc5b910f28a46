"""How good a model is on data it was not trained on: loss, perplexity, bits per byte.

Means are over tokens, not over batches, so that the split into batches does not show. Bits
per byte compare models with different tokenizers, which perplexities do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from eckart.io.data import Data
from eckart.io.tasks import TASKS
from eckart.jobs.measuring.devices import model_device, on_device

IGNORE = -100  # a label that does not count
RISING = ("accuracy",)  # metrics of which more is better
FOLLOWING = ("perplexity", "bits_per_byte")  # functions of the loss: they rank models as it does
POOL = 8  # batches among which rows are sorted


@torch.no_grad()
def measure(
    model: nn.Module, data: Data, batch_size: int, metrics: Sequence[str]
) -> dict[str, Any]:
    """The loss and these metrics on all held-out rows; empty without rows."""
    was_training = model.training
    model.eval()
    try:
        sums = {
            name: summed(model, rows, data, batch_size) for name, rows in data.evaluation.items()
        }
    finally:
        model.train(was_training)
    found = from_sums(sums, data)
    return {name: found[name] for name in found if name in ("loss", "sources", *metrics)}


def from_sums(sums: Mapping[str, Mapping[str, float]], data: Data) -> dict[str, Any]:
    """All metrics from the sums over each source; empty where nothing was counted.

    loss in nats per token that is learnt; with more than one source also `sources`: {name:
    loss}. For classes, tags and hidden words also `accuracy`, the share of first choices that
    are right.
    """
    sums = {name: counts for name, counts in sums.items() if counts["count"]}
    if not sums:
        return {}
    count = sum(s["count"] for s in sums.values())
    loss = sum(s["loss"] for s in sums.values()) / count
    found: dict[str, Any] = {"loss": loss}
    if TASKS[data.task].chosen:
        found["accuracy"] = sum(s["right"] for s in sums.values()) / count
    if not data.labels:
        found["perplexity"] = perplexity(loss)
        text = sum(s["count"] * data.bytes_per_token.get(name, 0.0) for name, s in sums.items())
        if text:
            found["bits_per_byte"] = loss * count / math.log(2) / text
    if len(sums) > 1:
        found["sources"] = {name: s["loss"] / s["count"] for name, s in sums.items()}
    return found


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # e^709 is the largest double


def names(data: Data) -> tuple[str, ...]:
    """What `measure` gives for this data."""
    if data.task == "masked":
        return "loss", "accuracy", "perplexity"
    if data.labels:
        return "loss", "accuracy"
    return ("loss", "perplexity", *(("bits_per_byte",) if not data.holed else ()))


def summed(model: nn.Module, rows: Any, data: Data, batch_size: int) -> dict[str, float]:
    """Summed loss, and how many tokens (or examples) it is over."""
    total = {"loss": 0.0, "count": 0.0, "right": 0.0}
    device = model_device(model)
    for batch in batches(rows, data, batch_size):
        inputs = on_device(batch, device)
        outputs = model(**inputs)
        labels = inputs["labels"]  # of text to go on from the first is never learnt
        counted = int((labels != IGNORE).sum())
        if not counted:
            continue
        total["loss"] += float(outputs["loss"]) * counted
        total["count"] += counted
        if TASKS[data.task].chosen:
            total["right"] += int((outputs["logits"].argmax(-1) == labels).sum())
    return total


def batches(rows: Any, data: Data, size: int) -> Iterator[Mapping[str, Any]]:
    """Rows collated, those of like length within some batches together: less is padded."""
    for start in range(0, len(rows), POOL * size):
        pool = [rows[i] for i in range(start, min(start + POOL * size, len(rows)))]
        lengths = data.lengths(pool)
        pool = [pool[i] for i in sorted(range(len(pool)), key=lengths.__getitem__)]
        for at in range(0, len(pool), size):
            yield data.collate(pool[at : at + size])
