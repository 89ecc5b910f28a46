"""Low-precision storage: moments in 8 bits, bases in 4, errors in 8 or 4, bf16 weights.

Moments have a code per element and a scale per block: 256 elements of a line, or a whole shorter
line. No block crosses lines, so that blocks are the same on shards of rows. The codes are those
of dynamic tree quantisation (Dettmers et al. 2022), dense near 1 and spread over seven decades
below, as moments are. A moment takes 1 byte per element and 4 per block between steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from eckart.errors import UsageError
from eckart.optim.inner import Adam, Direction, Inner
from eckart.optim.part import State, Tensors
from eckart.optim.project import Basis, Enough, Found, Projector, Search, Subspace, Turn

BLOCK = 256
SMALLEST = 4096  # elements; smaller tensors stay in 32 bits, as in bitsandbytes
SIGNED = {"exp_avg": True, "exp_avg_sq": False}


@cache
def levels(signed: bool) -> Tensor:
    """The 256 values in [-1, 1] (signed) or [0, 1] that the codes represent, ascending.

    Decade i = 0..6 below 1, from 10^-(i + 1) to 10^-i, has 2^(6 - i) positive values, twice as
    many if unsigned: the midpoints of equal intervals.
    """
    positive = []
    for i in range(7):
        count = 2**i if signed else 2 ** (i + 1)
        edges = torch.linspace(0.1, 1.0, count + 1, dtype=torch.float64)
        positive.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6))
    values = torch.cat(positive)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return torch.cat([values, ends, *[-values] * signed]).sort().values.float()


def quantise(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """uint8 codes of x's shape [a, *], and the largest magnitude of each block, fp32 [a, blocks].

    A positive second moment is never rounded to 0, as the step would then divide by epsilon.
    """
    lines = x.float().flatten(1)  # [a, n]
    n, size = lines.shape[1], block_size(lines.shape[1])
    blocks = torch.nn.functional.pad(lines, (0, -n % size)).unflatten(1, (-1, size))
    scale = blocks.abs().amax(-1)
    unit = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    values = levels(signed).to(x.device)
    codes = torch.bucketize(unit, (values[:-1] + values[1:]) / 2)
    if not signed:
        codes = torch.where(blocks > 0, codes.clamp(min=1), codes)
    return codes.to(torch.uint8).flatten(1)[:, :n].reshape(x.shape), scale


def dequantise(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """The fp32 values of codes and scales from `quantise`."""
    lines = levels(signed).to(codes.device)[codes.flatten(1).int()]  # [a, n]
    n, size = lines.shape[1], block_size(lines.shape[1])
    return (lines * scale.repeat_interleave(size, 1)[:, :n]).view(codes.shape)


def block_size(n: int) -> int:
    """The number of elements that share a scale in a line of n."""
    return min(BLOCK, n)


@dataclass(frozen=True)
class EightBit(Inner):
    """Adam with its moments stored in 8 bits between steps; vectors and small tensors keep 32."""

    inner: Adam = field(default_factory=Adam)
    elementwise: ClassVar[bool] = False
    lines: ClassVar[bool] = True

    def init(self, R: Tensor) -> dict[str, Tensor]:
        if R.numel() < SMALLEST or R.dim() < 2:
            return self.inner.init(R)
        n, state = R[0].numel(), {}
        for name, signed in SIGNED.items():
            zero = int(levels(signed).abs().argmin())
            state[name] = torch.full_like(R, zero, dtype=torch.uint8)
            state[f"{name}_scale"] = R.new_zeros(
                len(R), -(-n // block_size(n)), dtype=torch.float32
            )
        return state

    def step(
        self, R: Tensors, states: list[State], counts: list[int], fused: bool = False
    ) -> Direction:
        wide = [self.widened(state) for state in states]
        R = [r.to(w["exp_avg"].dtype) for r, w in zip(R, wide, strict=True)]
        direction = self.inner.step(R, wide, counts, fused)
        for state, moments in zip(states, wide, strict=True):
            self.store(state, moments)
        return direction

    def rotate(self, state: State, turn: Turn, count: int) -> None:
        moments = self.widened(state)
        self.inner.rotate(moments, turn, count)
        self.store(state, moments)

    def reset(self, state: State) -> None:
        moments = self.widened(state)
        self.inner.reset(moments)
        self.store(state, moments)

    def widened(self, state: State) -> State:
        """The dequantised moments; moments stored in 32 bits are the state tensors themselves."""
        if "exp_avg_scale" not in state:
            return {name: state[name] for name in SIGNED}
        return {k: dequantise(state[k], state[f"{k}_scale"], s) for k, s in SIGNED.items()}

    def store(self, state: State, moments: State) -> None:
        """Quantise the moments into the state; nothing to do where they are stored in 32 bits."""
        if "exp_avg_scale" in state:
            for name, signed in SIGNED.items():
                codes, scale = quantise(moments[name], signed)
                state[name].copy_(codes)
                state[f"{name}_scale"].copy_(scale)


def rounded_by_chance(x: Tensor, seed: int) -> Tensor:
    """x [*] fp32 rounded stochastically to bf16, exact in the mean, so that updates smaller than
    half a bf16 step are not lost.

    16 random bits are added below the bits that stay; the carry rounds the magnitude up.
    """
    noise = torch.empty(x.shape, dtype=torch.int32, device=x.device)
    noise.random_(0, 2**16, generator=torch.Generator(x.device).manual_seed(seed))
    bits = noise.add_(x.contiguous().view(torch.int32)).bitwise_and_(-(2**16))
    rounded = torch.where(x.isfinite(), bits.view(torch.float32), x)  # a NaN's bits must stay
    return rounded.bfloat16()


def pack_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantise each row of x [*, m, n] to 8 or 4 bits between its least and greatest entry.

    Codes uint8 [*, m, n], or [*, m, ceil(n / 2)] with two 4-bit codes a byte, low half first;
    ends fp32 [*, m, 2]. Rounded to nearest: the error is at most (greatest - least) / 510
    (/ 30 in 4 bits).
    """
    x = x.float()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    width = torch.where(high > low, high - low, 1.0)  # a constant row is its own least entry
    codes = ((x - low) / width * (2**bits - 1)).round().to(torch.uint8)
    if bits == 4:
        codes = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    return codes, torch.cat([low, high], -1)


