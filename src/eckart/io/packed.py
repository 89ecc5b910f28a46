"""Tensors that a method's file holds in fewer bits than they are trained in (`Term.pack`).

Checkpoints hold what is trained; only a finished adapter is packed. Names stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from eckart.io.tensors import standalone
from eckart.linear import Term
from eckart.recipe import Handle


def packed(handle: Handle, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a handle as its file holds it."""
    found = dict(tensors)
    for key, term, name in owned(handle):
        held = term.pack(name, standalone(tensors[key]))
        if held is not None:
            found[key] = held
    return found


def unpacked(handle: Handle, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back of `packed`; what is not as expected is left, to be refused by name."""
    found, state = dict(tensors), handle.named_state()
    for key, term, name in owned(handle):
        expected = term.pack(name, standalone(state[key]))
        if expected is None or key not in tensors:
            continue
        if (tensors[key].shape, tensors[key].dtype) == (expected.shape, expected.dtype):
            found[key] = term.unpack(name, tensors[key], state[key].shape)
    return found


def owned(handle: Handle) -> Iterator[tuple[str, Term, str]]:
    """Names in files of the terms' own tensors, with the term and its name for each."""
    for stem, part in handle.carried().items():
        if isinstance(part, Term):
            for name in part.state_dict():
                yield handle.in_files(f"{stem}.{name}"), part, name
