"""What every update rule keeps to, whatever it does with a gradient."""

import dataclasses
import random
from functools import partial
from typing import Literal, get_args, get_origin, get_type_hints

import numpy
import pytest
import torch
from transformers import Trainer

from eckart.errors import UsageError
from eckart.optim import LowRankOptimizer
from eckart.optim.layerwise import peak_gradient_bytes
from eckart.recipe import Recipe, attach, registry
from eckart.recipe.recipe import fitted
from tests.conftest import batch_for, randomise, tiny
from tests.jobs.loops import mixed
from tests.laws.matrix import attached, slugs, small, steps, weights_methods
from tests.methods.updates import spectrum, start, train
from tests.optim.test_tuples import is_symmetric

RULES = slugs("update")
TRAINED = weights_methods() + RULES  # methods of weights schedule events


def prepared(slug, architecture="llama", dtype=torch.float32, **options):
    _, handle, batch = attached(slug, architecture, dtype)
    randomise(handle)
    return handle, handle.optimizer(lr=1e-2, **options), batch


def everything(handle, optimizer):
    """Weights, the optimizer's state and the events' count; of one step, by name."""
    state = optimizer.named_state_dict() | {
        f"event/{k}": v for k, v in handle.events.state_dict().items()
    }
    state |= {f"tensor/{k}": v for k, v in handle.named_state().items()}
    return {k: torch.as_tensor(v).detach().clone() for k, v in state.items()}


def differing(a, b):
    """Names whose bits differ; NaN marks what was not seen yet."""
    assert a.keys() == b.keys()
    return [k for k in a if not torch.equal(a[k].nan_to_num(), b[k].nan_to_num())]


def backward(handle, batch, scale=lambda loss: loss):
    scale(handle.loss(batch, handle.model(**batch))).backward()


def spoil(handle):
    for p in handle.trainable().values():
        if p.grad is not None:
            p.grad.fill_(torch.nan)


@pytest.mark.parametrize("slug", TRAINED)
def test_a_skipped_step_leaves_weights_state_and_events(slug):
    """Left out by the optimizer, or by a gradient scaler that never calls it."""
    handle, optimizer, batch = prepared(slug, clip=1.0)
    optimizer.skip_nonfinite = True
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    steps(handle, optimizer, [batch] * 3)  # the next one begins a period
    before = everything(handle, optimizer)

    backward(handle, batch)
    spoil(handle)
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.skipped and differing(everything(handle, optimizer), before) == []

    backward(handle, batch, scaler.scale)
    spoil(handle)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert differing(everything(handle, optimizer), before) == []

    steps(handle, optimizer, [batch])
    assert not optimizer.skipped
    assert any(not torch.equal(p, before[f"tensor/{n}"]) for n, p in handle.trainable().items())


def worded(slug):
    """A rule as it is, and with each other word that one of its fields may be."""
    update, hints = small(slug), get_type_hints(registry.load(slug))
    words = {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}
    others = [(n, w) for n, some in words.items() for w in some if w != getattr(update, n)]
    return [update, *(dataclasses.replace(update, **{name: word}) for name, word in others)]


PAIRED = [update for slug in RULES for update in worded(slug) if update.wants == "pairs"]


def scaled(update, dtype, scaler, count):
    """Some steps on LoRA under autocast, by a gradient scaler; everything after them."""
    recipe = Recipe(weights=fitted(small("lora"), update), update=update)
    handle, batch = attach(tiny("llama"), recipe), batch_for("llama")
    randomise(handle)
    optimizer = handle.optimizer(lr=1e-2, clip=1.0)
    for _ in range(count):
        with torch.autocast("cpu", dtype):
            loss = handle.loss(batch, handle.model(**batch))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return everything(handle, optimizer)


@pytest.mark.parametrize("update", PAIRED, ids=str)
def test_pairs_know_nothing_of_a_gradient_scaler(update):
    """A step that overflows never was, for counts and turns either: after three steps the scale
    grows past what fp16 holds, and shrinks back. Powers of two change no bit of a gradient."""
    Scaler = torch.amp.GradScaler
    if update.rule().passes > 1:
        with pytest.raises(UsageError, match="computes a gradient for each factor in turn"):
            scaled(update, torch.float16, Scaler("cpu"), 1)
        return
    grows, stays = (Scaler("cpu", 8.0, 2.0**40, 2.0**-40, interval) for interval in (3, 100))
    overflown = scaled(update, torch.float16, grows, 7)
    assert differing(overflown, scaled(update, torch.float16, stays, 6)) == []
    without = scaled(update, torch.bfloat16, Scaler("cpu", enabled=False), 4)
    assert differing(scaled(update, torch.bfloat16, Scaler("cpu"), 4), without) == []


