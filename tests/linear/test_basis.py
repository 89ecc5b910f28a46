"""Random bases: the same numbers for any piece, unrelated between tensors, none of torch's."""

import pytest
import torch
from torch.autograd import gradcheck

from eckart.errors import FileError
from eckart.linear import basis, describe
from eckart.linear.basis import RandomBasis, combine, combined, uniform

F64 = torch.float64
MASK = (1 << 64) - 1


def mix(x):
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def test_entries_are_two_rounds_of_splitmix64_in_python_integers():
    first, second = (key & MASK for key in basis.keys_of(7, "a tensor"))
    i, j, k = range(3, 5), range(2**23, 2**23 + 3), range(1000, 1004)
    got = uniform(7, "a tensor", i, j, k)
    for a, x in enumerate(i):
        for b, y in enumerate(j):
            for c, z in enumerate(k):
                place = x << 44 | y << 20 | z
                bits = mix((mix(place ^ first) + second) & MASK) >> 40
                assert got[a, b, c].item() == bits / 2**23 - 1


def test_numbers_stay_what_files_were_written_with():
    drawn = uniform(0, "nola_A", range(2), range(2), range(2)).flatten()
    assert [round(v, 7) for v in drawn.tolist()] == PINNED


PINNED = [
    0.746099,
    -0.7324188,
    0.199054,
    -0.9780833,
    -0.8725537,
    -0.5374578,
    -0.5164475,
    -0.7889583,
]


def test_keys_and_places_give_unrelated_uniform_numbers():
    n = 50_000
    draws = [
        uniform(seed, name, range(5), range(100), range(100)).flatten()
        for seed, name in ((0, "a"), (1, "a"), (0, "b"))
    ]
    draws.append(uniform(0, "a", range(5), range(100, 200), range(100)).flatten())
    for u in draws:
        assert u.min() >= -1 and u.max() < 1
        assert abs(u.mean()) < 5 / (3 * n) ** 0.5  # five deviations
        assert abs(u.var() - 1 / 3) < 0.03 / 3
        assert abs((u.sign()[1:] * u.sign()[:-1]).mean()) < 5 / n**0.5
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(4)
    assert correlation.abs().max() < 5 / n**0.5


def test_any_piece_is_a_piece_of_the_whole():
    whole = uniform(3, "x", range(6), range(9), range(5))
    assert torch.equal(uniform(3, "x", range(2, 4), range(1, 8), range(3)), whole[2:4, 1:8, :3])


def test_torchs_generator_is_left_alone():
    before = torch.get_rng_state()
    held = RandomBasis(0, "x", 4, 5, 3)
    combined(torch.ones(4, requires_grad=True), (0, "x", 5, 3)).sum().backward()
    assert torch.equal(torch.get_rng_state(), before) and held.values.any()


@pytest.mark.parametrize("leading", [(), (3,)])
@pytest.mark.parametrize("at_once", [1, 16, 1 << 22])
def test_streamed_equals_held(leading, at_once, monkeypatch):
    monkeypatch.setattr(basis, "AT_ONCE", at_once)
    held = RandomBasis(2, "x", 7, 5, 3).values
    monkeypatch.setattr(basis, "AT_ONCE", 1 << 22)
    assert torch.equal(held, RandomBasis(2, "x", 7, 5, 3).values)
    monkeypatch.setattr(basis, "AT_ONCE", at_once)
    g = torch.Generator().manual_seed(0)
    c = torch.randn(*leading, 7, generator=g, dtype=F64).requires_grad_()
    plain, streamed = combine(c, held), combined(c, (2, "x", 5, 3))
    explicit = torch.einsum("...k,knr->...nr", c, held.double())
    # fp64, sums of 7 products in another order
    torch.testing.assert_close(plain, explicit, rtol=0, atol=1e-13)
    torch.testing.assert_close(streamed, explicit, rtol=0, atol=1e-13)
    grad = torch.randn(plain.shape, generator=g, dtype=F64)
    (ours,) = torch.autograd.grad(streamed, c, grad)
    (theirs,) = torch.autograd.grad(explicit, c, grad)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    assert gradcheck(lambda c: combined(c, (2, "x", 5, 3)), (c,))


def test_sparse_entries_are_signs_in_the_promised_share():
    q = 4.0
    values = RandomBasis(0, "x", 40, 50, 50, scale=2.0, sparsity=q).values
    assert values.unique().tolist() == [-2.0, 0.0, 2.0]
    for sign in (-2.0, 2.0):  # 1 / 2q each; five deviations of 100,000 draws
        assert abs((values == sign).float().mean() - 1 / (2 * q)) < 0.006


def test_a_description_draws_the_same_basis_again():
    held = RandomBasis(5, "x", 4, 5, 3, scale=0.5)
    assert not held.state_dict()  # nothing to save
    record = describe(held)
    again = RandomBasis.empty(record["tensors"], record["scalars"])
    assert torch.equal(again.values, held.values) and describe(again) == record


def test_a_basis_that_came_from_a_file_is_saved():
    held = RandomBasis(0, "x", 4, 5, 3, stored=torch.ones(4, 5, 3))
    record = describe(held)
    again = RandomBasis.empty(record["tensors"], record["scalars"])
    again.load_state_dict(held.state_dict())
    assert torch.equal(again.values, held.values)


def test_another_generator_is_refused_by_name():
    record = describe(RandomBasis(5, "x", 4, 5, 3))
    with pytest.raises(FileError, match="drawn by another generator"):
        RandomBasis.empty({}, {**record["scalars"], "generator": "dice"})
