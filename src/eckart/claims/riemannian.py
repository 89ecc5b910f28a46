"""Riemannian preconditioning: fine-tune a small code model on prose with scaled gradients.

Source: F. Zhang and M. Pilanci, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation
Models", ICML 2024, Fig. 1 and tables 1 to 3: better than SGD and Adam on the same factors.
"""

from eckart.claims import UNTOUCHED, Arm, Claim, lower
from eckart.claims.allora import PlainSGD
from eckart.methods import LoRA, Riemannian
from eckart.recipe import Recipe

LORA = LoRA(rank=8, alpha=16)

CLAIM = Claim(
    says="dividing each factor's gradient by the other factor's size makes Adam and SGD better",
    arms=(
        UNTOUCHED,
        Arm("LoRA", Recipe(LORA), lr=1e-2),
        Arm("preconditioned", Recipe(LORA, Riemannian()), lr=3e-3),
        Arm("LoRA, SGD", Recipe(LORA, PlainSGD()), lr=0.3),
        Arm("preconditioned, SGD", Recipe(LORA, Riemannian(inner="sgd")), lr=0.3),
    ),
    control=lower("LoRA", than="untouched", by=0.1),
    statements=(
        lower("preconditioned", than="LoRA"),
        lower("preconditioned, SGD", than="LoRA, SGD"),
    ),
    unseen="GPT-2 on E2E, Mistral 7B on GLUE, diffusion models, less care for the learning rate",
)
