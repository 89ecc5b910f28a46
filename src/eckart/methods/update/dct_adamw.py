"""DCT-AdamW: Adam in the directions of a fixed cosine basis that hold most of the gradient.

    A = G + E                           E is 0 without error feedback
    S = A Q;  idx = the r columns of S with the largest sums of magnitudes, ascending
    R = S[:, idx];   E = A - R Q[:, idx]^T
    M, V: the moments of R; a direction that stays keeps its own, one that is new starts at 0
    W = (1 - lr wd) W - lr  M / (1 - b1^t) / (sqrt(V / (1 - b2^t)) + eps)  Q[:, idx]^T

Nothing is decomposed: one Q serves all matrices of a width, each matrix stores r integers, and
the directions are chosen again at every step. fira (search=dct) and frugal (inside=dct) can use
them, too. With inner=trion it is the paper's Trion instead: momentum of the weights' size,
orthogonalised in r directions; that saves time, not memory.

Take it where GaLore's decompositions cost too much: r directions of a 512 x 512 matrix are found
in 2.5 ms, by an SVD in 36 (claims/dct_adamw.py). They hold less of the gradient, there 27 % where
singular ones hold 88 %, and the loss is 1.98 nats where those give 1.90. Take Fira to move
outside the subspace without an E of the weights' size. Where weights are sharded a choice on the
left sends columns of the gradient from process to process: take a larger `every` there.

Source: I. Modoranu et al., "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive
Optimization of Large Language Models", arXiv 2505.17967, Alg. 1 (DCT-AdamW). We differ from
its code in four points: moments always follow their direction (its default leaves them in
place while the directions below them change); error feedback in 4 and 8 bits uses all
levels; the basis is DCT-II, whose rows have a fast transform (its default is DCT-III, here
basis="dct3"); with `every` above 1 a choice lasts exactly that many steps.

m out, n in, r rank, Q [n, n] (the left side, where m < n, is the transpose of all this).
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from eckart.errors import UsageError
from eckart.optim import Adam, ErrorFeedback, Momentum, Orthogonal, Refresh, Rule, Selected
from eckart.recipe.method import Paper, Update


@dataclass(frozen=True)
class DCTAdamW(Update):
    """Adam in r cosine directions per matrix, chosen again at every step."""

    rank: Annotated[int, Ge(1)] = 128
    """Number of directions of the basis. Paper: 32 to 512. At most min(m, n)."""

    every: Annotated[int, Ge(1)] = 1
    """Steps between two choices of directions. Paper: 1."""

    basis: Literal["dct2", "dct3", "hadamard", "random"] = "dct2"
    """The fixed basis: rows or columns of the DCT-II matrix (code: columns, dct3), a Hadamard
    matrix (powers of two only), or a random orthogonal one."""

    route: Literal["auto", "matmul", "fft"] = "auto"
    """How dct2 coordinates are computed: one product, or n log n by a fast transform; auto takes
    that on a CPU from 256 directions on, where it is three to seven times as fast."""

    ell_norm: Literal[1, 2] = 1
    """Directions are ranked by sums of magnitudes (1) or of squares (2) of their coordinates.
    Code: 1."""

    inner: Literal["adam", "trion"] = "adam"
    """The rule in the chosen directions. trion keeps one momentum of the weights' size, chooses
    directions by it and orthogonalises its projection; it has no second moment. Paper: a
    learning rate of 0.02."""

    momentum: Annotated[float, Ge(0), Lt(1)] = 0.95
    """trion only: decay of the projected part of the momentum. Paper: 0.95."""

    step_scale: Literal["one", "ratio", "tall", "rms"] = "tall"
    """trion only: the step's scale for an m x n matrix: 1, sqrt(m / n), sqrt(max(1, m / n)), or
    0.2 sqrt(max(m, n))."""

    error_feedback: bool = False
    """Keep the part of the gradient outside the chosen directions and add it to the next
    gradient. Needs memory of the weights' size. Paper: on; code: off."""

    error_bits: Literal[32, 8, 4] = 32
    """Bits per weight of that error. Paper: 8 or 4."""

    on_refresh: Literal["rotate", "keep", "reset"] = "rotate"
    """The moments at a new choice of directions: they follow their direction (paper), keep their
    position, or are reset."""

    age_correct: bool = False
    """Bias-correct each direction's moments by the steps since it was chosen. Otherwise the first
    step of a new direction is about three times too long. Paper: off."""

    side: Literal["auto", "reverse", "left", "right"] = "auto"
    """Which side is projected: auto the short one, reverse the long one."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and of the second moment. Code: Adam's."""

    eps: Annotated[float, Gt(0)] = 1e-8
    """Added to the root of the second moment. Code: 1e-8."""

    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay, multiplied by the learning rate."""

    state_dtype: Literal["param", "float32"] = "param"
    """The dtype of the moments. Code: the parameter's."""

    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How updated bf16 weights are rounded: to nearest, or stochastically, so that updates below
    bf16's resolution count on average."""

    wants: ClassVar = "matrices"
    default_lr: ClassVar = {1e-4: {"inner": "adam"}, 1e-3: {"inner": "trion"}}
    scratch_lr: ClassVar = {1e-3: {"inner": "adam"}, 0.02: {"inner": "trion"}}
    mission: ClassVar = True
    paper: ClassVar = Paper(
        "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large "
        "Language Models",
        "https://arxiv.org/abs/2505.17967",
        "ICLR 2026",
    )

    def rule(self) -> Rule:
        trion = self.inner == "trion"
        if trion and self.error_feedback:
            raise UsageError(
                "trion has its error feedback in its momentum",
                [("update.error_feedback", "true"), ("update.inner", "trion")],
                "Leave update.error_feedback out.",
            )
        error = ErrorFeedback(self.error_bits) if self.error_feedback else None
        return Rule(
            inner=Orthogonal() if trion else self.adam(),
            vectors=self.adam() if trion else None,
            projector=Selected(
                self.rank, self.side, kind=self.basis, norm=self.ell_norm, route=self.route
            ),
            refresh=Refresh(self.every, self.on_refresh),
            source=Momentum(self.momentum) if trion else error,
            scale_by=self.step_scale if trion else "one",
            weight_decay=self.weight_decay,
            rounding=self.rounding,
        )

    def adam(self) -> Adam:
        return Adam(
            self.betas, self.eps, state_dtype=self.state_dtype, age_correct=self.age_correct
        )
