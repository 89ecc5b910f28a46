"""Properties of all adapters: one rounding at a merge, one product for two adapters."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from eckart.linear import find_sites, fold, kernels, linear_plus_term
from eckart.linear.layers import LinearSum
from eckart.methods.weights.block_lora import BlockLoRA
from eckart.methods.weights.bone import Bone
from eckart.methods.weights.codyra import CoDyRA
from eckart.methods.weights.dora import DoRA
from eckart.methods.weights.dylora import DyLoRA
from eckart.methods.weights.lamda import LaMDA
from eckart.methods.weights.loldu import LoLDU
from eckart.methods.weights.lora import LoRA
from eckart.methods.weights.lora_sb import LoRASB
from eckart.methods.weights.nola import NOLA
from eckart.methods.weights.randlora import RandLoRA
from eckart.recipe import Recipe, attach
from tests.conftest import batch_for, randomise, tiny

F64 = torch.float64
METHODS = {
    "lora": LoRA(rank=3, targets=("map",)),
    "pissa": LoRA(rank=3, init="pissa", targets=("map",)),
    "dora": DoRA(rank=3, targets=("map",)),
    "bone tile": Bone(rank=5, targets=("map",)),
    "bone mini": Bone(rank=5, mode="mini", mini_rank=4, targets=("map",)),
    "bone bat": Bone(rank=5, mode="bat", targets=("map",)),
    "nola": NOLA(rank=3, bases=20, targets=("map",)),
    "randlora": RandLoRA(rank=5, scale=2.0, targets=("map",)),
    "loldu": LoLDU(rank=7, targets=("map",)),
    "lamda": LaMDA(rank=3, targets=("map",)),
    "dylora": DyLoRA(rank=3, targets=("map",)),
    "codyra": CoDyRA(rank=3, targets=("map",)),
    "lora-xs": LoRASB(rank=3, init="xs", core="zero", targets=("map",)),
    "block-lora": BlockLoRA(rank=4, blocks=2, targets=("map",)),
    "block-lora arms": BlockLoRA(rank=4, blocks=2, form="arms", targets=("map",)),
}
M, N, TOKENS = 18, 27, 40  # no rank above divides both sides; more tokens than either


class One(nn.Module):
    """A model of one map."""

    def __init__(self, m=M, n=N):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.map = nn.Linear(n, m)

    def forward(self, x):
        return self.map(x)


def carried(name, dtype, m=M, n=N):
    model = One(m, n)
    handle = attach(model, Recipe(weights=METHODS[name]), steps=10)
    model.to(dtype)
    randomise(handle)
    return model, handle, torch.randn(TOKENS, n, generator=torch.Generator().manual_seed(1)).to(F64)


@pytest.mark.parametrize("name", METHODS)
def test_a_merge_rounds_once(name):
    model, _, x = carried(name, torch.float32)
    exact = model.map.merged()  # fp64
    (site,) = find_sites(model)
    merged = fold(site).double()
    # An entry is off by half a unit of itself, so y by no more than 4 eps sum |x| |w|
    bound = 4 * torch.finfo(torch.float32).eps * (x.abs() @ exact.abs().mT)
    assert ((x @ merged.mT - x @ exact.mT).abs() <= bound).all()
    assert not torch.equal(merged, exact)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("m, n", [(M, N), (N, M)])
def test_fewer_products_compute_the_plain_sum(name, m, n, monkeypatch):
    model, handle, x = carried(name, F64, m, n)

    def run():
        inputs = x.clone().requires_grad_()
        y = model(inputs)
        weights = torch.linspace(-1, 1, y.numel(), dtype=F64).view_as(y)
        trained = list(handle.trainable().values())
        return y, *torch.autograd.grad((y * weights).sum(), [inputs, *trained], allow_unused=True)

    fast = run()
    monkeypatch.setattr(LinearSum, "fused", lambda *_: None)
    monkeypatch.setattr("eckart.linear.layers.kernels", {})
    # fp64, sums of some hundred products of order 1 in another order
    torch.testing.assert_close(fast, run(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["bone bat", "randlora"])
def test_the_base_in_the_terms_product_is_exact_at_the_start(name):
    model = One()
    x = torch.randn(TOKENS, N, generator=torch.Generator().manual_seed(1))
    expected = model(x)
    handle = attach(model, Recipe(weights=METHODS[name]))
    (term,) = (t for by_name in handle.terms().values() for t in by_name.values())
    assert term.with_base(x, model.map.weight, None) is not None
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", ["bone bat", "randlora"])
def test_gradients_through_one_product_for_both(name):
    model, handle, x = carried(name, F64)
    (term,) = (t for by_name in handle.terms().values() for t in by_name.values())
    names, tensors = zip(*term.named_parameters(), strict=True)

    def forward(x, *tensors):
        for key, tensor in zip(names, tensors, strict=True):
            term._parameters.pop(key, None)
            setattr(term, key, tensor)
        return term.with_base(x, model.map.weight, model.map.bias)

    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    assert gradcheck(forward, (x[:30].clone().requires_grad_(), *tensors))


def test_without_kernels_all_runs(monkeypatch):
    model, _, x = carried("lora", F64)
    fast = model(x)
    assert kernels[linear_plus_term] is not linear_plus_term
    monkeypatch.setattr("eckart.linear.layers.kernels", {})
    torch.testing.assert_close(model(x), fast, rtol=0, atol=1e-12)


BESIDE = ["bone tile", "bone mini", "bone bat", "randlora"]


def in_bf16(name, m, n):
    """A bf16 map with fp32 factors, an input and the gradient of its output."""
    model = One(m, n).bfloat16()
    handle = attach(model, Recipe(weights=METHODS[name]))
    randomise(handle)
    g = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(TOKENS, size, generator=g).bfloat16() for size in (n, m))
    return model, handle, x, dy


def gradients(y, x, handle, dy):
    return torch.autograd.grad((y * dy.to(y.dtype)).sum(), [x, *handle.trainable().values()])


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("m, n", [(M, N), (N, M)])
def test_beside_a_bf16_base_the_error_is_at_most_twice_the_plain_forms(
    name, m, n, emulated, monkeypatch
):
    monkeypatch.setattr("eckart.linear.products.BF16_ON_CPU", not emulated)
    model, handle, x, dy = in_bf16(name, m, n)
    assert all(p.dtype == torch.float32 for p in handle.trainable().values())
    x = x.requires_grad_()
    y = model(x)
    fast = y, *gradients(y, x, handle, dy)
    (term,) = (t for by_name in handle.terms().values() for t in by_name.values())
    weight, bias = model.map.weight, model.map.bias
    plain = nn.functional.linear(x, weight, bias) + (x.float() @ term.dense().mT).bfloat16()
    plain = plain, *gradients(plain, x, handle, dy)
    model.double()
    y = model(wide := x.detach().double().requires_grad_())
    exact = y, *gradients(y, wide, handle, dy)
    for ours, theirs, true in zip(fast, plain, exact, strict=True):
        ours, theirs = (torch.linalg.norm(t.double() - true) for t in (ours, theirs))
        # sums of 40 tokens in fp32, in another order: 1e-6 of a gradient of this size
        assert ours <= 2 * theirs + 1e-6 * torch.linalg.norm(true)


# A gain takes the bias out of the product.
AT_BASE = [name for name in METHODS if name != "dora"]


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", AT_BASE)
def test_it_starts_at_the_base_bit_for_bit(name, dtype, emulated, monkeypatch):
    monkeypatch.setattr("eckart.linear.products.BF16_ON_CPU", not emulated)
    model, x = One().to(dtype), torch.randn(TOKENS, N).to(dtype)
    expected = model(x)
    attach(model, Recipe(weights=METHODS[name]), steps=10)
    assert torch.equal(model(x), expected)


def test_maps_of_one_input_keep_one_fold_of_it(monkeypatch):
    model = tiny("llama").train()
    attach(model, Recipe(weights=Bone(rank=3)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(**batch_for("llama"))
    folds = {t.untyped_storage().data_ptr() for t in kept if t.ndim == 3 and t.shape[-1] == 3}
    layers, inputs = 2, 4  # of q, k, v; o; gate, up; down
    assert len(folds) == layers * inputs
