"""Fira: GaLore that also applies the part of the gradient outside its subspace.

    R = G P^T                            as GaLore; N is Adam's direction for R, [m, r]
    phi_j = |N_j| / |R_j|                the factor by which Adam scaled row j
    S = phi (G - c R P)                  the rest of G, scaled by the same factor
    S = S / q                            so that |S| grows by at most 1 % a step
    W -= lr sqrt(1 - b2^t) / (1 - b1^t) (alpha N P + S)

The state is GaLore's and one number per matrix, and the update has full rank. Take it where
GaLore would need a large rank: in claims/fira.py its loss at an eighth of the width is 1.79 nats,
with 0.32 of Adam's state, where GaLore's is 1.87 there and 1.80 at a quarter. Take GaLore where
a step's time counts: Fira's is up to a third longer (benchmarks/results/optim_fira.json).

Source: X. Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
Constraint?", arXiv 2410.01623, Alg. 1, and its code. The paper has c = 1, the code, with
which its numbers were made, c = alpha; we follow the code unless `center` says otherwise. We
differ from it in three points: a zero gradient does not change the limiter's state (in the code
the residual is then almost zero for a thousand steps); S is never formed, since phi scales rows,
which the projection does not mix; and as in galore.py, bases have fixed signs and state is
tensors alone. As in the code, the limiter acts in every run's first steps, in which N grows.

m out, n in, r rank; where m < n everything is transposed, and rows are columns.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt

from eckart.optim import SEARCHES, Adam, NormGrowth, Refresh, Rescaled, Rule, Selected
from eckart.recipe.method import Paper, Update


@dataclass(frozen=True)
class Fira(Update):
    """Adam in a subspace, and SGD on the rest of the gradient with Adam's scale per row."""

    rank: Annotated[int, Ge(1)] = 128
    """Rank of the projection of the short side. Paper: as GaLore; 64 is enough for 7B."""

    every: Annotated[int, Ge(1)] = 200
    """Steps between two decompositions of one matrix. Paper: 200; 500 for 7B."""

    scale: Annotated[float, Gt(0)] = 0.25
    """alpha, on the part inside the subspace. Paper: 0.25 up to 350M parameters, then
    0.0625."""

    gamma: Annotated[float, Gt(1)] | None = 1.01
    """Largest growth of the residual's norm from step to step; none for no limit. Paper:
    1.01."""

    center: Literal["scaled", "exact"] = "scaled"
    """What is subtracted from the gradient to give the rest: alpha R P (code), or R P (paper)."""

    phi: Literal["line", "matrix"] = "line"
    """One scaling factor per line, a row or where m < n a column (paper), or one per matrix."""

    phi_max: Annotated[float, Gt(0)] | None = None
    """Largest scaling factor, for lines whose gradient vanishes while momentum does not.
    Paper: none."""

    side: Literal["auto", "reverse", "left", "right"] = "auto"
    """Which side is projected: auto the short one, reverse the long one."""

    search: Literal["auto", "svd", "gram", "randomised", "iteration", "dct"] = "auto"
    """How a basis is found, as for galore. Paper: svd. auto: svd, and where the projected side
    has 1024 or more, randomised with three products, ten times as fast. dct: the cosine
    directions that hold most of the gradient, as in dct-adamw."""

    on_refresh: Literal["keep", "rotate", "reset"] = "keep"
    """The moments at a new basis: kept as they are (paper), rotated into it, or reset."""

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

    state_dtype: Literal["param", "float32"] = "param"
    """The dtype of the moments. Code: the parameter's."""

    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How updated bf16 weights are rounded: to nearest, or stochastically, so that updates below
    bf16's resolution count on average."""

    wants: ClassVar = "matrices"
    default_lr: ClassVar = 5e-4
    scratch_lr: ClassVar = 0.01
    mission: ClassVar = True
    paper: ClassVar = Paper(
        "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?",
        "https://arxiv.org/abs/2410.01623",
    )

    def rule(self) -> Rule:
        search = Selected if self.search == "dct" else SEARCHES[self.search]
        return Rule(
            inner=Adam(self.betas, self.eps, self.eps_mode, self.state_dtype),
            projector=search(self.rank, self.side),
            refresh=Refresh(self.every, self.on_refresh, self.stagger),
            residual=Rescaled(self.center, self.phi, self.phi_max),
            limiter=None if self.gamma is None else NormGrowth(self.gamma),
            scale=self.scale,
            weight_decay=self.weight_decay,
            decay="after" if self.eps_mode == "hf" else "before",
            rounding=self.rounding,
        )
