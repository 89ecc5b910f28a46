"""The fused map equals the plain one: exactly in its structure, within twice its error in bf16."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eckart.decompose import products
from eckart.kernels.low_rank import BLOCK, fused_linear_plus_low_rank
from eckart.linear import LowRank, Pair, find_sites, install, kernels, linear_plus_low_rank

NAMES = ("y", "dx", "dA", "dB")


def inputs(dtype=torch.float32, factors=torch.float32, tokens=2 * BLOCK + 7, n=24, m=20, r=4):
    g = torch.Generator().manual_seed(0)
    x, W, bias = (torch.randn(*s, generator=g).to(dtype) for s in ((1, tokens, n), (m, n), (m,)))
    A, B = (torch.randn(*s, generator=g).to(factors) for s in ((r, n), (m, r)))
    return x, W, bias, A, B


def start(A, B, moved):
    """A frozen start (B0, A0) from which the factors have moved by this share of themselves."""
    g = torch.Generator().manual_seed(1)
    B0, A0 = (t + moved * torch.randn(t.shape, generator=g).to(t.dtype) for t in (B, A))
    return B0, A0


def run(function, x, W, bias, A, B, dtype=None, moved=None):
    before = () if moved is None else start(A, B, moved)
    tensors = [t if dtype is None else t.to(dtype) for t in (x, W, bias, A, B, *before)]
    x, W, bias, A, B, *before = (t.clone() for t in tensors)
    for t in (x, A, B):
        t.requires_grad_()
    y = function(x, W, bias, Pair(A, B, 0.5, tuple(before) or None))
    y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(torch.bfloat16).to(y.dtype))
    return dict(zip(NAMES, (y.detach(), x.grad, A.grad, B.grad), strict=True))


@pytest.mark.parametrize("tokens", [7, 2 * BLOCK + 7])  # few: thin products; many: a matrix
@pytest.mark.parametrize("moved", [None, 0.1])
def test_fused_equals_plain_in_fp64(moved, tokens):
    given = inputs(tokens=tokens)
    plain = run(linear_plus_low_rank, *given, dtype=torch.float64, moved=moved)
    fused = run(fused_linear_plus_low_rank, *given, dtype=torch.float64, moved=moved)
    for name in NAMES:  # the same products in blocks: round-off of sums of a thousand terms
        torch.testing.assert_close(fused[name], plain[name], rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("moved", [None, 0.1, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_the_plain_forms(dtype, moved):
    given = inputs(dtype)
    exact = run(linear_plus_low_rank, *given, dtype=torch.float64, moved=moved)
    plain = run(linear_plus_low_rank, *given, moved=moved)
    fused = run(fused_linear_plus_low_rank, *given, moved=moved)
    for name in NAMES:
        assert fused[name].dtype == plain[name].dtype

        def error(result, name=name):
            return (result[name].double() - exact[name]).norm() / exact[name].norm()

        assert error(fused) <= 2 * error(plain) + 1e-12, name


@pytest.fixture
def onednn(monkeypatch):
    """Products of any size go to oneDNN, as large ones do where that is faster."""
    monkeypatch.setattr(products, "preferred", lambda: torch.backends.mkldnn.is_available())
    monkeypatch.setattr(products, "LEAST", 1)


def test_error_is_that_of_torch_by_other_products_too(onednn):
    test_error_is_at_most_twice_the_plain_forms(torch.float32, None)
    test_error_is_at_most_twice_the_plain_forms(torch.float32, 0.1)


def test_without_gradients_a_term_of_nothing_leaves_the_bits_of_the_base(onednn):
    x, W, bias, A, B = inputs()
    with torch.no_grad():
        found = fused_linear_plus_low_rank(x, W, bias, Pair(A, 0 * B, 0.5))
    assert torch.equal(found, F.linear(x, W, bias))


def test_a_small_move_from_a_start_is_not_lost_in_bf16():
    x, W, bias, A, B = inputs(torch.bfloat16)
    nothing = torch.zeros_like(W), torch.zeros_like(bias)
    exact = run(linear_plus_low_rank, x, *nothing, A, B, dtype=torch.float64, moved=1e-4)["y"]
    found = run(fused_linear_plus_low_rank, x, *nothing, A, B, moved=1e-4)["y"]
    # h, the factors and the result rounded to 8 bits; factors that had been rounded before the
    # difference was taken would leave nothing of it
    assert (found.double() - exact).norm() <= 2**-7 * exact.norm()


def test_gradcheck():
    x, W, bias, A, B = (t.double() for t in inputs(tokens=5, n=4, m=3, r=2))
    for t in (x, A, B):
        t.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, A, B: fused_linear_plus_low_rank(x, W, bias, Pair(A, B, 0.5)), (x, A, B)
    )


def test_second_derivatives_are_refused_not_wrong():
    x, W, bias, A, B = inputs(tokens=3)
    A.requires_grad_()
    y = fused_linear_plus_low_rank(x, W, bias, Pair(A, B, 1.0))
    (dA,) = torch.autograd.grad(y.square().sum(), A, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dA.sum().backward()


def test_it_keeps_one_input_and_one_thin_tensor():
    x, W, bias, A, B = inputs(torch.bfloat16)
    for t in (x, A, B):
        t.requires_grad_()
    kept = {}

    def pack(t):
        kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fused_linear_plus_low_rank(x, W, bias, Pair(A, B, 0.5))
    own = sum(size for at, size in kept.items() if at not in {t.data_ptr() for t in (W, A, B)})
    assert own == 2 * x.numel() + 4 * x.shape[1] * A.shape[0]


def test_layers_use_it_and_run_without_it(monkeypatch):
    calls = []

    def spy(*args):
        calls.append(1)
        return fused_linear_plus_low_rank(*args)

    layer = nn.Linear(6, 5).requires_grad_(False)
    (site,) = find_sites(layer)
    install(site, {"lora": LowRank(torch.randn(5, 2), torch.randn(2, 6))})
    x = torch.randn(3, 6)
    monkeypatch.setitem(kernels, linear_plus_low_rank, spy)
    fast = layer(x)
    assert calls
    monkeypatch.delitem(kernels, linear_plus_low_rank)
    # fp32, sums of 6 products of order 1
    torch.testing.assert_close(layer(x), fast, rtol=0, atol=2e-6)


def test_trained_bases_and_autocast_take_the_plain_form():
    x, W, bias, A, B = inputs(tokens=3)
    W.requires_grad_()
    assert (
        "FusedLowRank"
        not in type(fused_linear_plus_low_rank(x, W, bias, Pair(A, B, 1.0)).grad_fn).__name__
    )
    W.requires_grad_(False)
    A.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = fused_linear_plus_low_rank(x, W, bias, Pair(A, B, 1.0))
    assert y.dtype == torch.bfloat16
