"""What attach() hands around: products, events, objectives, horizons, and what it refuses."""

import copy
import dataclasses
import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from torch import nn
from torch.func import functional_call, grad, vmap

from eckart.errors import EckartError, FileError, UsageError
from eckart.io.export import load
from eckart.linear import Structured
from eckart.methods.objective.distill import Distill
from eckart.methods.objective.orthogonality import Orthogonality
from eckart.methods.update.adamw import AdamW
from eckart.methods.update.galore import GaLore
from eckart.methods.weights.bone import Bone
from eckart.methods.weights.dense import Dense
from eckart.methods.weights.dora import DoRA
from eckart.methods.weights.dylora import DyLoRA
from eckart.methods.weights.lora import LoRA
from eckart.methods.weights.nola import NOLA
from eckart.methods.weights.randlora import RandLoRA
from eckart.recipe import Event, Precision, Recipe, attach, terms_off
from tests.conftest import batch_for, randomise, tiny
from tests.laws.matrix import logits, steps


def counting_mm(x, w):
    counting_mm.calls.append((tuple(x.shape), tuple(w.shape)))
    return x @ w


@dataclass(frozen=True)
class Counting(Precision):
    """A precision whose product leaves a trace, at all maps of the blocks but two."""

    multiplies: ClassVar = True

    def mm(self, site):
        inside = site.role[:4] in ("attn", "mlp.") and site.role != "mlp.down"
        return counting_mm if inside else None


@dataclass(frozen=True)
class Scheduled(LoRA):
    """LoRA that halves B after its second step, forgets its moments then, and notes draws."""

    drawn: ClassVar[list] = []

    def events(self):
        def halve(now):
            for by_name in now.terms.values():
                by_name["lora"].B.data.mul_(0.5)

        def note(now):
            self.drawn.append((now.step, torch.rand(1, generator=now.generator).item()))

        yield Event("halve", lambda step: step == 2, halve, moments="reset")
        yield Event("note", lambda step: step % 2 == 0, note, when="before")


@pytest.mark.parametrize(
    ("weights", "terms"),
    [(LoRA(rank=2), 12), (DoRA(rank=2), 12), (LoRA(rank=2, targets=("attn.q",)), 2), (Dense(), 0)],
)
def test_a_precision_computes_the_products_of_maps_and_terms(weights, terms):
    counting_mm.calls = []
    model = tiny("llama", torch.float64)
    before = {name: type(module) for name, module in model.named_modules()}
    handle = attach(model, Recipe(weights=weights, precision=Counting()))
    model.to(torch.float64)
    randomise(handle)
    y = logits(model, batch_for("llama"))
    shapes = [w for _, w in counting_mm.calls]
    assert shapes.count((32, 32)) == 2 * 2 and shapes.count((32, 48)) == 2 * 2  # q, o; gate, up
    assert shapes.count((32, 2)) == terms  # A of each term
    assert len(shapes) == 12 + 2 * terms  # all maps but the two that it leaves alone, A and B
    for module in model.modules():
        if isinstance(module, Structured):
            module._sum.mm = torch.matmul
    # the same numbers by another order of sums, in fp64
    torch.testing.assert_close(logits(model, batch_for("llama")), y, rtol=0, atol=1e-12)
    handle.remove()
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_events_run_at_the_optimizers_steps_and_reset_moments():
    Scheduled.drawn.clear()
    model = tiny("llama")
    handle = attach(model, Recipe(weights=Scheduled(rank=2)))
    optimizer = handle.optimizer(lr=1e-2)
    batch = batch_for("llama")
    steps(handle, optimizer, [batch] * 2)
    B = handle.terms()["model.layers.0.self_attn.q_proj"]["lora"].B
    assert handle.events.step == 2 and B not in optimizer.state
    assert [step for step, _ in Scheduled.drawn] == [0]
    plain = attach(tiny("llama"), Recipe(weights=LoRA(rank=2)))
    steps(plain, plain.optimizer(lr=1e-2), [batch] * 2)
    twice = plain.terms()["model.layers.0.self_attn.q_proj"]["lora"].B
    assert torch.equal(B, 0.5 * twice)
    steps(handle, optimizer, [batch])
    first = dict(Scheduled.drawn)
    Scheduled.drawn.clear()
    again = attach(tiny("llama"), Recipe(weights=Scheduled(rank=2)))
    steps(again, again.optimizer(lr=1e-2), [batch] * 3)
    assert dict(Scheduled.drawn) == first and len(set(first.values())) == 2


