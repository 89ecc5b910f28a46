"""Models and problems for the optimizer benchmarks, and counts of operations and state bytes."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from zlib import crc32

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eckart.optim import Leading
from eckart.optim.project import Search

VIEWS = {
    "view", "t", "transpose", "expand", "unsqueeze", "detach", "alias", "select", "slice", "split",
    "split_with_sizes", "unbind", "squeeze", "_unsafe_view", "promote_types",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts the operations that run inside, without views: what a GPU would launch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name not in VIEWS:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def launches(run: Callable[[], object]) -> int:
    """The number of operations in one call."""
    with Launches() as counter:
        run()
    return counter.found.total()


def state_bytes(states: Iterable[Mapping[str, Any]]) -> int:
    """Bytes of all tensors in these states."""
    tensors = [t for state in states for t in state.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class Llama:
    """The blocks of a Llama model, and the settings of a comparison on them."""

    width: int
    mlp: int
    blocks: int
    rank: int  # of a projection, as GaLore was published
    turns: int = 9
    repeat: int = 2  # steps in a turn

    def shapes(self, blocks: int | None = None) -> list[tuple[int, int]]:
        """The matrices [m, n] of its blocks."""
        d, wide = self.width, self.mlp
        return ([(d, d)] * 4 + [(wide, d)] * 2 + [(d, wide)]) * (blocks or self.blocks)


MODELS = {
    "tiny": Llama(256, 688, 4, 32),
    "60M": Llama(512, 1376, 2, 128),
    "350M": Llama(1024, 2736, 1, 256),
    "1B": Llama(2048, 5504, 1, 512),
    "7B": Llama(4096, 11008, 1, 1024, turns=2, repeat=1),
}


def option(name: str) -> str:
    """The value after this option on the command line, or ""."""
    words = sys.argv[1:]
    return words[words.index(name) + 1] if name in words[:-1] else ""


def titled(name: str) -> str:
    """The name of a result; includes the models given on the command line."""
    return "-".join(filter(None, (name, option("--model"))))


def chosen(*usual: str) -> dict[str, Llama]:
    """The models given by `--model NAME[,NAME]`, else the default ones."""
    named = option("--model")
    names = named.split(",") if named else usual
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        sys.exit(f"unknown model {unknown[0]}. Known: {', '.join(MODELS)}")
    return {name: MODELS[name] for name in names}


def first_basis(place: int, G: Tensor, rank: int, side: Literal["left", "right"]) -> Tensor:
    """The first basis [m, r] or [r, n] of GaLore and Fira for a gradient G [m, n] of the parameter
    at index `place`."""
    seed = crc32(f"0/0.{place}/0".encode())  # as our optimizer seeds its name at step 0
    search = Search(G[None], {}, [seed], True, (*G.shape,))
    found: Tensor = Leading(rank, side).find(search)[side][0]
    return found


def problem(shapes: list[tuple[int, int]]) -> list[torch.nn.Parameter]:
    """The same weights and gradients at every call."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s) / 30) for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


class Published:
    """A published algorithm, applied to one matrix after another; subclasses define `move`."""

    def __init__(self, params: list[torch.nn.Parameter], rank: int):
        self.params, self.rank = params, rank
        self.states: list[dict[str, Any]] = [{} for _ in params]

    @torch.no_grad()
    def step(self) -> None:
        for place, (W, state) in enumerate(zip(self.params, self.states, strict=True)):
            self.move(place, W, state)

    def move(self, place: int, W: torch.nn.Parameter, s: dict[str, Any]) -> None:
        """Update the matrix at this index, and its state, by its gradient."""
        raise NotImplementedError


def apart(a: list[torch.nn.Parameter], b: list[torch.nn.Parameter]) -> float:
    """The largest difference between the weights of two optimizers after the same steps."""
    return max(float((x - y).detach().abs().max()) for x, y in zip(a, b, strict=True))


def beside(ours: Any, theirs: Published, params: tuple[list[Any], list[Any]]) -> dict[str, Any]:
    """Results other than time for two optimizers after the same steps on separate parameters:
    operations of a further step, bytes of state, and the largest difference of weights."""
    gap = apart(*params)
    return {
        "operations": {"eckart": launches(ours.step), "published": launches(theirs.step)},
        "state_bytes": {
            "eckart": state_bytes(ours.state.values()),
            "published": state_bytes(theirs.states),
        },
        "largest_difference_of_weights": gap,
    }
