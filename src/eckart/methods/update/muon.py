"""Muon: orthogonalised momentum, with all singular values near 1.

    B = mu B + G
    O = NewtonSchulz(G + mu B)          U V^T of that matrix, singular values within 0.3 of 1
    W = (1 - lr wd) W - lr s O          s = 0.2 sqrt(max(m, n)), or sqrt(max(1, m / n))

Weak directions of the momentum count as much as strong ones, at half of Adam's state. Vectors,
embeddings and head follow AdamW.

Take it to pretrain a transformer's matrices in fewer steps than AdamW, for some large products
a step: after 300 steps its loss in claims/muon.py is 1.64 nats, Adam's 2.03. Take trion
(dct-adamw) or dion where those products cost too much, sumo where memory does, and AdamW to
fine-tune what AdamW pretrained: Liu et al. saw no clear gain there.

With step_scale=rms a step is as long as Adam's, and one learning rate serves both rules.
With tall (the first publication) it does not: learning rates are near 0.02, AdamW's then
`rest_lr` times that, 0.015 to 0.15.

Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the
scale rms is that of J. Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982. We
differ from their code in one point: the products run in fp32, there in bf16.

m out, n in.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from eckart.optim import Adam, Orthogonal, Rule, Whole
from eckart.recipe.method import Paper, Update


@dataclass(frozen=True)
class Muon(Update):
    """Orthogonalised momentum for the body's matrices, AdamW for everything else."""

    momentum: Annotated[float, Ge(0), Lt(1)] = 0.95
    """mu, the decay of the momentum. Paper: 0.95."""

    nesterov: bool = True
    """Nesterov momentum: orthogonalise G + mu B, not B. Paper: yes."""

    steps: Annotated[int, Ge(1)] = 5
    """Newton-Schulz steps. Paper: 5."""

    step_scale: Literal["rms", "tall", "ratio", "one"] = "rms"
    """The step's scale for an m x n matrix: 0.2 sqrt(max(m, n)), sqrt(max(1, m / n)),
    sqrt(m / n), or 1. Papers: rms and tall."""

    rest_lr: Annotated[float, Gt(0)] = 1.0
    """AdamW's learning rate for vectors, embeddings and head, as a share of this rule's."""

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decays for everything else. Paper: (0.9, 0.95)."""

    eps: Annotated[float, Gt(0)] = 1e-8
    """AdamW's epsilon."""

    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay, multiplied by the learning rate. Paper: 0.1 in large runs."""

    wants: ClassVar = "matrices"
    default_lr: ClassVar = 0.001
    mission: ClassVar = False
    paper: ClassVar = Paper(
        "Muon: An optimizer for hidden layers in neural networks",
        "https://kellerjordan.github.io/posts/muon/",
        "2024",
    )

    def rule(self) -> Rule:
        return Rule(
            Orthogonal(self.steps, self.momentum, self.nesterov),
            projector=Whole(),
            vectors=Adam(self.betas, self.eps),
            scale_by=self.step_scale,
            weight_decay=self.weight_decay,
        )

    def plain_lr(self) -> float:
        return self.rest_lr
