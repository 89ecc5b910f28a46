"""Bone: one small block of trained numbers, repeated over the whole matrix.

    tile   dW[o, i] = D[i mod r, o]                D [r, m]         y = W x + D^T fold(x)
    mini   dW[o, i] = M[i mod r, o mod q]          M [r, q]
    bat    dW_ij = (W_ij + I) B_i = W_ij B_i + B_i, in blocks of r x r     B [m/r, r, r]

fold(x)[k] is the sum of x[k], x[k + r], x[k + 2r], ... All start at zero, without random
numbers and without a scale. Later versions of the paper call tile MiSS; "Bone" in its first
versions is bat.

Tile is LoRA whose A is frozen at the fold S [r, n], S[k, i] = 1 where i mod r = k, with
B = D^T: the backward pass keeps fold(x), r numbers per token, where LoRA keeps x. Mini folds
the output too: rank at most min(r, q). Bat reaches full rank and depends on W, at the compute
of full fine-tuning: its backward pass needs dL/dW, here a few block rows at a time.

Take tile when activations fill the memory. Where they do not, take LoRA at about half the rank,
which trains as many numbers: it ends at 1.48 nats in claims/bone.py, tile and bat at 1.49.

Source: J. Kang, "Bone: Block Affine Transformation as Parameter Efficient Fine-tuning
Methods for Large Language Models", 2024, eq. 4 and 5 (bat); version 4 and PEFT (tile, mini).
We differ in two points: what does not divide by r or q is padded with zeros and cropped, and
W in bat is always the base's own.

m out, n in, r rank, q numbers per row of mini, * any leading dimensions (fused experts).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from eckart.errors import FileError, UsageError
from eckart.linear import Site, Term, by_expert, plain_mm
from eckart.linear.peers import once
from eckart.linear.products import (
    add_product,
    emulated,
    fitting,
    product,
    shaped,
    within_sum,
)
from eckart.recipe import Cost, Paper, Weights


def fold(x: Tensor, r: int, dtype: torch.dtype) -> Tensor:
    """Sum every r-th entry: x [.., n] -> [.., r].

    Accumulated in fp32 at least (n / r terms in bf16 would lose 3 to 4 bits), returned in
    `dtype`. No copy of x is made or kept for the backward pass.
    """
    wide = torch.promote_types(dtype, torch.float32)
    whole = x.shape[-1] // r * r
    h = x[..., :whole].unflatten(-1, (-1, r)).sum(-2, dtype=wide)
    if whole < x.shape[-1]:
        rest = x[..., whole:].to(wide)
        h = h + F.pad(rest, (0, r - rest.shape[-1]))
    return h.to(dtype)


def unfold(h: Tensor, n: int) -> Tensor:
    """Repeat to n entries, the transpose of `fold`: h [.., r] -> [.., n], h[i mod r] at i."""
    r = h.shape[-1]
    if r == n:
        return h
    repeats = -(-n // r)
    return h.unsqueeze(-2).expand(*h.shape[:-1], repeats, r).flatten(-2)[..., :n]


def fold_matrix(r: int, n: int, like: Tensor) -> Tensor:
    """S [r, n] with fold(x) = S x."""
    return unfold(torch.eye(r, dtype=like.dtype, device=like.device), n)


class Tile(Term):
    """M [*, r, q] repeated over inputs and outputs: dense()[o, i] = M[i mod r, o mod q]."""

    home: Any = None  # the layer that it is part of

    def __init__(self, M: Tensor, m: int, n: int, dropout: float = 0.0):
        super().__init__()
        self.M = nn.Parameter(M)  # [*, r, q]
        self.m, self.n, self.dropout = m, n, dropout

    def forward(self, x: Tensor) -> Tensor:
        h = fold(self.dropped(x), self.M.shape[-2], self.M.dtype)  # [*, t, r]
        return unfold(self.mm(h, self.M), self.m)

    def bind(self, shared: Mapping[str, nn.Module], home: nn.Module, param: str) -> None:
        self.__dict__["home"] = home

    def with_base(self, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor | None:
        if not fitting(x, W, self.M) or (self.dropout and self.training):
            return None
        peers = None if self.home is None else self.home._sum.peers
        r, dtype = self.M.shape[-2], self.M.dtype
        h = once(peers, x, (r, dtype), lambda: fold(x.detach(), r, dtype))
        return Folded.apply(x, h, W.detach(), bias, self.M)

    def back(self, x: Tensor) -> Tensor:  # [*, t, m] -> [*, t, n]
        h = fold(x, self.M.shape[-1], self.M.dtype)  # [*, t, q]
        return unfold(self.mm(h, self.M.mT), self.n)

    def columns(self, ids: Tensor) -> Tensor:  # [..] -> [.., m]
        return unfold(F.embedding(ids % self.M.shape[-2], self.M), self.m)

    def dense(self) -> Tensor:  # [*, m, n]
        return unfold(unfold(self.M, self.m).mT, self.n)

    def factors(self) -> tuple[Tensor, Tensor]:
        """LoRA with folds: B = D^T, A = S; where q < r, B the fold and A = M^T S."""
        r, q = self.M.shape[-2:]
        leading = self.M.shape[:-2]
        if q < r:
            B = fold_matrix(q, self.m, self.M).mT.expand(*leading, self.m, q)
            return B, unfold(self.M.mT, self.n)
        A = fold_matrix(r, self.n, self.M).expand(*leading, r, self.n)
        return unfold(self.M, self.m).mT, A

    def extra_repr(self) -> str:
        return f"{self.m} x {self.n}, rank {self.M.shape[-2]}, numbers per row {self.M.shape[-1]}"


class Folded(torch.autograd.Function):
    """x W^T + bias + unfold(h M) for h = fold(x) [.., r], which is all that is kept of x.

    W [m, n] and bias [m] are frozen, M [r, q] is trained.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, h: Tensor, W: Tensor, bias: Tensor | None, M: Tensor
    ) -> Tensor:
        ctx.save_for_backward(h, W, M)
        y = shaped(F.linear(x, W, bias), x)
        if M.shape[-1] < W.shape[0]:
            return y.add_(unfold((h @ M).to(y.dtype), W.shape[0]))
        low = within_sum(x, M)
        add_product(y.view(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]).to(low), M.to(low))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        h, W, M = ctx.saved_tensors
        (m, n), q, dx = W.shape, M.shape[-1], None
        dz = fold(dy, q, M.dtype) if q < m else dy  # [.., q]
        if ctx.needs_input_grad[0]:
            dx = product(dy, W)
            dx += unfold(product(dz, M.mT).to(dx.dtype), n)
        dM = h.reshape(-1, h.shape[-1]).mT @ dz.reshape(-1, q).to(M.dtype)
        return dx, None, None, None, dM


