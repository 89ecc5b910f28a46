"""Inner rules (Adam, SGD, Adafactor, ...): turn gradients of any shape into directions.

They work the same on full and on projected gradients. Each takes a list of tensors, one per
parameter, and uses torch's foreach operations: on a GPU a few launches for a whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from eckart.optim.part import Part, State, Tensors, add_squares_, multiply_
from eckart.optim.project import Turn
from eckart.optim.sharded import Split, sum_


@dataclass(frozen=True)
class Direction:
    """The output of an inner rule: W changes by -lr / correction * numerator / denominator.

    The parts are separate so that the update can be one fused operation, rounded as torch
    rounds it, and so that residuals can use the direction without its bias correction.
    """

    numerator: Tensors
    denominator: Tensors | None
    correction: list[float]
    excess: list[float] | None = None  # how much of the correction is in N already

    def raw(self) -> tuple[Tensors, list[float]]:
        """N without any bias correction, and the whole correction to divide it by."""
        if self.excess is None:
            return self.tensors(), self.correction
        N = torch._foreach_div(self.tensors(), self.excess)
        return list(N), [c / x for c, x in zip(self.correction, self.excess, strict=True)]

    def tensors(self) -> Tensors:
        """N = numerator / denominator. Without a denominator N may be a state tensor: do not
        change it in place."""
        if self.denominator is None:
            return self.numerator
        return list(torch._foreach_div(self.numerator, self.denominator))


@dataclass(frozen=True)
class Inner(Part):
    """The contract of an inner rule."""

    elementwise: ClassVar[bool] = True  # may run on any shard of a tensor
    lines: ClassVar[bool] = False  # or on shards of its first dimension
    sums: ClassVar[bool] = False  # or on shards, with sums over them: `step_on_shards`
    turns: ClassVar[bool] = True  # can its moments be rotated into another basis?

    @property
    def ages(self) -> bool:
        """True where each direction has its own step count."""
        return False

    def init(self, R: Tensor) -> dict[str, Tensor]:
        """The state tensors for a gradient like R."""
        raise NotImplementedError

    def step(
        self, R: Tensors, states: list[State], counts: list[int], fused: bool = False
    ) -> Direction:
        """Update the moments in `states` and return the direction. `counts` start at 1.

        `fused` allows a kernel whose rounding differs from torch.optim's.
        """
        raise NotImplementedError

    def step_on_shards(
        self,
        R: Tensors,
        states: list[State],
        counts: list[int],
        shapes: Sequence[torch.Size],
        split: Split,
    ) -> Direction:
        """As `step`, where each R is a shard of a tensor of the given shape, split by `split`."""
        raise NotImplementedError

    def rotate(self, state: State, turn: Turn, count: int) -> None:
        """Transform the moments, which have seen `count` steps, into a new basis, in place."""
        raise NotImplementedError

    def reset(self, state: State) -> None:
        """Set the moments to zero, in place."""
        for value in state.values():
            value.zero_()


@dataclass(frozen=True)
class Adam(Inner):
    """Adam's moments (Kingma and Ba 2015), with either of the two places of epsilon.

    torch: M / (sqrt(V / (1 - b2^t)) + eps), times 1 / (1 - b1^t): the bits of torch.optim.
    hf:    M / (sqrt(V) + eps), times sqrt(1 - b2^t) / (1 - b1^t): transformers' old AdamW,
           in which epsilon is larger in early steps; GaLore and Fira were published with it.

    `age_correct`: each direction of a fixed basis has its own t, counted from when it was
    chosen.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    eps_mode: Literal["torch", "hf"] = "torch"
    state_dtype: Literal["param", "float32"] = "param"
    age_correct: bool = False

    @property
    def ages(self) -> bool:
        return self.age_correct

    def init(self, R: Tensor) -> dict[str, Tensor]:
        dtype = state_dtype(R, self.state_dtype)
        return {
            "exp_avg": torch.zeros_like(R, dtype=dtype),
            "exp_avg_sq": torch.zeros_like(R, dtype=dtype),
        }

    def step(
        self, R: Tensors, states: list[State], counts: list[int], fused: bool = False
    ) -> Direction:
        b1, b2 = self.betas
        M = [s["exp_avg"] for s in states]
        V = [s["exp_avg_sq"] for s in states]
        R = [r.to(m.dtype) for r, m in zip(R, M, strict=True)]
        c1 = [1 - b1**t for t in counts]
        root_c2 = [(1 - b2**t) ** 0.5 for t in counts]
        hf = self.eps_mode == "hf"
        if "age" in states[0]:
            return Direction(
                [self.aged(*args) for args in zip(R, states, strict=True)], None, [1.0] * len(R)
            )
        correction = [c / c2 for c, c2 in zip(c1, root_c2, strict=True)] if hf else c1
        excess = None if hf else root_c2
        if fused and all(t.is_contiguous() for t in [*M, *V]):
            return Direction(self.fused(R, M, V, counts), None, correction, excess)
        torch._foreach_lerp_(M, R, 1 - b1)
        multiply_(V, b2)
        add_squares_(V, R, 1 - b2)
        denominator = list(torch._foreach_sqrt(V))
        if not hf:
            torch._foreach_div_(denominator, root_c2)
        torch._foreach_add_(denominator, self.eps)
        return Direction(M, denominator, correction, excess)

    def aged(self, R: Tensor, state: State) -> Tensor:
        """N with a bias correction per direction, counted from when it was chosen."""
        b1, b2 = self.betas
        age = state["age"].add_(1).to(state["exp_avg"].dtype)  # [*, 1, r], or [*, r, 1]
        c1, c2 = 1 - b1**age, 1 - b2**age
        M = state["exp_avg"].lerp_(R, 1 - b1) / c1
        V = state["exp_avg_sq"].mul_(b2).addcmul_(R, R, value=1 - b2) / c2
        eps = self.eps / c2.sqrt() if self.eps_mode == "hf" else self.eps
        return M / (V.sqrt() + eps)

    def fused(self, R: Tensors, M: Tensors, V: Tensors, counts: list[int]) -> Tensors:
        """N in one pass over R, M and V, by torch's fused Adam kernel.

        The kernel changes a weight by -lr/c1 * M / (sqrt(V)/root_c2 + eps). Applied to a weight
        of 0 with lr = -c1 it gives N; in hf mode lr and eps are divided by root_c2.
        """
        R = [r.contiguous() for r in R]  # the kernel ignores strides
        N = zeros_like_each(R)
        b1, b2 = self.betas
        for t in set(counts):
            chosen = [i for i, count in enumerate(counts) if count == t]
            step = torch.tensor(float(t), device=R[0].device)
            hf = (1 - b2**t) ** 0.5 if self.eps_mode == "hf" else 1.0
            torch._fused_adam_(
                [N[i] for i in chosen],
                [R[i] for i in chosen],
                [M[i] for i in chosen],
                [V[i] for i in chosen],
                [],
                [step] * len(chosen),
                lr=-(1 - b1**t) / hf,
                beta1=b1,
                beta2=b2,
                weight_decay=0.0,
                eps=self.eps / hf,
                amsgrad=False,
                maximize=False,
            )
        return N

    def rotate(self, state: State, turn: Turn, count: int) -> None:
        M, V = state["exp_avg"], state["exp_avg_sq"]
        c1, c2 = (1 - b**count for b in self.betas)
        V.copy_(turn.variance(V, M, c1, c2))
        M.copy_(turn.mean(M))
        if "age" in state:
            state["age"].copy_(turn.mean(state["age"]))


