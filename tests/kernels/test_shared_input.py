"""Maps of one input computed at once equal the maps computed one by one, and know when to stop."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from tests.tiny import ids, llama, train_by_chance
from torch import nn
from torch.utils.checkpoint import checkpoint

from eckart.kernels import shared_input
from eckart.kernels.low_rank import BLOCK, fused, map_of
from eckart.kernels.shared_input import peers_at_once
from eckart.linear import (
    LowRank,
    Pair,
    find_sites,
    install,
    kernels,
    linear_plus_low_rank,
    linear_plus_term,
)
from eckart.linear.peers import make_peers
from eckart.methods.weights.dora import Magnitude
from eckart.methods.weights.lora import LoRA
from eckart.recipe import Recipe, attach
from eckart.recipe.targets import same_input, sites_of

F64 = torch.float64


def draw(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Block(nn.Module):
    """Three maps of one input, like q, k and v, of different widths and ranks; some with gains."""

    def __init__(self, dtype=F64, gains=()):
        super().__init__()
        widths = {"q": 5, "k": 4, "v": 3}
        for i, (name, m) in enumerate(widths.items()):
            layer = nn.Linear(7, m).to(dtype).requires_grad_(False)
            (site,) = find_sites(layer)
            pair = draw(m, 2 + i, seed=i), draw(2 + i, 7, seed=9 + i)
            gain = {"magnitude": Magnitude(draw(m, seed=20 + i))} if name in gains else {}
            install(site, {"lora": LowRank(*pair, 0.5), **gain})
            self.add_module(name, layer)
        make_peers([self.q, self.k, self.v])

    def forward(self, x):
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


@pytest.fixture
def computed(monkeypatch):
    """How many maps each joint computation had."""
    counts = []

    def spy(x, maps):
        counts.append(len(maps))
        return fused(x, maps)

    monkeypatch.setattr(shared_input, "fused", spy)
    return counts


def gradients(block, x, run=None):
    x = x.clone().requires_grad_()
    block.zero_grad()
    y = (run or block)(x)
    (y * draw(*y.shape, seed=3).to(y.dtype)).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in block.parameters() if p.grad is not None)]


def one_by_one(block, x, monkeypatch, run=None):
    with monkeypatch.context() as patch:
        patch.setitem(kernels, linear_plus_term, linear_plus_term)
        return gradients(block, x, run)


@pytest.mark.parametrize("gains", ["", "qkv", "k"])
def test_peers_are_computed_at_once_and_the_same(gains, computed, monkeypatch):
    block, x = Block(gains=gains), draw(2, 6, 7)
    expected = one_by_one(block, x, monkeypatch)
    assert not computed
    # fp64, sums of at most 12 products of order 1 in another order
    torch.testing.assert_close(gradients(block, x), expected, rtol=0, atol=1e-13)
    assert computed == [3]
    if not gains:
        return
    for layer in (block.q, block.k, block.v):  # a gain scales no bias, and the merge says so too
        W, b = layer.merged(), layer.bias
        torch.testing.assert_close(layer(x), x @ W.T + b, rtol=0, atol=1e-13)


def test_results_go_with_the_graph_that_they_came_from(computed):
    block, x = Block(), draw(6, 7)
    for layer in (block.q, block.k, block.v):
        layer(x).sum().backward()
    assert computed == [3, 3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_the_plain_forms(dtype):
    x = draw(BLOCK + 9, 24, dtype=dtype)
    maps = [
        (draw(m, 24, seed=i, dtype=dtype), draw(4, 24, seed=5 + i), draw(m, 4, seed=8 + i))
        for i, m in enumerate((20, 12))
    ]

    def run(joint, exact=False):
        inputs = x.double() if exact else x.clone()
        inputs.requires_grad_()
        factors = F64 if exact else torch.float32
        leaves = [
            [t.detach().clone().to(factors).requires_grad_() for t in (A, B)] for _, A, B in maps
        ]
        Ws = [W.double() if exact else W for W, _, _ in maps]
        given = [(W, None, Pair(A, B, 0.5)) for W, (A, B) in zip(Ws, leaves, strict=True)]
        if joint:
            ys = fused(inputs, [map_of(*one) for one in given])
        else:
            ys = [linear_plus_low_rank(inputs, *one) for one in given]
        torch.autograd.backward(ys, [draw(*y.shape, seed=4, dtype=dtype).to(y.dtype) for y in ys])
        return [*ys, inputs.grad, *(t.grad for pair in leaves for t in pair)]

    exact = run(False, exact=True)
    for plain, ours, truth in zip(run(False), run(True), exact, strict=True):
        assert ours.dtype == plain.dtype

        def error(t, truth=truth):
            return (t.detach().double() - truth).norm() / truth.norm()

        assert error(ours) <= 2 * error(plain) + 1e-12


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_them_at_once(reentrant, computed, monkeypatch):
    block, x = Block(), draw(2, 6, 7)
    expected = one_by_one(block, x, monkeypatch)

    def run(x):
        return checkpoint(block, x, use_reentrant=reentrant)

    for _ in range(3):
        torch.testing.assert_close(gradients(block, x, run), expected, rtol=0, atol=1e-13)
    assert len(computed) == (3 if reentrant else 6) and set(computed) == {3}
    assert not block.q._sum.peers.waiting


def test_results_that_nobody_took_are_dropped(computed, monkeypatch):
    block, x, other = Block(), draw(6, 7), draw(6, 7, seed=1)
    expected = one_by_one(block, x, monkeypatch, lambda x: block.k(x))
    block.q(other)  # computes k for this input, which is never asked for
    found = gradients(block, x, lambda x: block.k(x))
    assert computed == [3, 3]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    assert block.q.lora.A.grad is None  # no gradient, not one of zero


def test_a_second_call_with_an_input_computes_again(computed):
    block, x = Block(), draw(6, 7)
    assert torch.equal(block.k(x), block.k(x))
    assert computed == [3, 3]


def test_an_input_that_changed_in_between_is_not_taken(monkeypatch):
    block, x = Block(), draw(6, 7)
    block.q(x)
    x.mul_(2)
    found = block.k(x)
    monkeypatch.setitem(kernels, linear_plus_term, linear_plus_term)
    torch.testing.assert_close(found, block.k(x), rtol=0, atol=1e-13)


def test_maps_with_hooks_dropout_or_trained_bases_stand_alone(computed, monkeypatch):
    def hooked(block):
        block.k.register_forward_pre_hook(lambda module, args: (args[0] * 2,))

    def dropped(block):
        block.k.lora.dropout = 0.5

    def trained(block):
        block.k.weight.requires_grad_()

    for change in (hooked, dropped, trained):
        block, x = Block(), draw(6, 7)
        change(block)
        for _ in range(3):
            torch.manual_seed(0)
            found = block(x)
        with monkeypatch.context() as patch:
            patch.setitem(kernels, linear_plus_term, linear_plus_term)
            torch.manual_seed(0)
            torch.testing.assert_close(found, block(x), rtol=0, atol=1e-13)
    assert not computed


def test_nothing_is_computed_ahead_without_a_gradient(computed):
    block, x = Block(), draw(6, 7)
    with torch.no_grad():
        for _ in range(3):
            block(x)
    with torch.inference_mode():
        block(x), block(draw(6, 7))
    assert not computed


def test_copies_pickles_and_removal_forget(computed):
    block, x = Block(), draw(6, 7)
    block.q(x)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert other.q._sum.peers is other.k._sum.peers
        assert other.q._sum.peers.members[0] is other.q and not other.q._sum.peers.waiting
        torch.testing.assert_close(other(x), block(x), rtol=0, atol=1e-13)


def test_peers_save_their_input_once():
    block, x, saved = Block(), draw(6, 7), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        block(x)
    assert sum(t.shape == x.shape for t in saved) == 1


def test_no_input_outlives_its_pass():
    block = Block()
    x = draw(6, 7)
    block(x).sum().backward()
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None


def test_a_model_trains_the_same_and_is_removed(computed, monkeypatch):
    def losses(kernel):
        with monkeypatch.context() as patch:
            patch.setitem(kernels, linear_plus_term, kernel)
            model = llama().double()
            handle = attach(model, Recipe(weights=LoRA(rank=3)))
            model.double()
            train_by_chance(handle)
            optimizer = handle.optimizer(lr=1e-2)
            found = []
            for _ in range(10):
                loss = model(input_ids=ids(), labels=ids()).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                found.append(loss.item())
            handle.remove()
            assert all("_sum" not in vars(module) for module in model.modules())
            return found

    # fp64 over ten steps of Adam, whose first steps divide by small gradients
    assert losses(peers_at_once) == pytest.approx(losses(linear_plus_term), abs=1e-9)
    assert sorted(set(computed)) == [2, 3]  # gate and up; q, k and v


def test_peers_are_found_by_their_roles_but_not_across_sequences():
    def maps(*names):
        return nn.ModuleDict({name: nn.Linear(4, 4) for name in names})

    attention = ("q_proj", "k_proj", "v_proj", "out_proj")
    block = nn.ModuleDict(
        {
            "self_attn": maps(*attention),
            "encoder_attn": maps(*attention),
            "mlp": maps("gate_proj", "up_proj", "down_proj"),
        }
    )
    sites = sites_of(nn.ModuleDict({"layers": nn.ModuleList([block])}))
    groups = [[site.path.removeprefix("layers.0.") for site in g] for g in same_input(sites)]
    assert groups == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
    ]


def test_compiled_it_stands_aside(computed):
    block, x = Block(torch.float32).float(), draw(6, 7, dtype=torch.float32)
    compiled = torch.compile(block, backend="eager", fullgraph=True)(x)
    assert not computed
    # fp32, sums of at most 12 products of order 1 in another order
    torch.testing.assert_close(compiled, block(x), rtol=0, atol=1e-5)