class BlockAffine(Term):
    """(W_ij + I) B_i in blocks, B [*, m/r, r, r], W the site's own frozen matrix."""

    def __init__(self, B: Tensor, m: int):
        super().__init__()
        self.B = nn.Parameter(B)  # [*, m/r, r, r]
        self.m = m

    def bind(self, shared: Mapping[str, nn.Module], home: nn.Module, param: str) -> None:
        self.__dict__["home"] = home
        self.param = param

    def base(self) -> Tensor:  # [*, m, n]
        """The frozen matrix that the blocks are taken from."""
        home: Any = self.__dict__["home"]
        return home.matrix(self.param).detach()

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_blocks(x, self.base(), self.B)

    def apply_blocks(self, x: Tensor, W: Tensor, B: Tensor) -> Tensor:
        """x [*, t, n] -> [*, t, m]; the product of the precision, where one is set."""
        if self.mm is plain_mm and W.ndim == 2:
            return Recomputed.apply(x if fitting(x, x, B) else x.to(B.dtype), W, B)
        return self.mm(x.to(B.dtype), affine(W, B).mT)

    def with_base(self, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor | None:
        if not fitting(x, W, self.B):
            return None
        return Recomputed.apply(x, W.detach(), self.B, True, bias)

    def grouped(self, x: Tensor, offsets: list[int]) -> Tensor:
        W = self.base()
        return by_expert(x, offsets, lambda x, e: self.apply_blocks(x, W[e], self.B[e]))

    def dense(self) -> Tensor:  # [*, m, n]
        return affine(self.base(), self.B)

    def extra_repr(self) -> str:
        return f"{self.B.shape[-3]} blocks of {self.B.shape[-1]}"


def in_blocks(W: Tensor, r: int) -> Tensor:
    """W [*, m, n] zero-padded to whole blocks: [*, m/r, r n/r, r], without a copy if r divides.

    Entry [i, a n/r + j, k] is row a, column k of block W_ij.
    """
    m, n = W.shape[-2:]
    if m % r or n % r:
        W = F.pad(W, (0, -n % r, 0, -m % r))
    return W.unflatten(-1, (-1, r)).unflatten(-3, (-1, r)).flatten(-3, -2)


def affine(W: Tensor, B: Tensor, whole: bool = False) -> Tensor:
    """dW [*, m, n] with dW_ij = (W_ij + I) B_i: one batched product. B [*, m/r, r, r].

    The `whole` map W + dW is W_ij (I + B_i) + B_i: exactly W where B is zero.
    """
    (m, n), r = W.shape[-2:], B.shape[-1]
    right = B + torch.eye(r, dtype=B.dtype, device=B.device) if whole else B
    products = in_blocks(W.to(B.dtype), r) @ right  # [*, m/r, r n/r, r]
    columns = -(-n // r)
    blocks = products.unflatten(-2, (r, columns)).add_(B.unsqueeze(-2))  # [*, m/r, r, n/r, r]
    return blocks.flatten(-2).flatten(-3, -2)[..., :m, :n]


def affine_gradient(W: Tensor, G: Tensor, r: int) -> Tensor:
    """sum_j (W_ij + I)^T G_ij for G = dL/ddW: W, G [m, n] -> [m/r, r, r]."""
    G = in_blocks(G, r)
    own = G.unflatten(-2, (r, -1)).sum(-2)
    return in_blocks(W.to(G.dtype), r).mT @ G + own


class Recomputed(torch.autograd.Function):
    """x affine(W, B)^T, which forms dW again in the backward pass and never stores all of G.

    x [.., t, n], W [m, n], B [m/r, r, r]. Saved: x and references to W and B. `whole` adds the
    base's x W^T + bias: in the same products if all have one dtype, or if x's is emulated and B is
    no longer zero (until then the base's own product is used, for the same bits as the base).
    """

    ROWS = 1024  # of G at a time: a few large products, at most ROWS x n numbers

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        W: Tensor,
        B: Tensor,
        whole: bool = False,
        bias: Tensor | None = None,
    ) -> Tensor:
        ctx.save_for_backward(x, W, B)
        ctx.whole = whole
        joined = whole and (x.dtype == B.dtype or (emulated(x) and has_moved(B)))
        y = product(x, affine(W, B, joined).mT)
        if whole and not joined:
            return y + F.linear(x, W, bias)
        return y if bias is None else y + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, W, B = ctx.saved_tensors
        r, dx = B.shape[-1], None
        if ctx.needs_input_grad[0]:
            joined = ctx.whole and (dy.dtype == B.dtype or emulated(dy))
            dx = product(dy, affine(W, B, joined))
            if ctx.whole and not joined:
                dx += dy @ W
        flat_y, flat_x = (t.reshape(-1, t.shape[-1]).to(B.dtype) for t in (dy, x))
        step = max(1, Recomputed.ROWS // r) * r  # whole blocks
        parts = [
            affine_gradient(W[a : a + step], flat_y[:, a : a + step].mT @ flat_x, r)
            for a in range(0, W.shape[0], step)
        ]
        return dx, None, torch.cat(parts), None, None


def has_moved(B: Tensor) -> bool:
    """Is B nonzero? False if unknown: while a graph is captured, or for tensors without values."""
    unknown = torch.compiler.is_compiling() or isinstance(B, FakeTensor)
    return not unknown and bool(B.any())


@dataclass(frozen=True)
class Bone(Weights):
    """Trains one block per matrix, repeated over it; the base stays as it is."""

    rank: Annotated[int, Ge(1)] = 64
    """r, the size of the block. Paper: 64; cut to n where a map is narrower. A multiple of
    the head width sums all heads into one."""

    mode: Literal["tile", "mini", "bat"] = "tile"
    """tile: m r numbers; mini: r mini_rank numbers; bat: m r numbers, guided by W."""

    mini_rank: Annotated[int, Ge(1)] = 64
    """q, numbers per row in mini; at most m. Ignored by the other modes."""

    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of inputs dropped before the fold in training (tile and mini)."""

    base: ClassVar = "frozen"
    offers: ClassVar = ()
    mission: ClassVar = True
    peft_type: ClassVar = "MISS"
    default_lr: ClassVar = 1e-3
    paper: ClassVar = Paper(
        "Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for LLMs",
        "https://arxiv.org/abs/2409.15371",
    )
    promises: ClassVar = {
        "starts_at_base": {},
        "restores_base": {},
        "merges": {},
        "exports_low_rank": {"mode": ("tile", "mini")},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "bat" and self.dropout:
            raise UsageError(
                "bone: bat has no dropout",
                [("mode = bat", f"dropout = {self.dropout}")],
                "Leave dropout out, or take mode=tile.",
            )

    def block_shape(self, m: int, n: int) -> tuple[int, ...]:
        """The shape of the trained block of an [m, n] matrix."""
        r = min(self.rank, n)
        if self.mode == "bat":
            return -(-m // r), r, r
        return r, min(self.mini_rank, m) if self.mode == "mini" else m

    def build_one(self, site: Site) -> Mapping[str, nn.Module]:
        m, n = site.shape
        return {"bone": self.term(torch.zeros(*site.leading, *self.block_shape(m, n)), m, n)}

    def term(self, block: Tensor, m: int, n: int) -> Term:
        """The term that repeats a block."""
        return BlockAffine(block, m) if self.mode == "bat" else Tile(block, m, n, self.dropout)

    def to_peft(
        self, site: Site, parts: Mapping[str, nn.Module]
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        term, (m, n) = parts["bone"], site.shape
        r = min(self.rank, n)
        # PEFT has one r for all sites, Linear alone, and whole blocks.
        divides = {"tile": True, "mini": m % self.mini_rank == 0, "bat": m % r == 0 == n % r}
        if site.kind != "linear" or site.overrides or r != self.rank or not divides[self.mode]:
            return None
        block = term.M if isinstance(term, Tile) else term.B
        config = {
            "r": r,
            "mini_r": self.mini_rank if self.mode == "mini" else 1,
            "miss_dropout": self.dropout,
            "init_weights": True if self.mode == "tile" else self.mode,
        }
        return {"miss_block": block}, config  # type: ignore[dict-item]

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self | None:
        init = config.get("init_weights", True)
        mode: Any = init if init in ("bat", "mini") else "tile"  # False: tile, drawn at random
        return cls(
            rank=config.get("r", 64),
            mode=mode,
            mini_rank=config.get("mini_r", 1) if mode == "mini" else 64,
            dropout=0.0 if mode == "bat" else float(config.get("miss_dropout", 0.0)),
        )

    def parts_from_peft(self, site: Site, tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
        block, expected = tensors["miss_block"], self.block_shape(*site.shape)
        if block.shape != expected:
            fault = f"shape {list(block.shape)}, expected {list(expected)}"
            raise FileError("the adapter does not fit the model", [(site.path, fault)])
        return {"bone": self.term(block, *site.shape)}

    def cost(self, m: int, n: int) -> Cost:
        shape = self.block_shape(m, n)
        block = torch.Size(shape).numel()
        if self.mode == "bat":  # and 2 m n r once per pass, to build dW
            return Cost(parameters=block, flops_per_token=2 * m * n)
        return Cost(parameters=block, flops_per_token=n + 2 * block)
