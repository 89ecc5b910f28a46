"""LaMDA: fine-tune a small code model on prose with an r x r core and a gradually frozen B.

Source: S. A. Azizi et al., "LaMDA: Large Model Fine-Tuning via Spectrally Decomposed
Low-Dimensional Adaptation", Findings of EMNLP 2024, abstract: up to 17.7 times fewer updated
parameters and 1.32 times less memory at equal or better quality.

At rank 24 LaMDA ends with 8,064 trained parameters; LoRA of rank 8 trains 40,960. "Equal" means:
at most 0.02 nats above, about a twentieth of the gain of fine-tuning. Training B for a while must
be better than never training it (eta = 0), and at most 0.02 worse than training it to the end
(eta = 1); LoRA-XS is a core between the same factors, initialized to zero. Activation memory is
counted on the tensors that autograd saves.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from eckart.claims import (
    END,
    UNTOUCHED,
    Arm,
    Claim,
    Lab,
    Quantities,
    Statement,
    Trained,
    lower,
    matches,
)
from eckart.linear import LowRank, Site
from eckart.linear.factored import fresh_pair
from eckart.methods import LaMDA, LoRA
from eckart.recipe import Recipe

MARGIN = 0.02


@dataclass(frozen=True)
class FrozenA(LoRA):
    """LoRA with a frozen A."""

    offers: ClassVar = ()

    def build_one(self, site: Site) -> dict[str, nn.Module]:
        B, A = fresh_pair(site, min(self.rank, *site.shape))
        return {"factors": LowRank(B, A, self.alpha / self.rank, trained=("B",))}


def kept(trained: Trained, lab: Lab) -> Quantities:
    """Bytes of activations that autograd saves in the forward pass of a batch."""
    storages: dict[int, int] = {}
    parameters = {p.untyped_storage()._cdata for p in trained.model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            storages[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = trained.model(**lab.batch(0))["loss"]
    del loss
    return {"kept": float(sum(storages.values()))}


def lamda(**fields: Any) -> Recipe:
    return Recipe(LaMDA(rank=24, **fields))


def arm(name: str, recipe: Recipe, lr: float, full: bool = False) -> Arm:
    return Arm(name, recipe, lr=lr, watch={END: kept}, full=full)


CORES = 14 * 24 * 24  # parameters that LaMDA still trains at the end

CLAIM = Claim(
    says="at rank 24 LaMDA is as good as LoRA of rank 8 with a fifth of its trained numbers at "
    "the end, keeps less in a pass, and gains by training B for the first 30% of the steps",
    arms=(
        UNTOUCHED,
        arm("LoRA", Recipe(LoRA(rank=8, alpha=16)), lr=1e-2),
        arm("LaMDA", lamda(), lr=1e-2),
        arm("LaMDA, B never trains", lamda(eta=0.0), lr=1e-2),
        arm("LaMDA, B trains on", lamda(eta=1.0), lr=3e-3),
        arm("LoRA-XS", lamda(init="svd_zero", eta=0.0), lr=3e-2),
        arm("LoRA, A frozen", Recipe(FrozenA(rank=8, alpha=16)), lr=1e-2, full=True),
        arm("core from zero", lamda(init="svd_zero"), lr=1e-2, full=True),
        arm("as the code", lamda(init="code"), lr=1e-2, full=True),
        arm("LaMDA++", lamda(allocation="bins"), lr=1e-2, full=True),
    ),
    control=lower("LoRA", than="untouched", by=0.1),
    statements=(
        matches("LaMDA", of="LoRA", within=MARGIN),
        Statement(
            "LaMDA trains at most a fifth of LoRA's numbers at the end",
            lambda r: r["LoRA"]["parameters"] / 5 - CORES,
            unit="numbers",
        ),
        lower("LaMDA", than="LoRA", quantity="kept", unit="bytes"),
        matches("LaMDA", of="LaMDA, B trains on", within=MARGIN),
        lower("LaMDA", than="LaMDA, B never trains"),
        lower("LaMDA", than="LoRA-XS"),
        lower("LaMDA++", than="LaMDA"),
    ),
    unseen="GLUE, summarisation and mathematics at 7 billion parameters, the peak memory there",
)
