"""Distillation looks at the positions and examples that the task itself counts."""

import pytest
import torch

from eckart.methods.objective.distill import Distill, counted, predicts_the_next
from tests.conftest import tiny


@pytest.mark.parametrize(
    "architecture, shifts",
    [("llama", True), ("gpt2", True), ("bert", False), ("t5", False), ("vit", False)],
)
def test_only_causal_models_predict_the_next_token(architecture, shifts):
    assert predicts_the_next(tiny(architecture)) == shifts


def test_a_masked_model_is_compared_at_the_masked_positions():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.full((2, 5), -100)
    labels[0, 3], labels[1, 0] = 2, 4
    outputs = {"logits": logits, "loss": torch.zeros(())}
    other = logits.clone()
    other[0, 3] += torch.arange(7)
    loss = Distill(weight=1.0).loss(
        tiny("bert"), {"labels": labels}, outputs, torch.zeros(()), {"logits": other}
    )
    assert loss > 0.1
    other = logits.clone()
    other[0, 2] += torch.arange(7)  # the position before it: nobody asked
    loss = Distill(weight=1.0).loss(
        tiny("bert"), {"labels": labels}, outputs, torch.zeros(()), {"logits": other}
    )
    assert loss == 0


def test_of_a_classifier_every_labelled_example_counts():
    logits = torch.arange(12.0).reshape(3, 4)
    labels = torch.tensor([1, -100, 2])
    for shifts in (False, True):
        assert torch.equal(counted(logits, labels, shifts), logits[[0, 2]])
