"""What a step does beside its time: operations dispatched, and bytes of state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = {
    "view", "t", "transpose", "expand", "unsqueeze", "detach", "alias", "select", "slice", "split",
    "split_with_sizes", "unbind", "squeeze", "_unsafe_view", "promote_types",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """How many operations run inside, views left out: what a GPU would launch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.__name__.split(".")[0] not in VIEWS
        return func(*args, **(kwargs or {}))


def launches(run: Callable[[], object]) -> int:
    """Operations of one call."""
    with Launches() as counter:
        run()
    return counter.count


def state_bytes(states: Iterable[Mapping[str, Any]]) -> int:
    """Bytes of all tensors in some states."""
    tensors = [t for state in states for t in state.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def llama_shapes(width: int, wide: int, blocks: int) -> list[tuple[int, int]]:
    """The matrices [m, n] of some Llama blocks."""
    return ([(width, width)] * 4 + [(wide, width)] * 2 + [(width, wide)]) * blocks


def problem(shapes: list[tuple[int, int]]) -> list[torch.nn.Parameter]:
    """The same weights and gradients at every call."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s) / 30) for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def beside(ours: Any, theirs: Any, params: tuple[list[Any], list[Any]]) -> dict[str, Any]:
    """What is no time, of two optimizers that have taken the same steps on parameters of their
    own: operations of a step more, bytes of state, how far the weights are apart before it.

    `theirs` offers `step` and a list of `states`.
    """
    pairs = zip(*params, strict=True)
    gap = max(float((x - y).detach().abs().max()) for x, y in pairs)
    return {
        "operations": {"eckart": launches(ours.step), "published": launches(theirs.step)},
        "state_bytes": {
            "eckart": state_bytes(ours.state.values()),
            "published": state_bytes(theirs.states),
        },
        "largest_difference_of_weights": gap,
    }
