"""Distillation: stay close to a reference model's predictions.

    loss = (1 - weight) * task + weight * T^2 * KL(reference || model at temperature T)

The reference is the base itself (the model without its terms) or a teacher. Take it to heal
a compressed model, or to fine-tune without drifting; weight = 1 trains on the reference
alone and needs no labels but those that mark which tokens count.

Source: G. Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, section 2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F

from eckart.recipe import Objective, Paper


def divergence(logits: Tensor, reference: Tensor, temperature: float) -> Tensor:
    """T^2 KL(reference || model) averaged over tokens: both [t, v] -> scalar, in fp32."""
    p = F.log_softmax(reference.float() / temperature, dim=-1)
    q = F.log_softmax(logits.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(q, p, log_target=True, reduction="batchmean")


def predicts_the_next(model: nn.Module) -> bool:
    """Is position i of the logits about token i + 1? Not where the model shifts its own input."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    # transformers' name of the task; None is its word for causal models under an older name
    task = getattr(model, "loss_type", None)
    return task in (None, "ForCausalLM", "ForConditionalGeneration")


def counted(logits: Tensor, labels: Tensor | None, shifts: bool) -> Tensor:
    """The logits [t, v] of the positions, or of the examples, that the task's loss counts."""
    if labels is None or labels.shape != logits.shape[:-1]:
        return logits.reshape(-1, logits.shape[-1])
    if shifts and labels.dim() > 1:  # position i predicts token i + 1
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits[labels != -100]


@dataclass(frozen=True)
class Distill(Objective):
    """Mixes the task's loss with the divergence from a reference."""

    weight: Annotated[float, Ge(0), Le(1)] = 0.5
    """Share of the divergence in the loss; 1 leaves the task's own loss out."""

    temperature: Annotated[float, Gt(0)] = 2.0
    """T, which softens both distributions. Paper: 1 to 20."""

    kind: ClassVar = "data"
    needs_reference: ClassVar = True
    paper: ClassVar = Paper(
        "Distilling the Knowledge in a Neural Network", "https://arxiv.org/abs/1503.02531"
    )

    def loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        outputs: Any,
        loss: Tensor,
        reference: Any = None,
    ) -> Tensor:
        labels = inputs.get("labels")
        shifts = predicts_the_next(model)
        mine = counted(outputs["logits"], labels, shifts)
        theirs = counted(reference["logits"], labels, shifts)
        return (1 - self.weight) * loss + self.weight * divergence(mine, theirs, self.temperature)
