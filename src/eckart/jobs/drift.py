"""How far a model's words are from another's, measured on text.

KL(other || model), in nats per token, and how often both have the same first choice
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eckart.io.text import read
from eckart.jobs.scores import score

TEXT = "pydoc-prose"  # always there: Python's own reference
ROWS, LENGTH = 32, 128  # of text, and tokens in each

Rows = Sequence[Mapping[str, Any]]


class Text:
    """The rows that drift is measured on: of `sources`, or of a text that is always there."""

    def __init__(self, tokenizer: Any, context: int | None, sources: Sequence[Any] = ()):
        length = min(LENGTH, context or LENGTH)
        data = read([], tokenizer, length, packing=False, eval=list(sources) or TEXT)
        found = [row for rows in data.evaluation.values() for row in rows]
        chosen = np.linspace(0, len(found) - 1, min(ROWS, len(found))).round().astype(int)
        self.rows: Rows = [found[i] for i in chosen]
        self.collate, self.name = data.collate, ", ".join(data.evaluation)

    def drift(self, model: Any, other: Any) -> dict[str, Any]:
        """{kl, same_first_choice, tokens, text} of a model from another one."""
        found = score(model.eval(), self.rows, self.collate, other.eval())
        tokens = float(found.count.sum())
        return {
            "kl": max(0.0, float(found.kl.sum()) / tokens),  # rounding can fall below 0
            "same_first_choice": float(found.same.sum()) / tokens,
            "tokens": int(tokens),
            "text": self.name,
        }
