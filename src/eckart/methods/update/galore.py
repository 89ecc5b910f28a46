"""GaLore: train all weights, but keep Adam's moments of a rank-r projection of each gradient.

    every T steps   U, s, Vt = svd(G);  P = the first r rows of Vt  (of U^T where m < n)
    R = G P^T                           [m, r]: the long side and r directions of the short
    N = M / (sqrt(V) + eps)             Adam's moments M, V of R, not of G
    W = (1 - lr wd) (W - lr sqrt(1 - b2^t) / (1 - b1^t) alpha N P)

The weights stay dense and of full rank: each period of T steps updates them in another
subspace. Take it to pretrain or to fine-tune everything when Adam's two moments do not fit: at
a quarter of the width its state is 0.45 of Adam's and its loss in claims/galore.py 1.80 nats,
Adam's 2.03. At a sixteenth (1.96) take Fira or LDAdam. Take LoRA when a few numbers per matrix
will do.

Source: J. Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
Projection", ICML 2024, Alg. 2, and its code, which we follow where they disagree (a square
matrix is projected on the right; epsilon is not bias-corrected). We differ in four points:
signs of singular vectors are fixed, so that runs repeat on other hardware; refreshes are
spread over the steps; a gradient that is zero or not finite changes no basis; and the state
is tensors and numbers alone, so that a run resumes in the middle of a period.

m out, n in, r rank; the learning rate is about ten times Adam's, which alpha compensates.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le

from eckart.optim import (
    SEARCHES,
    Adafactor,
    Adam,
    EightBit,
    Inner,
    Packed,
    Projector,
    Refresh,
    Rule,
)
from eckart.recipe.method import Paper, Update


@dataclass(frozen=True)
class GaLore(Update):
    """Adam on gradients projected to a subspace that is recomputed every few hundred steps."""

    rank: Annotated[int, Ge(1)] = 128
    """Rank of the projection of the short side. Paper: 128 (60M parameters), 256, 512,
    1024 (7B) to pretrain; 4 to 8 to fine-tune. At most min(m, n). Above two thirds of that a
    square matrix has more state than with Adam: see skip_if_no_saving."""

    every: Annotated[int, Ge(1)] = 200
    """Steps between two decompositions of one matrix. Paper: 200; 500 for 7B and GLUE."""

    scale: Annotated[float, Gt(0)] = 0.25
    """alpha, on the update of projected matrices. Paper: 0.25 to pretrain, 2 to 4 to
    fine-tune."""

    side: Literal["auto", "reverse", "left", "right", "both"] = "auto"
    """Which side is projected: auto the short one, reverse the long one."""

    on_refresh: Literal["keep", "rotate", "reset"] = "keep"
    """The moments at a new basis: kept as they are (paper), rotated into it, or reset."""

    search: Literal["auto", "svd", "gram", "randomised", "iteration"] = "auto"
    """How a basis is found. Paper: svd. gram: the same subspace by an eigendecomposition, in
    less time; randomised: approximately the same, by randomised SVD; iteration: the old basis
    after one power iteration. auto: svd, and where the projected side has 1024 or more,
    randomised with three products, ten times as fast; it has 0.97 to 0.999 of the best basis's
    energy, less where a gradient is pure noise."""

    inner: Literal["adam", "adam8bit", "adafactor"] = "adam"
    """The rule in the subspace: Adam, Adam with its moments in 8 bits (32 where a matrix has
    fewer than 4096 of them), or Adafactor. Paper: all three."""

    stagger: bool = True
    """Spread the refreshes of the matrices over the steps by a hash of their names. Paper:
    all at once."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and of the second moment. Paper: Adam's."""

    eps: Annotated[float, Gt(0)] = 1e-6
    """Added to the root of the second moment. Code: 1e-6."""

    eps_mode: Literal["hf", "torch"] = "hf"
    """Where epsilon and the weight decay are applied: hf as published (epsilon outside the bias
    correction, decay after the update), torch as in torch.optim.AdamW."""

    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay, multiplied by the learning rate. Paper: 0."""

    skip_if_no_saving: bool = False
    """Use plain Adam on matrices where the projected state would not be smaller."""

    basis_dtype: Literal["param", "float32", "int4"] = "param"
    """How the basis is stored. Code: as the parameter; Q-GaLore: int4, a quarter of bf16."""

    adaptive: Annotated[float, Gt(0), Le(1)] | None = None
    """Double a matrix's own `every` whenever the mean cosine between its successive leading
    directions, over five refreshes, is at least this. Q-GaLore: 0.4. none: one `every` for all."""

    state_dtype: Literal["param", "float32"] = "param"
    """The dtype of the moments. Code: the parameter's."""

    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How updated bf16 weights are rounded: to nearest, or stochastically, so that updates below
    bf16's resolution count on average (Q-GaLore). Paper: nearest."""

    wants: ClassVar = "matrices"
    default_lr: ClassVar = 5e-4
    scratch_lr: ClassVar = 0.01
    mission: ClassVar = True
    paper: ClassVar = Paper(
        "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
        "https://arxiv.org/abs/2403.03507",
        "ICML 2024",
    )

    def rule(self) -> Rule:
        return Rule(
            inner=self.inner_rule(),
            projector=self.projector(),
            refresh=Refresh(self.every, self.on_refresh, self.stagger, self.adaptive),
            scale=self.scale,
            weight_decay=self.weight_decay,
            decay="before" if self.eps_mode == "torch" or self.inner == "adafactor" else "after",
            rounding=self.rounding,
        )

    def projector(self) -> Projector:
        search = SEARCHES[self.search]
        if self.basis_dtype == "int4":
            return Packed(search(self.rank, self.side, "param", self.skip_if_no_saving))
        return search(self.rank, self.side, self.basis_dtype, self.skip_if_no_saving)

    def inner_rule(self) -> Inner:
        if self.inner == "adafactor":
            return Adafactor()
        adam = Adam(self.betas, self.eps, self.eps_mode, self.state_dtype)
        return EightBit(adam) if self.inner == "adam8bit" else adam