def test_a_closure_is_refused_under_a_gradient_scaler_and_there_alone():
    """By name torch refuses it; by position it would step with gradients that are still scaled."""
    handle, optimizer, batch = prepared("adamw")
    before, scaler = everything(handle, optimizer), torch.amp.GradScaler("cpu", init_scale=4.0)
    closure = partial(backward, handle, batch, scaler.scale)
    closure()
    with pytest.raises(UsageError, match="does not see the gradients of a closure"):
        scaler.step(optimizer, closure)
    assert differing(everything(handle, optimizer), before) == []
    scaler.update()
    spoil(handle)
    scaler.step(optimizer)  # left out
    optimizer.zero_grad()
    optimizer.step(partial(backward, handle, batch))
    torch.amp.GradScaler("cpu", enabled=False).step(optimizer, partial(backward, handle, batch))
    assert optimizer.param_groups[0]["taken"] == 2


@pytest.mark.parametrize("slug", RULES)
def test_a_rate_of_zero_moves_nothing_and_the_state_goes_on(slug):
    """What a scheduler writes into the groups is what is applied."""
    handle, optimizer, batch = prepared(slug)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step != 1))
    weights, states = [], []
    for _ in range(3):
        steps(handle, optimizer, [batch])
        scheduler.step()
        found = everything(handle, optimizer)
        weights.append({k: v for k, v in found.items() if k.startswith("tensor/")})
        states.append({k: v for k, v in found.items() if "/lr" not in k})
    assert differing(weights[0], weights[1]) == []
    assert differing(weights[1], weights[2])
    assert [k for k in states[0] if k in states[1] and not torch.equal(states[0][k], states[1][k])]


@pytest.mark.parametrize("slug", [*RULES, "relora"])
def test_the_rates_that_a_trainer_logs_are_those_of_the_step(slug, tmp_path, monkeypatch):
    """Ratios of groups and the jagged warm-up of restarts included."""
    applied = []
    move = LowRankOptimizer.move

    def seen(self, *args):
        applied.append({float(group["lr"]) for group in self.param_groups})
        move(self, *args)

    monkeypatch.setattr(LowRankOptimizer, "move", seen)
    _, handle, _ = attached(slug, "llama")
    trained = mixed(handle, Trainer, tmp_path, 5, 1)
    trained.train()
    rows = [row for row in trained.state.log_history if "learning_rate" in row]
    found = [{v for k, v in row.items() if k.startswith("learning_rate")} for row in rows]
    assert found == applied and len({min(rates) for rates in applied}) > 3


@pytest.mark.parametrize("slug", RULES)
def test_zero_gradients_move_nothing_at_the_start_and_spoil_nothing_later(slug):
    handle, optimizer, batch = prepared(slug)
    start = {k: v.detach().clone() for k, v in handle.named_state().items()}
    for step in range(7):
        backward(handle, batch)
        if step in (0, 1, 4):
            for p in handle.trainable().values():
                if p.grad is not None:
                    p.grad.zero_()
        optimizer.step()
        optimizer.zero_grad()
        now = everything(handle, optimizer)
        assert all(t.isfinite().all() for k, t in now.items() if "cosines" not in k), step
        moved = [k for k, t in handle.named_state().items() if not torch.equal(t, start[k])]
        assert bool(moved) == (step > 1), (step, moved)  # no decay by default


@pytest.mark.parametrize("slug", RULES)
def test_a_tied_weight_is_one_parameter(slug):
    handle, optimizer, batch = prepared(slug, "gemma")
    steps(handle, optimizer, [batch] * 2)
    named = [(name, p) for name, p, _ in optimizer.named()]
    assert len({id(p) for _, p in named}) == len({name for name, _ in named}) == len(named)
    assert {id(p) for _, p in named} == {id(p) for p in handle.trainable().values()}
    counts = [s["step"] for s in optimizer.state.values() if "step" in s]
    assert max(counts) == 2


@pytest.mark.parametrize("slug", RULES)
def test_a_step_draws_from_no_global_generator_and_leaves_gradients(slug):
    """Processes agree whatever else they draw; and who reads gradients after a step finds them."""
    ends = []
    for seed in (1, 2):
        handle, optimizer, batch = prepared(slug)
        for _ in range(4):
            backward(handle, batch)
            before = {
                n: p.grad.clone() for n, p in handle.trainable().items() if p.grad is not None
            }
            random.seed(seed), numpy.random.seed(seed), torch.manual_seed(seed)
            drawn = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()
            optimizer.step()
            assert random.getstate() == drawn[0]
            assert numpy.random.get_state()[1].tolist() == drawn[1]
            assert torch.equal(torch.get_rng_state(), drawn[2])
            after = {n: p.grad for n, p in handle.trainable().items() if p.grad is not None}
            assert all(torch.equal(after[n], before[n]) for n in after if n in before)
            optimizer.zero_grad()
        ends.append(everything(handle, optimizer))
    assert differing(*ends) == []


