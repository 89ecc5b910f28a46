"""Fixed bases, the fast transform, the choice of directions and low-precision error feedback."""

import pytest
import torch

from eckart.errors import UsageError
from eckart.optim.fixed import Moves, Selected, cosines, directions
from eckart.optim.project import Search
from eckart.optim.storage import pack_rows, unpack_rows

F64, CPU = torch.float64, torch.device("cpu")


@pytest.mark.parametrize("n", [1, 2, 3, 8, 31, 96])
@pytest.mark.parametrize("kind", ["dct2", "dct3", "random"])
def test_bases_are_orthogonal(kind, n):
    Q = directions(kind, n, F64, CPU)
    torch.testing.assert_close(Q.T @ Q, torch.eye(n, dtype=F64), rtol=0, atol=1e-12)
    Q = directions(kind, n, torch.float32, CPU).double()
    # entries below 1 were rounded to 6e-8
    torch.testing.assert_close(Q.T @ Q, torch.eye(n, dtype=F64), rtol=0, atol=1e-6)


def test_a_wide_basis_is_as_orthogonal():
    """Angles are reduced as integers: in fp32 cos(pi i (2j+1) / 2n) would err by 1e-3 here."""
    C = cosines(2048)
    assert (C @ C.T - torch.eye(2048, dtype=F64)).abs().max() < 1e-12


def test_a_hadamard_basis_needs_a_power_of_two():
    Q = directions("hadamard", 16, F64, CPU)
    torch.testing.assert_close(Q.T @ Q, torch.eye(16, dtype=F64), rtol=0, atol=1e-12)
    with pytest.raises(UsageError, match="a Hadamard basis needs a power of two"):
        directions("hadamard", 24, F64, CPU)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 16, 33])
def test_the_fast_transform_is_the_product_and_scipys(n):
    scipy_fft = pytest.importorskip("scipy.fft")
    A = torch.randn(5, n, dtype=F64, generator=torch.Generator().manual_seed(n))
    S = A @ directions("dct2", n, F64, CPU)
    for G, axis in ((A[None], -1), (A.T[None], -2)):
        found = Selected(1, route="fft").coordinates(G, axis).picked(torch.arange(n))[0]
        torch.testing.assert_close(found if axis == -1 else found.T, S, rtol=0, atol=1e-10)
    wanted = torch.from_numpy(scipy_fft.dct(A.numpy(), type=2, norm="ortho"))
    torch.testing.assert_close(S, wanted, rtol=0, atol=1e-10)


def chosen(projector, G):
    search = Search(G[None], {}, [0], True, tuple(G.shape))
    found = projector.find(search)
    return found["index"][0], found["low"][0]


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
@pytest.mark.parametrize("kind", ["dct2", "dct3", "random"])
def test_what_is_dropped_is_the_energy_of_the_other_directions(shape, kind):
    G = torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    projector = Selected(2, kind=kind, norm=2)
    index, R = chosen(projector, G)
    basis = projector.basis({"index": index}, G, shape)
    back = R @ basis.right if basis.left is None else basis.left @ R
    Q = directions(kind, 6, F64, CPU)
    S = G @ Q if shape[0] > shape[1] else (Q.T @ G).T
    energy = (S**2).sum(0)
    dropped = energy.sum() - energy[index.long()].sum()
    torch.testing.assert_close(((G - back) ** 2).sum(), dropped, rtol=1e-10, atol=0)
    assert dropped <= (1 - 2 / 6) * (G**2).sum()


def test_directions_are_ascending_and_ties_go_to_the_lower_index():
    S = torch.tensor([[1.0, -2.0, 2.0, 2.0, 0.0, -1.0]], dtype=F64).repeat(7, 1)
    G = S @ directions("random", 6, F64, CPU).T
    G = (G @ directions("random", 6, F64, CPU)).round() @ directions("random", 6, F64, CPU).T
    index, R = chosen(Selected(3, kind="random"), G)
    assert index.tolist() == [1, 2, 3]
    torch.testing.assert_close(R, S[:, 1:4], rtol=0, atol=1e-12)


def test_both_norms_and_both_routes():
    S = torch.zeros(6, 5, dtype=F64)
    S[:, 1], S[0, 3] = 1.0, 3.0  # the larger sum; the larger square
    G = S @ directions("dct2", 5, F64, CPU).T
    for route in ("matmul", "fft"):
        assert chosen(Selected(1, norm=1, route=route), G)[0].tolist() != [3]
        assert chosen(Selected(1, norm=2, route=route), G)[0].tolist() == [3]
    G = torch.randn(4, 300, dtype=F64, generator=torch.Generator().manual_seed(0))
    a, b = (
        Selected(1, route=route).coordinates(G[None], -1).picked(torch.arange(300))
        for route in ("auto", "matmul")
    )
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert not torch.equal(a, b)  # the fast transform is taken, and rounds otherwise
    with pytest.raises(UsageError, match="only the dct2 basis has an fft route"):
        Selected(1, kind="dct3", route="fft")


def test_moments_follow_their_direction():
    M = torch.randn(4, 3, dtype=F64)
    old, new = torch.tensor([1, 4, 6]), torch.tensor([1, 5, 6])
    moved = Moves(old, new, -1).mean(M)
    assert torch.equal(moved[:, [0, 2]], M[:, [0, 2]]) and (moved[:, 1] == 0).all()
    assert torch.equal(Moves(old, old, -1).mean(M), M)
    assert torch.equal(Moves(old, new, -2).mean(M.T), moved.T)
    shifted = Moves(old, torch.tensor([0, 1, 4]), -1).mean(M)
    assert torch.equal(shifted[:, 1:], M[:, :2]) and (shifted[:, 0] == 0).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("n", [1, 6, 7])
def test_rows_in_few_bits_err_by_half_a_level(bits, n):
    x = torch.randn(5, n, generator=torch.Generator().manual_seed(0))
    x[2] = 3.5  # a constant row
    codes, ends = pack_rows(x, bits)
    assert codes.shape == (5, n if bits == 8 else (n + 1) // 2)
    back = unpack_rows(codes, ends, bits, n)
    width = x.amax(1) - x.amin(1)
    assert ((back - x).abs().amax(1) <= width / (2**bits - 1) / 2 + 1e-6).all()
    assert (back[2] == 3.5).all()
