"""The penalty on overlapping components, and adapters without one."""

import pytest
import torch

from eckart.errors import UsageError
from eckart.methods.objective.orthogonality import off_diagonal
from eckart.recipe import Recipe, attach, registry
from tests.conftest import batch_for, tiny
from tests.laws.matrix import small, steps


def test_orthogonal_columns_of_any_length_pay_nothing():
    Q = torch.linalg.qr(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).double())[0]
    B = Q * torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert off_diagonal(B.mT @ B) < 1e-24  # fp64
    B[:, 1] = B[:, 0]
    assert off_diagonal(B.mT @ B) == pytest.approx(2.0)  # two equal unit columns


def test_a_method_without_pairs_is_refused_at_the_first_step():
    penalty = registry.load("orthogonality")()
    handle = attach(tiny("llama"), Recipe(weights=small("bone"), objective=(penalty,)))
    with pytest.raises(UsageError) as fault:
        steps(handle, handle.optimizer(lr=1e-3), [batch_for("llama")])
    assert str(fault.value).splitlines()[0] == "orthogonality finds nothing to act on"
    assert fault.value.fix == "Leave orthogonality out, or type weights=lora."