def unpack_rows(codes: Tensor, ends: Tensor, bits: int, n: int) -> Tensor:
    """The fp32 rows [*, m, n] that `pack_rows` stored."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)[..., :n]
    low, high = ends[..., :1], ends[..., 1:]
    return low + codes * ((high - low) / (2**bits - 1))


@dataclass(frozen=True)
class Packed(Projector):
    """A basis stored in 4 bits (Q-GaLore), each direction quantised between its least and its
    greatest entry. The dequantised basis is orthonormal to a few per cent.

    Directions are stored as rows, codes [*, r, ceil(n / 2)] and ends [*, r, 2], whole on every
    process.
    """

    inner: Subspace
    names: ClassVar[tuple[str, ...]] = ("left_codes", "left_ends", "right_codes", "right_ends")
    derived: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not set(self.inner.names) <= {"left", "right"}:
            raise UsageError(
                "only a basis that was searched for is stored in 4 bits",
                [("projector", type(self.inner).__name__)],
                "Leave basis_dtype out: this one takes almost nothing.",
            )

    def takes(self, shape: Sequence[int], leading: int) -> bool:
        return self.inner.takes(shape, leading)

    def ranks(self, m: int, n: int) -> tuple[int, int]:
        return self.inner.ranks(m, n)

    def init(self, W: Tensor) -> Found:
        return pack_basis(self.inner.init(W))

    def basis(self, state: Mapping[str, Tensor], like: Tensor, size: tuple[int, int]) -> Basis:
        found = {}
        for side, length in zip(("left", "right"), size, strict=True):
            if f"{side}_codes" in state:
                codes, ends = state[f"{side}_codes"], state[f"{side}_ends"]
                rows = unpack_rows(codes, ends, 4, length).to(like.dtype)
                found[side] = rows.mT if side == "left" else rows
        return Basis(found.get("left"), found.get("right"))

    def find(self, search: Search) -> Found:
        old = self.basis(search.old, search.G, search.size)._asdict()
        plain = {side: t for side, t in old.items() if t is not None}
        return pack_basis(self.inner.find(replace(search, old=plain)))

    def from_shards(self, first: bool, size: tuple[int, int]) -> Enough:
        return self.inner.from_shards(first, size)

    def from_gram(self, first: bool, size: tuple[int, int]) -> bool:
        return self.inner.from_gram(first, size)

    def stored(self, found: Found) -> Found:
        return pack_basis(found)

    def turn(
        self, old: Mapping[str, Tensor], new: Mapping[str, Tensor], size: tuple[int, int]
    ) -> Turn:
        like = torch.empty(0)
        before, after = (self.basis(state, like, size)._asdict() for state in (old, new))
        sides = [side for side, t in before.items() if t is not None]
        return self.inner.turn({s: before[s] for s in sides}, {s: after[s] for s in sides}, size)


def pack_basis(found: Found) -> Found:
    """Quantise the parts of a basis to 4 bits."""
    packed: Found = {}
    for side, t in found.items():
        codes, ends = pack_rows(t.mT if side == "left" else t, 4)
        packed |= {f"{side}_codes": codes, f"{side}_ends": ends}
    return packed
