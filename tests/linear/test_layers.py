"""A structured layer computes the layer with its merged matrix, for every kind of layer."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eckart.errors import UsageError
from eckart.linear import LowRank, Site, find_sites, fold, install, uninstall
from eckart.linear.lowrank import low_rank


def random_term(site: Site, rank: int = 3, **options) -> LowRank:
    m, n = site.shape
    g = site.generator
    B = torch.randn(*site.leading, m, rank, generator=g, dtype=torch.float64)
    A = torch.randn(*site.leading, rank, n, generator=g, dtype=torch.float64)
    return LowRank(B, A, 0.5, **options)


def layers() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 9, 7, generator=g, dtype=torch.float64)
    conv = {"kernel_size": (3, 2), "dtype": torch.float64}
    line, video = (
        torch.randn(2, 3, *size, generator=g, dtype=torch.float64) for size in ((17,), (6, 9, 7))
    )
    wide = {"stride": 2, "padding": (1, 2, 0), "dilation": (1, 2, 1)}
    return {
        "linear": (nn.Linear(7, 5).double(), torch.randn(2, 4, 7, generator=g).double()),
        "embedding": (nn.Embedding(11, 6).double(), torch.randint(0, 11, (2, 5), generator=g)),
        "conv": (nn.Conv2d(3, 4, stride=2, padding=1, dilation=2, **conv), image),
        "conv circular": (nn.Conv2d(3, 4, padding=1, padding_mode="circular", **conv), image),
        "conv of one image": (nn.Conv2d(3, 4, padding=1, **conv), image[0]),
        "conv 1d": (nn.Conv1d(3, 4, 3, 2, 1, 2).double(), line),
        "conv 1d reflect": (nn.Conv1d(3, 4, 5, padding=2, padding_mode="reflect").double(), line),
        "conv 1d same": (nn.Conv1d(3, 4, 3, padding="same", dilation=2).double(), line),
        "conv 3d": (nn.Conv3d(3, 4, (2, 3, 2), **wide).double(), video),
        "conv 3d circular": (
            nn.Conv3d(3, 4, 3, padding=1, padding_mode="circular").double(),
            video,
        ),
        "conv same": (nn.Conv2d(3, 4, padding="same", bias=False, **conv), image),
    }


@pytest.mark.parametrize("name", layers())
def test_sum_equals_the_merged_layer(name):
    layer, x = layers()[name]
    plain = copy.deepcopy(layer)
    (site,) = find_sites(layer)
    install(site, {"lora": random_term(site)})
    y = layer(x)
    assert not torch.allclose(y, plain(x))
    if name != "conv of one image":
        assert layer(x[:0]).shape == (0, *y.shape[1:])  # an expert or a shard without rows
    merged = fold(site)
    uninstall(layer)
    assert type(layer) is type(plain) and list(layer.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        layer.weight.copy_(merged)
    # fp64: sums of at most 18 products in another order
    torch.testing.assert_close(layer(x), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", layers())
def test_dropped_layer_has_a_read_only_weight(name):
    layer, x = layers()[name]
    (site,) = find_sites(layer)
    shape = layer.weight.shape
    install(site, {"factors": random_term(site)}, drop=True)
    assert "weight" not in dict(layer.named_parameters())
    y = layer(x)
    assert layer.weight.shape == fold(site).shape == shape
    with pytest.raises(AttributeError):
        layer.weight = None
    plain, _ = layers()[name]
    plain.load_state_dict({k: getattr(layer, k) for k in plain.state_dict()})
    # fp64: sums of at most 18 products in another order
    torch.testing.assert_close(plain(x), y, rtol=0, atol=1e-12)


def test_gain_multiplies_rows_and_not_the_bias():
    from eckart.linear import Gain

    class Twice(Gain):
        def factor(self, weight, terms):
            return torch.full(weight.shape[:-1], 2.0, dtype=weight.dtype)

    layer, x = layers()["linear"]
    expected = 2 * F.linear(x, layer.weight) + layer.bias
    (site,) = find_sites(layer)
    install(site, {"twice": Twice()})
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-13)


def test_start_is_subtracted_everywhere():
    layer, x = layers()["linear"]
    (site,) = find_sites(layer)
    term = random_term(site)
    start = LowRank(term.B.detach().clone(), term.A.detach().clone(), 0.5,
                    start=(term.B.detach().clone(), term.A.detach().clone()))  # fmt: skip
    torch.testing.assert_close(start(x), torch.zeros(2, 4, 5).double(), rtol=0, atol=1e-13)
    assert start.dense().abs().max() < 1e-13
    B, A = start.factors()
    assert B.shape == (5, 6) and A.shape == (6, 7)
    assert start.back(torch.ones(1, 2, 5).double()).abs().max() < 1e-13


def test_row_scaled_gradient_leaves_the_input_gradient_alone():
    g = torch.Generator().manual_seed(1)
    x, A, B = (torch.randn(*s, generator=g).double() for s in ((4, 7), (3, 7), (5, 3)))
    factor = torch.rand(5, generator=g).double() + 0.5
    term = LowRank(B, A, 0.7)
    term.branch_gradient = lambda B, A, scale: factor
    x.requires_grad_()
    dy = torch.randn(4, 5, generator=g).double()
    term(x).backward(dy)
    plain_x = x.detach().clone().requires_grad_()
    A2, B2 = (t.clone().requires_grad_() for t in (A, B))
    low_rank(plain_x, A2, B2, 0.7).backward(dy)
    torch.testing.assert_close(x.grad, plain_x.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(term.B.grad, factor[:, None] * B2.grad, rtol=0, atol=1e-12)
    dA = 0.7 * B.mT @ (factor[:, None] * (dy.mT @ x.detach()))
    torch.testing.assert_close(term.A.grad, dA, rtol=0, atol=1e-12)


def test_selecting_components_equals_zeroing_the_others():
    layer, x = layers()["linear"]
    (site,) = find_sites(layer)
    term, zeroed = random_term(site), random_term(site)
    with torch.no_grad():
        zeroed.B[:, 1] = 0
    term.select(torch.tensor([0, 2]))
    assert term.A.shape == (2, 7) and term.B.requires_grad
    torch.testing.assert_close(term(x), zeroed(x), rtol=0, atol=1e-13)


def test_tied_group_is_one_site_that_the_embedding_owns():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 11, bias=False)
            self.embed = nn.Embedding(11, 6)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    model = Tied().double()
    (site,) = find_sites(model)
    assert (site.path, site.ties, site.shape) == ("embed", ("head",), (6, 11))
    install(site, {"lora": random_term(site)})
    ids = torch.tensor([[1, 4, 10]])
    y, E = model(ids), model.embed.merged().mT  # [vocabulary, d]
    torch.testing.assert_close(y, E[ids] @ E.mT, rtol=0, atol=1e-12)
    assert sorted(model.state_dict()) == [
        "embed.lora.A",
        "embed.lora.B",
        "embed.weight",
        "head.weight",
    ]


def test_a_convolution_in_groups_is_refused_by_name():
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2))
    (site,) = find_sites(model)
    with pytest.raises(UsageError, match="a convolution in groups cannot carry terms"):
        install(site, {"lora": random_term(site)})
    assert type(model[0]) is nn.Conv1d
