"""The scale of a LoRA pair, s = alpha / r or alpha / sqrt(r), to and from PEFT's config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from eckart.linear.lowrank import LowRank


def scale_of(alpha: float, rank: int, scaling: str) -> float:
    """alpha / r, or alpha / sqrt(r) where the scaling is rank-stabilised ("rslora")."""
    return alpha / (math.sqrt(rank) if scaling == "rslora" else rank)


def peft_entries(term: LowRank, scaling: str) -> dict[str, Any]:
    """The entries of PEFT's LoraConfig that give this term its scale at its own rank."""
    rank, stable = term.A.shape[-2], scaling == "rslora"
    return {
        "r": rank,
        "lora_alpha": term.scale * (math.sqrt(rank) if stable else rank),
        "use_rslora": stable,
        "lora_dropout": term.dropout,
    }


def fields_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """rank, alpha, scaling and dropout of a LoraConfig; PEFT's defaults for missing entries."""
    return {
        "rank": config.get("r", 8),
        "alpha": float(config.get("lora_alpha", 8)),
        "scaling": "rslora" if config.get("use_rslora") else "lora",
        "dropout": float(config.get("lora_dropout", 0.0)),
    }
