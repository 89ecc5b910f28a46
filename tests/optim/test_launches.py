"""A step of many matrices of one shape launches little more than a step of two."""

from collections import Counter

import pytest
import torch
from tests.optim.trainings import parameters
from torch.utils._python_dispatch import TorchDispatchMode

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
VIEWS = {
    "view", "t", "transpose", "expand", "unsqueeze", "detach", "alias", "select", "slice", "split",
    "split_with_sizes", "unbind", "squeeze", "_unsafe_view", "promote_types",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """How often each operation runs inside, views left out."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name not in VIEWS:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def launches(rule, count):
    """Those of a third step of `count` matrices."""
    named = parameters([(12, 8)] * count, torch.float32)
    optimizer = LowRankOptimizer(named, rule=rule, clip=1.0)
    for _ in range(3):
        for _, p in named:
            p.grad = torch.randn(p.shape)
        with Launches() as counter:
            optimizer.step()
    return counter.found


@pytest.mark.parametrize("name", RULES)
def test_a_further_matrix_adds_its_full_size_products_alone(name):
    rule, wanted = RULES[name]
    few, many = launches(rule, 2), launches(rule, 6)
    assert {k: (many[k] - few[k]) / 4 for k in many if many[k] != few[k]} == wanted
