"""A cached value is reused for the same numbers only, however they were written."""

import copy
import pickle

import pytest
import torch
from torch import nn

from eckart.linear.cached import Cached


class Counted:
    """The sum of two tensors, and how often it was taken."""

    def __init__(self):
        self.a, self.W = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 3))
        self.sums: Cached[torch.Tensor] = Cached()
        self.taken, self.scale = 0, 1.0

    def __call__(self):
        def compute():
            self.taken += 1
            return (self.a + self.W).sum() * self.scale

        return self.sums(compute, (self.a,), (self.W,), (self.scale,)).item()


def rewrite(counted):
    counted.a.data = counted.a.data * 2


def widen(counted):
    counted.a, counted.W = (nn.Parameter(t.detach().double()) for t in (counted.a, counted.W))


CHANGES = {
    "in place": lambda c: c.a.detach().add_(1),
    "through .data": lambda c: c.a.data.add_(1),
    "another storage": rewrite,
    "the frozen one": lambda c: c.W.detach().mul_(2),
    "a scalar": lambda c: setattr(c, "scale", 3.0),
    "the dtype": widen,
    "not a number": lambda c: c.a.data.fill_(float("nan")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_made_once_until_something_changes(change):
    counted = Counted()
    assert counted() == counted() == 12.0 and counted.taken == 1
    CHANGES[change](counted)
    found = counted()
    assert counted.taken == 2
    expected = float((counted.a + counted.W).sum() * counted.scale)
    assert found == expected or (found != found and expected != expected)


def test_it_carries_no_gradient_and_copies_forget():
    counted = Counted()
    counted()
    assert not counted.sums.value.requires_grad
    for other in (copy.deepcopy(counted.sums), pickle.loads(pickle.dumps(counted.sums))):
        assert other.value is None and other.copies == ()


def test_tensors_without_numbers_are_not_cached():
    counted = Counted()
    counted.a = nn.Parameter(torch.ones(3, device="meta"))
    for _ in range(2):
        counted.sums(lambda: setattr(counted, "taken", counted.taken + 1), (counted.a,))
    assert counted.taken == 2
