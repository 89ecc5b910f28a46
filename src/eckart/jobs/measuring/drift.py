"""How far a model's predictions are from another model's, on texts or images.

Measures KL(other || model), in nats per token (or class), and how often the top prediction of
both is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eckart.io import images
from eckart.io.preprocessing import Preprocessing
from eckart.io.text import read
from eckart.jobs.measuring.scores import score

TEXT = "pydoc-prose"  # available everywhere: Python's own reference
ROWS, LENGTH = 32, 128  # rows of text, tokens in a row

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Sample:
    """The rows that drift is measured on."""

    rows: Rows
    collate: Callable[[Any], dict[str, Any]]
    name: str
    lengths: Sequence[int]
    shifted: bool = True  # are logits about the next token?

    def drift(self, model: Any, other: Any) -> dict[str, Any]:
        """{kl, same_first_choice, tokens, text, of_classes} of a model from another one."""
        found = score(
            model.eval(), self.rows, self.collate, other.eval(),
            lengths=self.lengths, shifted=self.shifted,
        )  # fmt: skip
        tokens = float(found.count.sum())
        return {
            "kl": max(0.0, float(found.kl.sum()) / tokens),  # rounding can fall below 0
            "same_first_choice": float(found.same.sum()) / tokens,
            "tokens": int(tokens),
            "text": self.name,
            "of_classes": not self.shifted,
        }


def of_text(
    tokenizer: Any,
    context: int | None,
    sources: Sequence[Any] = (),
    task: str = "causal",
    length: int = LENGTH,
) -> Sample:
    """A sample of `sources`, or of a built-in text: at most ROWS * LENGTH tokens."""
    length, most = min(length, context or length), max(1, ROWS * LENGTH // length)
    data = read([], tokenizer, length, packing=False, eval=list(sources) or TEXT)
    found = [row for rows in data.evaluation.values() for row in rows]
    rows = [CHOICES.get(task, dict)(found[i]) for i in evenly_spaced(len(found), most)]
    lengths = [len(row["input_ids"]) for row in rows]
    return Sample(rows, data.collate, ", ".join(data.evaluation), lengths, task not in CHOICES)


def of_images(preprocessing: Preprocessing, sources: Sequence[Any]) -> Sample:
    """A sample of the images of `sources`; their labels are ignored."""
    data = images.read([], preprocessing, eval=list(sources))
    found = [row for rows in data.evaluation.values() for row in rows]
    rows = [{**found[i], "labels": 0} for i in evenly_spaced(len(found))]
    return Sample(rows, data.collate, ", ".join(data.evaluation), data.lengths(rows), False)


def evenly_spaced(count: int, most: int = ROWS) -> list[int]:
    """At most `most` evenly spaced indices into `count` rows."""
    places = np.linspace(0, count - 1, min(most, count)).round().astype(int)
    return [int(i) for i in places]


# Dummy labels at every position where a classifier predicts: KL does not read their values.
CHOICES: dict[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]] = {
    "classification": lambda row: {"input_ids": row["input_ids"], "labels": 0},
    "tagging": lambda row: {
        "input_ids": row["input_ids"], "labels": np.zeros(len(row["input_ids"]), np.int64)
    },
}  # fmt: skip
