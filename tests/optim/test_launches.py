"""A step of many matrices of one shape launches little more than a step of two."""

from dataclasses import fields

import pytest
import torch
from benchmarks.counting import Launches
from tests.optim.trainings import parameters

from eckart.optim import (
    SVD,
    Adam,
    LowRankOptimizer,
    NormGrowth,
    Refresh,
    Replaced,
    Rescaled,
    Rule,
    Selected,
)
from eckart.recipe.registry import load, methods

RARE = Refresh(1000, stagger=False)
# What each further matrix adds. R = G P^T and W += N P are products with all of G and W; Fira
# also reads G once for its norms and once to add it; a fixed basis is gathered by its indices.
RULES = {
    "galore": (Rule(Adam(), SVD(4), RARE), {"mm": 1, "addmm_": 1}),
    "galore, both": (Rule(Adam(), SVD(4, "both"), RARE), {"mm": 3, "addmm_": 1}),
    "fira": (
        Rule(Adam(), SVD(4), RARE, residual=Rescaled(), limiter=NormGrowth()),
        {"mm": 1, "addmm_": 1, "addcmul_": 1, "linalg_vector_norm": 1},
    ),
    "apollo": (
        Rule(Adam(), SVD(4), RARE, residual=Replaced()),
        {"mm": 1, "mul_": 1, "addcmul_": 1, "linalg_vector_norm": 1},
    ),
    "dct": (
        Rule(Adam(), Selected(4), Refresh(1, "rotate")),
        {"addmm_": 1, "index": 1, "_to_copy": 1},
    ),
}


def launches(rule, count):
    """The operations of the third step on `count` matrices, or on as many factor pairs."""
    sizes = [(12, 8)] if rule.pair is None else [(12, 4), (4, 8)]
    params = parameters(sizes * count, torch.float32)
    named = [(f"layers.{i}.w", p) for i, (_, p) in enumerate(params)]  # blocks for some rules
    names, pairs = [name for name, _ in named], []
    if rule.pair is not None:
        pairs = [(B, A, 2.0) for B, A in zip(names[::2], names[1::2], strict=True)]
    optimizer = LowRankOptimizer([{"params": named, "pairs": pairs}], rule=rule, clip=1.0)
    for _ in range(3):
        for _, p in named:
            p.grad = torch.randn(p.shape) if p.requires_grad else None
        with Launches() as counter:
            optimizer.step()
    return counter.found


def growth(rule):
    """The operations that each further matrix, or pair, adds."""
    few, many = launches(rule, 2), launches(rule, 6)
    return {k: (many[k] - few[k]) / 4 for k in many if many[k] != few[k]}


@pytest.mark.parametrize("name", RULES)
def test_a_further_matrix_adds_its_full_size_products_alone(name):
    rule, wanted = RULES[name]
    assert growth(rule) == wanted


# Readings and writings of a whole matrix, or of a gathered basis; Adam's mul_ and addcmul_, and
# what scales gradients, are foreach on a GPU. What decomposes or draws is not among them.
WHOLE = {
    "mm", "addmm_", "addcmul_", "linalg_vector_norm", "mul", "mul_", "add_", "copy_", "clone",
    "sign", "gather", "scatter_add_", "index", "_to_copy", "_fused_adam_", "new_zeros",
    "lift_fresh",
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n, e in methods().items() if e.axis == "update"])
def test_no_rule_launches_more_for_a_further_matrix_than_goes_through_all_of_it(name):
    cls = load(name)
    rare = {"rank": 4, "density": 0.5, "every": 1000, "stagger": False}
    update = cls(**{k: v for k, v in rare.items() if k in (f.name for f in fields(cls))})
    rule = update.rule()
    added = growth(rule)
    assert set(added) <= WHOLE
    if not (rule.projector.decomposes and rule.refresh.every == 1):  # else it is a refresh
        assert "_local_scalar_dense" not in launches(rule, 2)  # no device is waited for
    assert sum(added.values()) <= 13  # FRUGAL, whose rest of the gradient is formed
