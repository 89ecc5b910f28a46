"""How far the logits of each attention head reach on a text, the adapter on and off.

Queries and keys are taken where the model hands them to attention: after biases, rotation
and norms, with keys repeated for grouped queries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from eckart.decompose.bounds import (
    HIGHEST,
    centred,
    feature_count,
    largest_easy_scale,
    logit_reach,
    regime,
    required_degree,
)
from eckart.jobs.drift import Text
from eckart.recipe import Handle, terms_off

PROBE = "eckart_reach"


@dataclass(frozen=True)
class HeadReach:
    """One head: what its logits reach, and what that asks of a polynomial."""

    layer: int
    head: int
    width: int  # h
    length: int  # L
    reach: float  # max |S|
    centred: float  # the same with centred keys, which decides
    without: float  # that with the adapter off; the same number where there is none

    @property
    def degree(self) -> int:
        return required_degree(self.centred)

    @property
    def features(self) -> int:
        return feature_count(self.width, min(self.degree, HIGHEST))

    @property
    def regime(self) -> str:
        return regime(self.centred, self.width, self.length)

    @property
    def regime_without(self) -> str:
        return regime(self.without, self.width, self.length)

    def document(self) -> dict[str, Any]:
        """Plain data."""
        scale = largest_easy_scale(self.without, self.centred, self.width, self.length)
        return {
            **dataclasses.asdict(self),
            "degree": self.degree,
            "regime": self.regime,
            "regime_without": self.regime_without,
            "largest_easy_scale": scale if scale < float("inf") else None,
        }


def reaches(model: Any, text: Text, handle: Handle | None = None) -> list[HeadReach]:
    """All heads of a model, layer by layer; none where its attention cannot be looked into."""
    found = measured(model, text)
    adapter = handle is not None and handle.weights.base == "frozen"
    with terms_off(model) if adapter else nullcontext():
        off = measured(model, text) if adapter else found
    length = max(len(row["input_ids"]) for row in text.rows)
    return [
        HeadReach(
            layer, i, width, length, float(reach[i]), float(middle[i]), float(off[layer][2][i])
        )
        for layer, (width, reach, middle) in sorted(found.items())
        for i in range(len(reach))
    ]


@torch.inference_mode()
def measured(model: Any, text: Text) -> dict[int, tuple[int, Tensor, Tensor]]:
    """{layer: (h, max |S| [heads], the same with centred keys)}, over all rows one by one."""
    found: dict[int, tuple[int, Tensor, Tensor]] = {}
    device = next(model.parameters()).device
    with probed(model, found):
        for row in text.rows:
            ids = torch.as_tensor([list(row["input_ids"])], device=device)
            model(input_ids=ids, use_cache=False)
    return found


@contextmanager
def probed(model: Any, found: dict[int, tuple[int, Tensor, Tensor]]) -> Iterator[None]:
    """Let attention write its reach down on the way, and compute as before."""
    before = model.config._attn_implementation
    plain: Any = AttentionInterface._global_mapping.get("sdpa")

    def probe(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        layer = getattr(module, "layer_idx", None)
        if layer is not None:
            note(found, int(layer), query, key, kwargs.get("scaling"))
        return plain(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(PROBE, probe)
    try:
        model.set_attn_implementation(PROBE)
        yield
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(PROBE, None)


def note(
    found: dict[int, tuple[int, Tensor, Tensor]],
    layer: int,
    query: Tensor,
    key: Tensor,
    scaling: float | None,
) -> None:
    """The running maximum of a layer; query [1, heads, L, h], key [1, kv heads, L, h]."""
    heads, h = query.shape[1], query.shape[-1]
    key = key.repeat_interleave(heads // key.shape[1], dim=1)
    scale = scaling if scaling is not None else h**-0.5
    reach = logit_reach(query, key, scale)[0].cpu()
    middle = logit_reach(query, centred(key.float()), scale)[0].cpu()
    if layer in found:
        _, old, old_middle = found[layer]
        reach, middle = torch.maximum(reach, old), torch.maximum(middle, old_middle)
    found[layer] = (h, reach, middle)
