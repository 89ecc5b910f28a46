"""DoRA: what its paper promises; the norm is computed once and without the dense matrix."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from eckart.io import peft
from eckart.linear import LowRank, find_sites, install
from eckart.methods.weights import dora
from eckart.methods.weights.dora import DoRA, Magnitude, row_norms
from eckart.recipe import Recipe, attach
from tests.methods.lawful import draw

F64 = torch.float64


def layer_with(B, A, s, g, W, bias=None):
    layer = nn.Linear(W.shape[1], W.shape[0], bias=bias is not None, dtype=W.dtype)
    layer.requires_grad_(False)
    layer.weight.copy_(W)
    if bias is not None:
        layer.bias.copy_(bias)
    (site,) = find_sites(layer)
    install(site, {"lora": LowRank(B, A, s), "magnitude": Magnitude(g)})
    return layer


def test_the_cheap_norm_is_the_norm():
    W, B, A = draw(9, 14), draw(9, 3, seed=1), draw(3, 14, seed=2)
    expected = (W + 0.5 * B @ A).norm(dim=1)
    torch.testing.assert_close(row_norms(W, B, A, 0.5), expected, rtol=1e-13, atol=0)
    found = row_norms(W.float(), B.float(), A.float(), 0.5)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    assert torch.isfinite(row_norms(W * 0, B * 0, A, 0.5)).all()  # rows of zeros


@pytest.mark.parametrize("bias", [None, draw(6, seed=6)])
def test_outputs_and_gradients_are_those_of_a_constant_norm(bias):
    W, x, dy = draw(6, 8), draw(5, 8, seed=3), draw(5, 6, seed=4)
    B, A, g = draw(6, 2, seed=1), draw(2, 8, seed=2), draw(6, seed=5)
    layer = layer_with(B.clone(), A.clone(), 0.5, g.clone(), W, bias)
    inputs = x.clone().requires_grad_()
    y = layer(inputs)
    y.backward(dy)
    leaves = [t.clone().requires_grad_() for t in (x, A, B, g)]
    x_, A_, B_, g_ = leaves
    V = W + 0.5 * B_ @ A_
    expected = (x_ @ V.T) * (g_ / V.detach().norm(dim=1)) + (0 if bias is None else bias)
    expected.backward(dy)
    # fp64, sums of at most 8 products of order 1 in another order
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    found = (inputs.grad, layer.lora.A.grad, layer.lora.B.grad, layer.magnitude.g.grad)
    torch.testing.assert_close(found, tuple(t.grad for t in leaves), rtol=0, atol=1e-12)


def test_the_length_of_a_row_does_not_matter():
    B, A, W, c = draw(6, 2, seed=1), draw(2, 8, seed=2), draw(6, 8), 0.1 + draw(6).abs()[:, None]
    x, g = draw(5, 8, seed=3), draw(6, seed=5)
    one, other = layer_with(B, A, 1.0, g, W), layer_with(c * B, A, 1.0, g, c * W)
    torch.testing.assert_close(one(x), other(x), rtol=0, atol=1e-12)


def test_the_norm_is_made_once_per_step(monkeypatch):
    made = []

    def counted(*args):
        made.append(1)
        return row_norms(*args)

    monkeypatch.setattr(dora, "row_norms", counted)
    layer = layer_with(draw(6, 2, seed=1), draw(2, 8, seed=2), 0.5, draw(6, seed=5), draw(6, 8))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for step in range(1, 4):
        for micro in range(3):
            layer(draw(5, 8, seed=micro)).square().sum().backward()
        layer.eval(), layer(draw(5, 8)), layer.train()
        assert len(made) == step
        optimizer.step()
    layer.lora.B.data.zero_()  # past the version counters
    layer(draw(5, 8))
    assert len(made) == 4


class Convolution(nn.Module):
    """A model of one convolution with fixed weights."""

    def __init__(self, kind, kernel):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv = kind(3, 5, kernel, stride=2, padding=1)
        self.config = {"model_type": "custom"}

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize(
    "kind, kernel, size", [(nn.Conv2d, (3, 2), (2, 3, 9, 7)), (nn.Conv1d, 3, (2, 3, 11))]
)
def test_convolutions_compute_what_peft_computes(kind, kernel, size, tmp_path):
    settings = LoraConfig(r=2, lora_alpha=3, target_modules=["conv"], use_dora=True)
    theirs = get_peft_model(Convolution(kind, kernel), settings)
    g = torch.Generator().manual_seed(1)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.rand(parameter.shape, generator=g))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, x = Convolution(kind, kernel), torch.randn(size, generator=g)
    peft.load(ours, tmp_path / "theirs")
    # fp32, sums of at most 18 products of order 1
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=2e-5)

    model = Convolution(kind, kernel)
    handle = attach(model, Recipe(weights=DoRA(rank=2, targets=("conv",))))
    nn.init.normal_(handle.terms()["conv"]["lora"].B, generator=g)
    peft.save(handle, tmp_path / "ours")
    loaded = PeftModel.from_pretrained(Convolution(kind, kernel), tmp_path / "ours")
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=5e-5)