@dataclass(frozen=True)
class SGD(Inner):
    """R itself, or with momentum M = mu M + R (no dampening, no bias correction)."""

    momentum: float = 0.0
    state_dtype: Literal["param", "float32"] = "param"

    def init(self, R: Tensor) -> dict[str, Tensor]:
        if not self.momentum:
            return {}
        return {"momentum": torch.zeros_like(R, dtype=state_dtype(R, self.state_dtype))}

    def step(
        self, R: Tensors, states: list[State], counts: list[int], fused: bool = False
    ) -> Direction:
        if not self.momentum:
            return Direction(R, None, [1.0] * len(R))
        M = [s["momentum"] for s in states]
        multiply_(M, self.momentum)
        torch._foreach_add_(M, [r.to(m.dtype) for r, m in zip(R, M, strict=True)])
        return Direction(M, None, [1.0] * len(R))

    def rotate(self, state: State, turn: Turn, count: int) -> None:
        if self.momentum:
            state["momentum"].copy_(turn.mean(state["momentum"]))


@dataclass(frozen=True)
class Adafactor(Inner):
    """Adafactor (Shazeer and Stern 2018): the second moment of an a x b matrix is stored as row
    and column means, a + b numbers. A first moment is kept only if `beta1` is set.

    The learning rate is the caller's: neither relative steps nor scaling by the weights.
    """

    decay: float = -0.8  # the second moment decays by 1 - t^decay
    clip: float = 1.0  # largest root mean square of an update
    beta1: float = 0.0
    elementwise: ClassVar[bool] = False
    sums: ClassVar[bool] = True
    turns: ClassVar[bool] = False

    def init(self, R: Tensor) -> dict[str, Tensor]:
        wide = torch.promote_types(R.dtype, torch.float32)
        state = {"exp_avg": torch.zeros_like(R, dtype=wide)} if self.beta1 else {}
        if R.dim() < 2:
            return state | {"exp_avg_sq": torch.zeros_like(R, dtype=wide)}
        row, column = R.shape[:-1], R.shape[:-2] + R.shape[-1:]
        return state | {
            "row": R.new_zeros(row, dtype=wide),
            "column": R.new_zeros(column, dtype=wide),
        }

    def step(
        self, R: Tensors, states: list[State], counts: list[int], fused: bool = False
    ) -> Direction:
        return self.step_on_shards(R, states, counts, [r.shape for r in R], Split())

    def step_on_shards(
        self,
        R: Tensors,
        states: list[State],
        counts: list[int],
        shapes: Sequence[torch.Size],
        split: Split,
    ) -> Direction:
        """R [*, a, b], or [a]. On shards it sums the row and column means and the RMS."""
        squares = [wide(r) ** 2 + 1e-30 for r in R]
        fresh = [float(t) ** self.decay for t in counts]
        matrices = [i for i, r in enumerate(R) if r.dim() > 1]
        rows = {i: squares[i].sum(-1) for i in matrices}  # [*, a]
        sum_(list(rows.values()), split.columns)
        for i in matrices:
            states[i]["row"].lerp_(rows[i] / shapes[i][-1], fresh[i])
        columns = {i: squares[i].sum(-2) for i in matrices}  # [*, b]
        totals = {i: states[i]["row"].sum(-1, keepdim=True) for i in matrices}  # [*, 1]
        sum_([*columns.values(), *totals.values()], split.rows)
        N = []
        for i, r in enumerate(R):
            state = states[i]
            if r.dim() > 1:
                column = state["column"].lerp_(columns[i] / shapes[i][-2], fresh[i])
                row = state["row"] / (totals[i] / shapes[i][-2])
                N.append(r * row.rsqrt().unsqueeze(-1) * column.rsqrt().unsqueeze(-2))
            else:
                N.append(r * state["exp_avg_sq"].lerp_(squares[i], fresh[i]).rsqrt())
        lengths = [n.pow(2).sum() for n in N]
        sum_(lengths, split.every)
        for n, length, shape in zip(N, lengths, shapes, strict=True):
            n /= ((length / shape.numel()).sqrt() / self.clip).clamp(min=1.0)
        if self.beta1:
            weight = 1 - self.beta1
            N = [s["exp_avg"].lerp_(n, weight) for s, n in zip(states, N, strict=True)]
        return Direction(N, None, [1.0] * len(R))


