"""Metrics on held-out data: loss, perplexity, bits per byte, accuracy.

Means are over tokens, not batches, so they do not depend on the batch size. Bits per byte can be
compared between tokenizers; perplexities cannot.
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

IGNORE = -100  # label without a loss
RISING = ("accuracy",)  # metrics where higher is better
FOLLOWING = ("perplexity", "bits_per_byte")  # monotonic in the loss
POOL = 8  # batches whose rows are sorted by length together


@torch.no_grad()
def measure(
    model: nn.Module, data: Data, batch_size: int, metrics: Sequence[str]
) -> dict[str, Any]:
    """The loss and the given metrics on all held-out rows; {} without rows."""
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
    """All metrics from the sums over each source; {} if nothing was counted.

    The loss is in nats per token with a label. With several sources `sources` is {name: loss}.
    Classes, tags and masked words have `accuracy`, the share of correct top predictions.
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
    """The names of the metrics that `measure` returns for this data."""
    if data.task == "masked":
        return "loss", "accuracy", "perplexity"
    if data.labels:
        return "loss", "accuracy"
    return ("loss", "perplexity", *(("bits_per_byte",) if not data.holed else ()))


def summed(model: nn.Module, rows: Any, data: Data, batch_size: int) -> dict[str, float]:
    """The summed loss, and the number of tokens (or examples) in it."""
    total = {"loss": 0.0, "count": 0.0, "right": 0.0}
    device = model_device(model)
    for batch in batches(rows, data, batch_size):
        inputs = on_device(batch, device)
        outputs = model(**inputs)
        labels = inputs["labels"]  # the first token of causal text has no loss
        counted = int((labels != IGNORE).sum())
        if not counted:
            continue
        total["loss"] += float(outputs["loss"]) * counted
        total["count"] += counted
        if TASKS[data.task].chosen:
            total["right"] += int((outputs["logits"].argmax(-1) == labels).sum())
    return total


def batches(rows: Any, data: Data, size: int) -> Iterator[Mapping[str, Any]]:
    """Collated batches; rows are sorted by length within POOL batches, for less padding."""
    for start in range(0, len(rows), POOL * size):
        pool = [rows[i] for i in range(start, min(start + POOL * size, len(rows)))]
        lengths = data.lengths(pool)
        pool = [pool[i] for i in sorted(range(len(pool)), key=lengths.__getitem__)]
        for at in range(0, len(pool), size):
            yield data.collate(pool[at : at + size])
