"""Stores tensors of finished adapters in fewer bits than they were trained in (`Term.pack`).

Checkpoints are not packed. Names are unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from eckart.io.tensors import standalone
from eckart.linear import Term
from eckart.recipe import Handle


def packed(handle: Handle, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a handle as files store it."""
    found = dict(tensors)
    for key, term, name in owned(handle):
        held = term.pack(name, standalone(tensors[key]))
        if held is not None:
            found[key] = held
    return found


def unpacked(handle: Handle, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `packed`; unexpected tensors are left as they are, to be refused later."""
    found, state = dict(tensors), handle.named_state()
    for key, term, name in owned(handle):
        expected = term.pack(name, standalone(state[key]))
        if expected is None or key not in tensors:
            continue
        if (tensors[key].shape, tensors[key].dtype) == (expected.shape, expected.dtype):
            found[key] = term.unpack(name, tensors[key], state[key].shape)
    return found


def owned(handle: Handle) -> Iterator[tuple[str, Term, str]]:
    """The terms' own tensors: name in files -> the term and its name for the tensor."""
    for stem, part in handle.carried().items():
        if isinstance(part, Term):
            for name in part.state_dict():
                yield handle.in_files(f"{stem}.{name}"), part, name