@dataclass(frozen=True)
class Normalised(Inner):
    """Each row of R [*, r, n] scaled to length 1 (Dion); a zero row stays zero."""

    elementwise: ClassVar[bool] = False
    lines: ClassVar[bool] = True

    def init(self, R: Tensor) -> dict[str, Tensor]:
        return {}

    def step(
        self, R: Tensors, states: list[State], counts: list[int], fused: bool = False
    ) -> Direction:
        return Direction(each(unit_rows, R), None, [1.0] * len(R))

    def rotate(self, state: State, turn: Turn, count: int) -> None:
        pass  # nothing is remembered


@dataclass(frozen=True)
class Memoryless(Inner):
    """`scale` times sign(R), or times R: a rule without state (FRUGAL)."""

    kind: Literal["sign", "sgd"] = "sign"
    scale: float = 1.0

    def init(self, R: Tensor) -> dict[str, Tensor]:
        return {}

    def step(
        self, R: Tensors, states: list[State], counts: list[int], fused: bool = False
    ) -> Direction:
        N = [self.scale * (r.sign() if self.kind == "sign" else r) for r in R]
        return Direction(N, None, [1.0] * len(R))

    def rotate(self, state: State, turn: Turn, count: int) -> None:
        pass  # nothing is remembered


def unit_rows(R: Tensor) -> Tensor:
    """Rows of R [*, r, n] divided by their lengths; a zero row stays zero."""
    lengths = torch.linalg.vector_norm(wide(R), dim=-1, keepdim=True)
    return (wide(R) / torch.where(lengths > 0, lengths, 1.0)).to(R.dtype)


def zeros_like_each(tensors: Tensors) -> Tensors:
    """A zero tensor like each; in one allocation where all have the same shape."""
    first = tensors[0]
    if any(t.shape != first.shape for t in tensors):
        return [torch.zeros_like(t) for t in tensors]
    return list(first.new_zeros(len(tensors), *first.shape).unbind())


def each(function: Callable[[Tensor], Tensor], tensors: Tensors) -> Tensors:
    """Apply a function of matrices [*, a, b] to each; batched where all have the same shape."""
    if len(tensors) == 1 or any(t.shape != tensors[0].shape for t in tensors):
        return [function(t) for t in tensors]
    return list(function(torch.stack(tensors)).unbind())


def wide(t: Tensor) -> Tensor:
    """The tensor in fp32, or in fp64 if it is already."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def state_dtype(R: Tensor, choice: str) -> torch.dtype:
    """The dtype of moments: the gradient's own, or with "float32" at least fp32."""
    return torch.promote_types(R.dtype, torch.float32) if choice == "float32" else R.dtype
