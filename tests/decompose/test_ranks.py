"""Ranks by error and by test."""

import pytest
import torch

from eckart.decompose import truncated_svd
from eckart.decompose.ranks import smallest_rank, tail_errors


def test_tail_errors_are_those_of_the_truncations():
    W = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = tail_errors(torch.linalg.svdvals(W))
    assert errors[0] == 1 and errors[6] == 0
    for rank in range(7):
        U, s, Vt = truncated_svd(W, rank)
        left = W - U * s.unsqueeze(-2) @ Vt  # both matrices at one rank
        assert float(errors[rank]) == pytest.approx(float(left.norm() / W.norm()), abs=1e-12)


def test_a_zero_matrix_has_no_error():
    assert tail_errors(torch.zeros(4)).tolist() == [0.0] * 5


@pytest.mark.parametrize("wanted", [1, 2, 3, 7, 8, 9, 63, 64, 65, 100])
def test_the_smallest_good_rank_is_found_in_few_tests(wanted):
    asked = []

    def good(rank):
        asked.append(rank)
        return rank >= wanted

    assert smallest_rank(good, 100) == wanted
    assert len(asked) <= 15 and max(asked) <= 100
    assert smallest_rank(lambda rank: False, 100) is None
