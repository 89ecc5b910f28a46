"""New tokens: an embedding that was resized before attach, trained whole and saved with the terms.

The new rows exist nowhere else, so an adapter that trains the embedding stores it whole, with the
head's matrix if that is separate, and its base is identified by all other tensors. A model with
the old number of rows is resized when such an adapter is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from eckart.errors import FileError


def ends(model: nn.Module) -> tuple[str, ...]:
    """Paths of the input embedding and the output head; none for a model without a vocabulary."""
    found = []
    for ask, kind in (("get_input_embeddings", nn.Embedding), ("get_output_embeddings", nn.Module)):
        try:
            module = getattr(model, ask)()
        except (AttributeError, NotImplementedError):  # a plain module
            continue
        if isinstance(module, kind) and "weight" in module._parameters:
            found += [path for path, other in model.named_modules() if other is module]
        elif not found:
            return ()  # patches of images are no rows of a vocabulary
    return tuple(dict.fromkeys(found))


def tied_ends(model: nn.Module) -> bool:
    """Do embedding and head share one matrix?"""
    weights = [getattr(model.get_submodule(path), "weight", None) for path in ends(model)]
    return len(weights) == 2 and weights[0] is weights[1]


def rows_of(model: nn.Module) -> int | None:
    """Rows of the input embedding."""
    return next((len(model.get_parameter(f"{path}.weight")) for path in ends(model)[:1]), None)


def vocabulary_of(model: nn.Module, also_train: Sequence[str]) -> int | None:
    """Rows of the embedding if it is trained whole; None if not."""
    words: Any = next((model.get_submodule(p) for p in ends(model)[:1] if p in also_train), None)
    return words.num_embeddings if isinstance(words, nn.Embedding) else None


def held_whole(model: nn.Module, also_train: Sequence[str]) -> tuple[str, ...]:
    """Modules that an adapter stores whole: those it trains, and the head of new tokens."""
    new = vocabulary_of(model, also_train) is not None
    return tuple(dict.fromkeys((*also_train, *(ends(model) if new else ()))))


class End:
    """The state of an embedding or head, to restore it after resizing changed or replaced it."""

    def __init__(self, model: nn.Module, path: str):
        self.path, self.module = path, model.get_submodule(path)
        self.weight: nn.Parameter = self.module.get_parameter("weight")
        self.data = self.weight.data
        counts = ("num_embeddings", "out_features", "padding_idx")
        self.counts = {
            name: vars(self.module)[name] for name in counts if name in vars(self.module)
        }

    def restore(self, model: nn.Module) -> None:
        """Restore it in the model."""
        model.set_submodule(self.path, self.module)
        self.module.register_parameter("weight", self.weight)
        self.weight.data = self.data
        vars(self.module).update(self.counts)


@contextmanager
def resized(model: Any, rows: int | None) -> Iterator[None]:
    """Context manager: resize the model's embedding to `rows`; an exception undoes it."""
    paths = ends(model) if rows is not None else ()
    if rows is None or model.get_submodule(paths[0]).num_embeddings == rows:
        yield
        return
    before = [End(model, path) for path in paths]
    count = model.config.get_text_config().vocab_size
    try:
        # Rows that are new are read from the adapter: what they are drawn from is no matter.
        model.resize_token_embeddings(rows, mean_resizing=False)
    except Exception as fault:
        raise FileError(
            "this model takes no other number of tokens", [(type(model).__name__, f"{rows:,}")]
        ) from fault
    try:
        yield
    except BaseException:
        for end in before:
            end.restore(model)
        model.config.get_text_config().vocab_size = count
        model.tie_weights()
        raise
