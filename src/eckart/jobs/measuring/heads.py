"""The largest attention logits of each head on a text, with the adapter on and off.

Queries, keys and values are taken as the model passes them to attention: after biases, rotation
and norms, with keys and values repeated for grouped queries. The reach of a head is its largest
|logit|, which enters the theory's bound. Each polynomial degree with fewer features than tokens
is also tried on the text: the error of the approximate gradient for a random output gradient.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
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
from eckart.decompose.polynomial import gradient_errors
from eckart.jobs.measuring.drift import Sample
from eckart.linear.sites import seeded_generator
from eckart.recipe import Handle, terms_off

PROBE = "eckart_reach"
EPS = 1e-2  # largest relative error of a fast gradient
TRIED = 1024  # most tokens of a row for errors: an exact gradient takes L^2
NORMS = ("q", "k", "k_centred", "v")


@dataclass
class Layer:
    """Maxima over a text for the heads of one layer: entries, logits and errors, [heads] each."""

    width: int
    norms: dict[str, Tensor]  # largest |entry| of Q, K, centred K and V
    reach: Tensor
    centred: Tensor
    errors: dict[int, Tensor]  # degree -> largest relative error of dQ, dK, dV

    def widen(self, other: Layer) -> None:
        """Update the maxima with another row."""
        for name in NORMS:
            self.norms[name] = torch.maximum(self.norms[name], other.norms[name])
        self.reach = torch.maximum(self.reach, other.reach)
        self.centred = torch.maximum(self.centred, other.centred)
        for degree, error in other.errors.items():
            before = self.errors.get(degree, torch.zeros_like(error))
            self.errors[degree] = torch.maximum(before, error)


@dataclass(frozen=True)
class HeadReach:
    """One head: its largest logits, and the polynomial degree that they require."""

    layer: int
    head: int
    width: int  # h
    length: int  # L
    reach: float  # max |S|
    centred: float  # the same with centred keys, which the bound uses
    without: float  # `centred` with the adapter off; equal to it without an adapter
    norms: Mapping[str, float]  # largest |entry| of q, k, k_centred, v
    errors: Mapping[int, float]  # degree -> relative error of the gradient

    @property
    def degree(self) -> int:
        return required_degree(self.centred)

    @property
    def features(self) -> int:
        return feature_count(self.width, min(self.degree, HIGHEST))

    @property
    def regime(self) -> str:
        """The bound's regime; "measured" where the bound says hard but a degree reaches EPS."""
        hard = self.regime_by_bound == "hard"
        return "measured" if hard and self.measured_degree is not None else self.regime_by_bound

    @property
    def regime_by_bound(self) -> str:
        return regime(self.centred, self.width, self.length)

    @property
    def measured_degree(self) -> int | None:
        """The smallest degree whose gradient error on the text is at most EPS."""
        return next((g for g, error in sorted(self.errors.items()) if error <= EPS), None)

    @property
    def regime_without(self) -> str:
        return regime(self.without, self.width, self.length)

    @property
    def largest_easy_scale(self) -> float | None:
        """The largest factor on the adapter that the bound still calls easy; None: any."""
        scale = largest_easy_scale(self.without, self.centred, self.width, self.length)
        return scale if math.isfinite(scale) else None

    def document(self) -> dict[str, Any]:
        """Plain data."""
        return {
            **dataclasses.asdict(self),
            "threshold": math.sqrt(math.log(max(2, self.length))),
            "degree": self.degree,
            "features": self.features,
            "measured_degree": self.measured_degree,
            "regime": self.regime,
            "regime_without": self.regime_without,
            "largest_easy_scale": self.largest_easy_scale,
        }


def reaches(model: Any, text: Sample, handle: Handle | None = None) -> list[HeadReach]:
    """All heads of a model by layer; empty where its attention cannot be replaced."""
    found = measured(model, text)
    adapter = handle is not None and handle.weights.base == "frozen"
    with terms_off(model) if adapter else nullcontext():
        off = measured(model, text) if adapter else found
    length = max(len(row["input_ids"]) for row in text.rows)
    return [
        HeadReach(
            number,
            i,
            layer.width,
            length,
            float(layer.reach[i]),
            float(layer.centred[i]),
            float(off[number].centred[i]),
            {name: float(layer.norms[name][i]) for name in NORMS},
            {degree: float(error[i]) for degree, error in layer.errors.items()},
        )
        for number, layer in sorted(found.items())
        for i in range(len(layer.reach))
    ]


@torch.inference_mode()
def measured(model: Any, text: Sample) -> dict[int, Layer]:
    """Layer number -> maxima over all rows, which run one at a time."""
    found: dict[int, Layer] = {}
    device = next(model.parameters()).device
    with recording(model, found):
        for row in text.rows:
            ids = torch.as_tensor([list(row["input_ids"])], device=device)
            model(input_ids=ids, use_cache=False)
    return found


@contextmanager
def recording(model: Any, found: dict[int, Layer]) -> Iterator[None]:
    """Record the maxima of every attention call into `found`; outputs are those of sdpa."""
    before = model.config._attn_implementation
    plain: Any = AttentionInterface._global_mapping.get("sdpa")

    def probe(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        layer = getattr(module, "layer_idx", None)
        if layer is not None:
            causal = bool(getattr(module, "is_causal", True))
            row = measure_row(query, key, value, kwargs.get("scaling"), causal)
            if int(layer) in found:
                found[int(layer)].widen(row)
            else:
                found[int(layer)] = row
        return plain(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(PROBE, probe)
    try:
        model.set_attn_implementation(PROBE)
        yield
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(PROBE, None)


def measure_row(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, causal: bool
) -> Layer:
    """The maxima of one row; query [1, heads, L, h], key and value [1, kv heads, L, h]."""
    heads, length, h = query.shape[1:]
    Q, K, V = (
        t[0].float().repeat_interleave(heads // t.shape[1], dim=0) for t in (query, key, value)
    )
    scale = scaling if scaling is not None else h**-0.5
    middle = centred(K)
    parts = dict(zip(NORMS, (Q, K, middle, V), strict=True))
    norms = {name: t.abs().flatten(1).amax(1).cpu() for name, t in parts.items()}
    errors: dict[int, Tensor] = {}
    if length <= TRIED:
        dO = torch.randn(V.shape, generator=seeded_generator(0, "dO")).to(V)
        for degree in degrees_to_try(h, length):
            found = gradient_errors(Q, middle, V, dO, scale, degree, causal)
            worst = torch.stack([found[name] for name in ("dQ", "dK", "dV")]).amax(0)
            errors[degree] = worst.nan_to_num(float("inf")).cpu()
    reach, with_centred = (logit_reach(Q, keys, scale).cpu() for keys in (K, middle))
    return Layer(h, norms, reach, with_centred, errors)


def degrees_to_try(h: int, length: int) -> list[int]:
    """Degrees from 1 to 8 with fewer features than tokens."""
    return [g for g in range(1, 9) if feature_count(h, g) < length]
