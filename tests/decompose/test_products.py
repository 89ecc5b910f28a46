"""oneDNN's products are those of torch, whatever the layout and the length of the sums."""

import pytest
import torch

from eckart.decompose import products
from eckart.decompose.products import add_product_, product

# (m, k, n), the inner dimension in one piece, in two and in several with a rest
SHAPES = [(512, 128, 96), (96, 2048, 64), (64, 4100, 16)]


def laid_out(rows: int, columns: int, layout: str) -> torch.Tensor:
    if layout == "transposed":
        return torch.randn(columns, rows).mT
    gaps = 5 if layout == "gaps" else 0
    return torch.randn(rows, columns + gaps)[:, :columns]


@pytest.fixture
def seen(monkeypatch):
    """What oneDNN is given, on any processor: its products exist wherever torch has it."""
    given, through = [], products.by_onednn
    monkeypatch.setattr(products, "preferred", lambda: torch.backends.mkldnn.is_available())
    monkeypatch.setattr(products, "by_onednn", lambda *of: given.append(of) or through(*of))
    return given


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["plain", "transposed", "gaps"])
def test_rounding_is_at_most_twice_that_of_torch(shape, layout, seen):
    m, k, n = shape
    A, B, C = laid_out(m, k, layout), laid_out(k, n, layout), torch.randn(m, n)
    exact = A.double() @ B.double()

    def error(found, wanted):
        return (found - wanted).square().mean().sqrt()

    assert error(product(A, B), exact) <= 2 * error(A @ B, exact)
    bias = torch.randn(n)
    assert error(product(A, B, bias), exact + bias) <= 2 * error(A @ B + bias, exact + bias)
    sums = 0.5 * C.double() - 0.1 * exact
    theirs = torch.addmm(C, A, B, alpha=-0.1, beta=0.5)
    add_product_(C, A, B, alpha=-0.1, beta=0.5)
    assert error(C, sums) <= 2 * error(theirs, sums)
    assert bool(seen) == torch.backends.mkldnn.is_available()


@torch.no_grad()
def test_stacks_are_multiplied_one_by_one(seen):
    """[*, m, k] and [*, k, n], with one or two leading dimensions, and sums in place."""
    A, B, C = torch.randn(2, 3, 128, 256), torch.randn(2, 3, 256, 128), torch.randn(3, 128, 128)
    wanted = A.double() @ B.double()
    # sums of 256 products of size 1 in fp32: 16 times the rounding of one, and room
    torch.testing.assert_close(product(A, B).double(), wanted, rtol=0, atol=2e-4)
    torch.testing.assert_close(product(A[0], B[0]).double(), wanted[0], rtol=0, atol=2e-4)
    sums = 0.5 * C.double() + 2 * wanted[0]
    add_product_(C, A[0], B[0], alpha=2.0, beta=0.5)
    torch.testing.assert_close(C.double(), sums, rtol=0, atol=4e-4)
    assert len(seen) == (12 if torch.backends.mkldnn.is_available() else 0)


def test_small_double_and_differentiated_products_are_torch_s_own(seen):
    large = torch.randn(256, 256)
    with torch.no_grad():
        product(large[:8], large)
        product(large.double(), large.double())
    product(large.requires_grad_(), large).sum().backward()
    assert large.grad is not None
    assert not seen