def test_a_penalty_adds_its_gradient_once_and_after_clipping():
    batch, weight = batch_for("llama"), 0.3
    handles = {}
    for name, objective in (("plain", ()), ("penalised", (Orthogonality(weight=weight),))):
        model = tiny("llama", torch.float64)
        handles[name] = attach(model, Recipe(weights=LoRA(rank=4), objective=objective))
        model.to(torch.float64)
        randomise(handles[name])
    moved = {}
    for name, handle in handles.items():
        seen = {}
        optimizer = handle.optimizer(lr=1.0, clip=1e-3)
        before = {n: p.detach().clone() for n, p in handle.trainable().items()}
        for _ in range(3):  # accumulation: the penalty must not count three times
            (handle.loss(batch, handle.model(**batch)) / 3).backward()
        if name == "penalised":
            expected = {
                n: g
                for p, g in handle.penalty_gradients().items()
                for n, q in handle.trainable().items()
                if q is p
            }
            assert len(expected) == len(handle.trainable())
        for group in optimizer.param_groups:  # what reaches the rule, seen through Adam's state
            assert group["lr"] == 1.0
        optimizer.step()
        for n, p in handle.trainable().items():
            seen[n] = optimizer.state[p]["exp_avg"] / 0.1
        moved[name] = (before, seen)
    for n, g in expected.items():
        difference = moved["penalised"][1][n] - moved["plain"][1][n]
        torch.testing.assert_close(difference, g, rtol=1e-9, atol=1e-12)


def test_distillation_of_a_fresh_adapter_costs_nothing_and_pulls_back_later():
    model, batch = tiny("llama"), batch_for("llama")
    handle = attach(model, Recipe(weights=LoRA(rank=4), objective=(Distill(weight=1.0),)))
    outputs = model(**batch)
    assert handle.loss(batch, outputs).abs() < 1e-6  # the base against itself, fp32
    randomise(handle, std=0.3)
    base = tiny("llama")
    with terms_off(model):
        assert torch.equal(model(**batch).logits, base(**batch).logits)
    losses = steps(handle, handle.optimizer(lr=1e-2), [batch] * 12)
    assert 0 < losses[-1] < 0.7 * losses[0]


def test_distillation_without_a_reference_says_so():
    with pytest.raises(UsageError) as error:
        model, batch = tiny("llama"), batch_for("llama")
        handle = attach(model, Recipe(weights=Dense(), objective=(Distill(),)))
        handle.loss(batch, model(**batch))
    assert "teacher" in str(error.value)


def test_a_loop_that_leaves_the_objective_out_is_stopped():
    model, batch = tiny("llama"), batch_for("llama")
    handle = attach(model, Recipe(weights=LoRA(rank=2), objective=(Distill(),)))
    optimizer = torch.optim.SGD(handle.trainable().values(), lr=0.1)
    model(**batch).loss.backward()
    with pytest.raises(UsageError, match="this loop leaves the objective out"):
        optimizer.step()


def test_illegal_combinations_are_refused_when_the_recipe_is_built():
    with pytest.raises(UsageError) as error:
        Recipe(weights=LoRA(), update=GaLore())
    assert str(error.value).splitlines() == [
        "these two do not combine",
        "  update = galore  changes whole matrices",
        "  weights = lora   trains no whole matrix that a rule may change",
        "Type weights=dense update=galore, or update=adamw.",
    ]
    with pytest.raises(UsageError, match="adamw is not a choice for weights"):
        Recipe(weights=AdamW())


def with_a_nan():
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    return model


