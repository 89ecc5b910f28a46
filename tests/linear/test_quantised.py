"""A layer of bitsandbytes is known by its names, and terms beside it see the matrix it stands for.

A stand-in with the package's own names and attributes: packed bytes [m n, 1] with their state in
4 bits, rows with their scales in 8.
"""

import sys
import types
from typing import NamedTuple

import pytest
import torch
from tests.conftest import batch_for, randomise, tiny
from tests.laws.matrix import logits, steps
from torch import nn
from torch.nn import functional as F

from eckart.errors import UsageError
from eckart.io import dense
from eckart.linear.sites import find_sites, quantised
from eckart.methods.weights.dora import DoRA
from eckart.methods.weights.lora import LoRA
from eckart.recipe import Recipe, attach
from eckart.recipe.fingerprint import fingerprint


class QuantState(NamedTuple):
    scale: float
    shape: torch.Size


class Params4bit(nn.Parameter):
    __module__ = "bitsandbytes.nn.modules"


class Int8Params(nn.Parameter):
    __module__ = "bitsandbytes.nn.modules"


def dequantize_4bit(data, state):
    return data.reshape(state.shape).float() * state.scale


def int8_vectorwise_dequant(data, rows):
    return data.float() * rows[:, None] / 127


class Linear4bit(nn.Linear):
    """Packed bytes, whose shape says nothing of the matrix."""

    @classmethod
    def of(cls, layer):
        new = cls(layer.in_features, layer.out_features, layer.bias is not None)
        scale = float(layer.weight.detach().abs().max()) / 7
        codes = (layer.weight.detach() / scale).round().to(torch.int8)
        new.weight = Params4bit(codes.reshape(-1, 1), requires_grad=False)
        new.weight.quant_state = QuantState(scale, layer.weight.shape)
        return new

    def forward(self, x):
        return F.linear(x, dequantize_4bit(self.weight.data, self.weight.quant_state))


class Linear8bitLt(nn.Linear):
    """Rows of bytes; their scales move from the weight to `state` at the first forward."""

    @classmethod
    def of(cls, layer):
        new = cls(layer.in_features, layer.out_features, layer.bias is not None)
        rows = layer.weight.detach().abs().amax(1)
        codes = (layer.weight.detach() / rows[:, None] * 127).round().to(torch.int8)
        new.weight = Int8Params(codes, requires_grad=False)
        new.weight.SCB, new.state = rows, types.SimpleNamespace(SCB=None)
        return new

    def forward(self, x):
        if self.weight.SCB is not None:
            self.state.SCB, self.weight.SCB = self.weight.SCB, None
        return F.linear(x, int8_vectorwise_dequant(self.weight.data, self.state.SCB))


@pytest.fixture(autouse=True)
def package(monkeypatch):
    functional = types.SimpleNamespace(
        dequantize_4bit=dequantize_4bit, int8_vectorwise_dequant=int8_vectorwise_dequant
    )
    module = types.ModuleType("bitsandbytes")
    module.functional = functional
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)


def on(cls):
    model = tiny("llama")
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and path != "lm_head":
            model.set_submodule(path, cls.of(layer))
    return model


def written_out(model):
    twin = tiny("llama")
    for site in find_sites(model):
        if quantised(site.raw):
            twin.get_submodule(site.path).weight.data = site.weight(torch.float32).clone()
    return twin


@pytest.mark.parametrize(
    "method", [LoRA(rank=4), LoRA(rank=4, init="pissa"), DoRA(rank=4)], ids=str
)
@pytest.mark.parametrize("cls", [Linear4bit, Linear8bitLt])
def test_terms_beside_it_are_terms_on_the_matrix_it_stands_for(cls, method):
    model, batch = on(cls), batch_for("llama")
    twin = attach(written_out(model), Recipe(weights=method))
    before = logits(model, batch)
    handle = attach(model, Recipe(weights=method))
    assert {s.matrix_shape for s in handle.sites.values()} >= {(48, 32), (32, 48), (16, 32)}
    randomise(handle)
    twin.load_named_state(handle.named_state())
    # fp32: the same products in another order
    torch.testing.assert_close(logits(model, batch), logits(twin.model, batch), rtol=0, atol=2e-5)
    losses = steps(handle, handle.optimizer(1e-2), [batch] * 8)
    assert losses[-1] < losses[0] - 0.1
    assert torch.equal(logits(handle.remove(), batch), before)
    assert type(model.model.layers[0].mlp.up_proj) is cls


@pytest.mark.parametrize("cls", [Linear4bit, Linear8bitLt])
def test_what_it_cannot_hold_is_refused_by_name(cls):
    model = on(cls)
    assert fingerprint(model) == fingerprint(on(cls)) != fingerprint(tiny("llama"))
    handle = attach(model, Recipe(weights=LoRA(rank=2)))
    with pytest.raises(UsageError, match=r"this base is quantised.*\n.*Params"):
        handle.merge()
    assert "is quantised" in dense.obstacle(handle)