def turns(slug):
    """Does its rule treat rows as columns, on a matrix that is in no block and no pair?"""
    rule = small(slug).rule()
    return rule.pair is None and rule.blocks is None and is_symmetric(rule)


SYMMETRIC = [slug for slug in RULES if turns(slug)]


@pytest.mark.parametrize("slug", SYMMETRIC)
def test_a_transposed_run_is_the_run_transposed(slug):
    """Where no part is drawn for one side; pairs are turned in tests/optim/test_pair.py."""
    rule, grads = small(slug).rule(), spectrum((9, 6), 10)
    path, _ = train(rule, start((9, 6)), grads, weight_decay=0.1)
    turned, _ = train(rule, start((9, 6)).T, [G.T for G in grads], weight_decay=0.1)
    torch.testing.assert_close(path[-1], turned[-1].T, rtol=0, atol=1e-9)  # fp64, 10 steps


@pytest.mark.parametrize("slug", [s for s in RULES if small(s).wants != "pairs"])
def test_the_order_of_parameters_changes_nothing(slug):
    """What is drawn or spread over steps is so by name."""
    rule = dataclasses.replace(small(slug).rule(), blocks=None)
    shapes = {"a": (9, 6), "b": (6, 9), "c": (9, 6)}
    ends = []
    for names in ("abc", "cba"):
        params = {name: torch.nn.Parameter(start(shapes[name])) for name in names}
        optimizer = LowRankOptimizer(list(params.items()), 0.02, rule=rule)
        for step in range(7):
            for seed, name in enumerate("abc"):
                params[name].grad = spectrum(shapes[name], 7, seed)[step]
            optimizer.step()
        ends.append(params)
    for name in shapes:  # fp64: batched products in another order
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("slug", RULES)
def test_gradients_are_freed_as_they_come_or_it_is_said_that_none_would_be(slug):
    handle, optimizer, batch = prepared(slug, dtype=torch.float64)
    params, peak = list(handle.trainable().values()), 0

    def look(_):
        nonlocal peak
        low = [] if optimizer.projected is None else optimizer.projected.low.values()
        alive = [*low, *(p.grad for p in params if p.grad is not None)]
        peak = max(peak, sum(t.numel() * t.element_size() for t in alive))

    if all(group["rule"].projector.identity for group in optimizer.param_groups):
        with pytest.raises(UsageError, match="layer-wise mode frees nothing here"):
            optimizer.attach_layerwise("first")
        return
    for p in params:
        p.register_post_accumulate_grad_hook(look)  # before ours: sees each gradient come
    optimizer.attach_layerwise("first")
    other, plain, _ = prepared(slug, dtype=torch.float64)
    steps(handle, optimizer, [batch] * 5)
    steps(other, plain, [batch] * 5)
    for (name, p), q in zip(handle.trainable().items(), other.trainable().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9, msg=name)  # fp64, 5 steps
    assert peak <= peak_gradient_bytes(optimizer.param_groups, "first")
    assert peak < 0.6 * sum(p.numel() * p.element_size() for p in params)


ROUNDS = [slug for slug in RULES if "rounding" in registry.find(slug).fields]


@pytest.mark.parametrize("slug", ROUNDS)
def test_bf16_weights_are_rounded_by_chance_over_fp32_moments_where_a_rule_offers_it(slug):
    wide = {"state_dtype": "float32"} if "state_dtype" in registry.find(slug).fields else {}
    weights = []
    for rounding in ("nearest", "stochastic"):
        update = small(slug, rounding=rounding, **wide)
        model = tiny("llama", torch.bfloat16)
        handle = attach(model, Recipe(weights=small("dense"), update=update))
        optimizer = handle.optimizer(lr=1e-4, clip=1.0)
        steps(handle, optimizer, [batch_for("llama")] * 4)
        for p, state in optimizer.state.items():
            moments = [state[k] for k in ("exp_avg", "exp_avg_sq") if k in state]
            assert all(t.dtype == (torch.float32 if wide else p.dtype) for t in moments)
        weights.append(torch.cat([p.detach().flatten() for p in handle.trainable().values()]))
    assert weights[0].dtype == torch.bfloat16
    moved = [(w != weights_of_tiny()).double().mean() for w in weights]
    assert moved[1] > moved[0]  # steps of 1e-4 are mostly below half a bf16 step


def weights_of_tiny():
    """All of the tiny model's weights in bf16, before any step."""
    return torch.cat([p.detach().flatten() for p in tiny("llama", torch.bfloat16).parameters()])