REFUSED = {
    "overrides[0].rank has the wrong type": lambda: LoRA(
        overrides=({"match": "attn.q", "rank": "8"},)
    ),
    "overrides[0].match has the wrong type": lambda: LoRA(overrides=({"match": 5},)),
    "the class LoRA is not a choice for weights": lambda: Recipe(weights=LoRA),
    "Type weights=eckart.LoRA().": lambda: Recipe(weights="lora"),
    "a recipe needs weights": lambda: attach(tiny("llama"), LoRA()),
    "no module of this name to train": lambda: attach(
        tiny("llama"), Recipe(weights=LoRA()), also_train=("lm_haed",)
    ),
    "this model has no weights yet": lambda: attach(
        tiny("llama").to("meta"), Recipe(weights=LoRA())
    ),
    "parts of this model lie on the CPU or on a disk between passes": lambda: attach(
        cpu_offload(tiny("llama"), execution_device=torch.device("cpu")), Recipe(weights=LoRA())
    ),
    "the folder comes first": lambda: load(tiny("llama"), "adapter"),
    "lora needs gradients": lambda: attach(
        tiny("llama"), Recipe(weights=LoRA(init="gradient")), calibration=[]
    ),
    "there is something of this name already": lambda: attach(
        copy.deepcopy(attach(tiny("llama"), Recipe(weights=LoRA())).model), Recipe(weights=LoRA())
    ),
    "a weight is not finite": lambda: attach(
        with_a_nan(), Recipe(weights=LoRA(rank=2, init="pissa"))
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_said(what):
    with pytest.raises(EckartError, match=re.escape(what)):
        REFUSED[what]()


def test_hooks_of_accelerate_run_the_terms_and_come_off_again():
    model, batch = tiny("llama"), batch_for("llama")
    base = logits(model, batch)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    handle = attach(model, Recipe(weights=LoRA(rank=2)))
    randomise(handle)
    assert not torch.allclose(logits(model, batch), base)
    handle.remove()
    assert torch.equal(logits(model, batch), base)
    model.model.layers[0].mlp.up_proj.forward = lambda x: x
    with pytest.raises(UsageError, match="its own forward was replaced"):
        attach(remove_hook_from_submodules(model) or model, Recipe(weights=LoRA(rank=2)))


@pytest.mark.parametrize("method", [Bone(rank=2), Bone(rank=2, mode="bat"), RandLoRA(rank=2)])
def test_a_base_that_is_trained_too_has_its_gradients(method):
    model = nn.Sequential(nn.Linear(6, 5))
    attach(model, Recipe(weights=dataclasses.replace(method, targets=("0",))))
    model.requires_grad_(True)
    model(torch.randn(40, 6)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("method", [LoRA(rank=2), NOLA(rank=2, bases=3), Bone(rank=2)])
def test_experts_without_tokens_give_none(method):
    model = tiny("mixtral")
    attach(model, Recipe(weights=dataclasses.replace(method, targets=("experts",))))
    experts = model.model.layers[0].mlp.experts
    chosen = torch.zeros(0, 2, dtype=torch.long)
    y = experts(torch.zeros(0, 32, requires_grad=True), chosen, torch.zeros(0, 2))
    assert y.shape == (0, 32)
    y.sum().backward()


def test_the_default_device_is_not_where_draws_are_made():
    with torch.device("meta"):
        handle = attach(tiny("llama"), Recipe(weights=LoRA(rank=2)))
    assert not any(p.is_meta for p in handle.model.parameters())


def test_a_handle_that_has_left_means_nothing_any_more():
    handle = attach(tiny("llama"), Recipe(weights=LoRA(rank=2)))
    handle.remove()
    for use in (handle.optimizer, handle.named_state, handle.merge):
        with pytest.raises(UsageError, match="this handle was removed, or merged"):
            use()


def test_a_failed_calibration_leaves_the_model_as_it_was():
    model, batch = tiny("llama").train(), {"input_ids": batch_for("llama")["input_ids"]}
    with pytest.raises(UsageError, match="the model gave no loss"):
        attach(model, Recipe(weights=LoRA(init="gradient")), calibration=[batch])
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_a_learning_rate_of_zero_is_one():
    handle = attach(tiny("llama"), Recipe(weights=LoRA(rank=2)))
    assert handle.optimizer(lr=0.0).param_groups[0]["lr"] == 0


def test_terms_stay_off_when_they_were_off():
    model, batch = tiny("llama"), batch_for("llama")
    handle = attach(model, Recipe(weights=LoRA(rank=2)))
    randomise(handle)
    with terms_off(model):
        with terms_off(model):
            base = logits(model, batch)
        assert torch.equal(logits(model, batch), base)


@pytest.mark.parametrize("method", [NOLA(rank=2, bases=3), DyLoRA(rank=2)])
def test_what_sites_share_does_not_disturb_a_row_of_layers(method):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    x = torch.randn(2, 6)
    before = model(x)
    attach(model, Recipe(weights=dataclasses.replace(method, targets=("0", "1"))))
    torch.testing.assert_close(model(x), before)  # fp32, B A = 0


@pytest.mark.parametrize("method", [LoRA(rank=2), DoRA(rank=2), Bone(rank=2)])
def test_torch_func_gives_gradients_of_single_rows(method):
    model = nn.Sequential(nn.Linear(6, 5))
    handle = attach(model, Recipe(weights=dataclasses.replace(method, targets=("0",))))
    randomise(handle)
    rows = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))

    def loss(tensors, x):
        return functional_call(model, tensors, (x,)).square().sum()

    trained = handle.trainable()
    each = vmap(grad(loss), in_dims=(None, 0))(trained, rows)
    for i, x in enumerate(rows):
        alone = torch.autograd.grad(model(x).square().sum(), list(trained.values()))
        for found, expected in zip(each.values(), alone, strict=True):
            # fp32, sums of 6 products of order 1 in another order
            torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=1e-5)


def test_saved_tensors_that_do_not_fit_are_named():
    handle = attach(tiny("llama"), Recipe(weights=LoRA(rank=2, targets=("attn.q",))))
    state = {name: tensor.clone() for name, tensor in handle.named_state().items()}
    name = "model.layers.0.self_attn.q_proj.lora.A"
    lost = state.pop(name)
    with pytest.raises(FileError, match=r"q_proj\.lora\.A +is missing"):
        handle.load_named_state(state)
    with pytest.raises(FileError, match=r"shape \(3, 32\), expected \(2, 32\)"):
        handle.load_named_state({**state, name: torch.zeros(3, 32)})
    with pytest.raises(FileError, match=r"stray +has no place"):
        handle.load_named_state({**state, name: lost, "stray": lost})


def test_coverage_counts_every_element_once():
    model = tiny("gemma")
    handle = attach(model, Recipe(weights=LoRA(rank=2)))
    assert handle.coverage.parameters == sum(p.numel() for p in model.parameters())
    assert handle.coverage.total("trained") == sum(p.numel() for p in handle.trainable().values())
    dense = attach(tiny("llama"), Recipe(weights=Dense(), update=GaLore(rank=2)))
    assert dense.coverage.total("projected") == sum(
        site.raw.numel() for site in dense.sites.values() if site.role[:3] in ("att", "mlp")
    )
