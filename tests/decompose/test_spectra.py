"""Ranks by spectra against matrices whose rank is known, and against random ones."""

import pytest
import torch

from eckart.decompose.spectra import (
    effective_rank,
    energy_at,
    random_spectrum,
    share_of_random,
    stable_rank,
)


def spectrum(m, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.svdvals(torch.randn(m, n, generator=g, dtype=torch.float64))


def test_equal_values_count_as_many_as_they_are():
    s = torch.tensor([[2.0, 2.0, 2.0, 0.0], [5.0, 0.0, 0.0, 0.0]])
    assert stable_rank(s).tolist() == pytest.approx([3, 1])
    assert effective_rank(s).tolist() == pytest.approx([3, 1])
    assert energy_at(s, 2).tolist() == pytest.approx([2 / 3, 1])


def test_a_zero_matrix_has_no_rank_and_lacks_nothing():
    zero = torch.zeros(4)
    assert (float(stable_rank(zero)), float(effective_rank(zero))) == (0, 0)
    assert float(energy_at(zero, 1)) == 1


@pytest.mark.parametrize(("m", "n"), [(32, 32), (64, 256), (300, 100)])
def test_a_random_matrix_is_as_random_as_it_is_said_to_be(m, n):
    drawn = effective_rank(torch.stack([spectrum(m, n, seed) for seed in range(8)])).mean()
    # finite size: the law is for large matrices; 2 % at 32 x 32
    assert float(effective_rank(random_spectrum(m, n)) / drawn) == pytest.approx(1, abs=0.02)
    assert float(share_of_random(spectrum(m, n), m, n)) == pytest.approx(1, abs=0.03)


def test_a_low_rank_matrix_is_told_from_a_random_one():
    g = torch.Generator().manual_seed(0)
    W = torch.randn(64, 4, generator=g) @ torch.randn(4, 64, generator=g)
    assert float(share_of_random(torch.linalg.svdvals(W), 64, 64)) < 0.1
