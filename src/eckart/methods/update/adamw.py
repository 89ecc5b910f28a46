"""AdamW: Adam with decoupled weight decay, equal to torch.optim.AdamW bit for bit.

    M = b1 M + (1 - b1) G        V = b2 V + (1 - b2) G^2
    W = (1 - lr wd) W - lr  M / (1 - b1^t) / (sqrt(V / (1 - b2^t)) + eps)

The default for adapters and for parameters that a projected rule does not project. Take
GaLore or Fira where the two moments of full matrices do not fit into memory.

Source: I. Loshchilov and F. Hutter, "Decoupled Weight Decay Regularization", 2019, Alg. 2.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt

from eckart.optim import Adam, Rule
from eckart.recipe.method import Cost, Paper, Update


@dataclass(frozen=True)
class AdamW(Update):
    """Adam with two moments per trained element and decoupled weight decay."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and of the second moment. Paper: (0.9, 0.999)."""

    eps: Annotated[float, Gt(0)] = 1e-8
    """Added to the root of the second moment. Paper: 1e-8."""

    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay, multiplied by the learning rate. Usual: 0 for adapters,
    0.1 for pretraining."""

    state_dtype: Literal["param", "float32"] = "param"
    """The dtype of the moments. torch: the parameter's."""

    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How updated bf16 weights are rounded. stochastic is exact on average, so that updates below
    half a bf16 step are not lost. fp32 weights are never rounded. Usual: nearest."""

    paper: ClassVar = Paper(
        "Decoupled Weight Decay Regularization", "https://arxiv.org/abs/1711.05101", "ICLR 2019"
    )

    def rule(self) -> Rule:
        return Rule(
            Adam(self.betas, self.eps, state_dtype=self.state_dtype),
            weight_decay=self.weight_decay,
            rounding=self.rounding,
        )

    def cost(self, m: int, n: int) -> Cost:
        return Cost(state=2 * m * n)
