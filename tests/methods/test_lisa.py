"""What LISA alone promises."""

import pytest
import torch
from torch import nn

from eckart import Recipe, attach
from eckart.errors import UsageError
from eckart.methods.update.lisa import LISA
from eckart.methods.weights.dense import Dense
from eckart.optim import LowRankOptimizer, storage
from tests import tiny
from tests.methods.blocks import D, Model, N, V, active, gradient, optimizer_of
from tests.methods.updates import PlainAdam


def train(model, optimizer, steps, see=lambda step: None):
    for step in steps:
        gradient(model, step)
        see(step)
        optimizer.step()
        optimizer.zero_grad()


def copy(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_resting_blocks_do_not_move_and_have_no_gradient():
    model = Model()
    optimizer = optimizer_of(model, LISA(blocks=2, every=3, weight_decay=0.1))
    sequence = []
    for period in range(6):
        before, now = copy(model), active(model)
        sequence.append(now)

        def see(step, now=now):
            for i, layer in enumerate(model.layers):
                assert all((p.grad is not None) == (i in now) for p in layer.parameters())
            alive = sum(p.grad.numel() for p in model.parameters() if p.grad is not None)
            assert alive == 2 * V * D + 2 * D + 2 * (D * D + D)  # rest and two blocks

        train(model, optimizer, range(3 * period, 3 * period + 3), see)
        for name, p in model.named_parameters():
            resting = name.startswith("layers") and int(name.split(".")[1]) not in now
            assert torch.equal(p, before[name]) == resting, name
    assert len(set(sequence)) > 1 and all(len(s) == 2 for s in sequence)


def test_a_gradient_of_zero_does_not_move_a_block_that_has_come_to_rest():
    """zero_grad(set_to_none=False) leaves zeros, on which momentum and decay would still act."""
    model = Model()
    optimizer = optimizer_of(model, LISA(blocks=2, every=2, moments="keep", weight_decay=0.1))
    rested = 0
    for step in range(10):
        gradient(model, step)
        optimizer.zero_grad(set_to_none=False)
        gradient(model, step)
        before, now = copy(model), active(model)
        optimizer.step()
        for i, layer in enumerate(model.layers):
            still = torch.equal(layer[0].weight, before[f"layers.{i}.0.weight"])
            assert still == (i not in now)
            rested += still
        optimizer.zero_grad(set_to_none=False)
    assert rested == 40


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_have_gradients_where_the_embedding_rests(reentrant):
    models = [tiny.llama() for _ in "ab"]
    recipe = Recipe(Dense(), LISA(blocks=1, every=2, train_rest=False))
    for model, checkpointing in zip(models, (False, True), strict=True):
        optimizer = attach(model, recipe).optimizer(lr=0.01)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        for step in range(4):
            ids = torch.randint(64, (2, 6), generator=torch.Generator().manual_seed(step))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    start = dict(tiny.llama().named_parameters())
    ends = [dict(model.named_parameters()) for model in models]
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in start)  # the same products, made twice
    moved = {n.split(".")[1] for n in start if not torch.equal(ends[0][n], start[n])}
    assert moved == {"layers"}


def test_all_blocks_and_kept_moments_are_adamw_bit_for_bit():
    models = Model(), Model()
    method = LISA(blocks=N, every=3, moments="keep", weight_decay=0.1)
    reference = torch.optim.AdamW(models[1].parameters(), 0.01, weight_decay=0.1)
    train(models[0], optimizer_of(models[0], method), range(10))
    train(models[1], reference, range(10))
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_without_blocks_only_the_rest_moves():
    model = Model()
    before = copy(model)
    train(model, optimizer_of(model, LISA(blocks=0, every=2)), range(5))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"embed.weight", "norm.weight", "norm.bias", "head.weight"}


def test_without_the_rest_only_blocks_move():
    model = Model()
    before = copy(model)
    train(model, optimizer_of(model, LISA(blocks=1, every=2, train_rest=False)), range(9))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith("layers") for name in moved)


@pytest.mark.parametrize("inner", ["adam", "adam8bit"])
def test_the_sequence_is_a_function_of_the_seed_and_survives_a_resume(inner, monkeypatch):
    monkeypatch.setattr(storage, "SMALLEST", 1)  # else nothing here would be stored in 8 bits
    method = LISA(blocks=2, every=3, inner=inner)

    def sequence(seed, stop=None):
        model = Model()
        optimizer = optimizer_of(model, method, seed=seed)
        found = []
        for step in range(18):
            if step == stop:  # in the middle of a period
                saved = optimizer.named_state_dict()
                for p in model.parameters():
                    p.requires_grad_(True)
                optimizer = optimizer_of(model, method, seed=seed)
                optimizer.load_named_state_dict(saved)
            train(model, optimizer, [step], lambda _: found.append(active(model)))
        state = optimizer.state[model.head.weight].values()
        eight = [v for v in state if isinstance(v, torch.Tensor) and v.dtype == torch.uint8]
        assert bool(eight) == (inner == "adam8bit")
        return found, copy(model)

    (whole, end), (resumed, other) = sequence(1), sequence(1, stop=7)
    assert whole == resumed and all(torch.equal(end[k], other[k]) for k in end)
    assert whole != sequence(2)[0]


def test_state_stays_within_its_bound():
    model = Model()
    optimizer = optimizer_of(model, LISA(blocks=2, every=2))
    bound = 2 * (2 * V * D + 2 * D + 2 * (D * D + D))
    for step in range(16):
        train(model, optimizer, [step])
        held = [v for s in optimizer.state.values() for v in s.values()]
        assert sum(v.numel() for v in held if isinstance(v, torch.Tensor)) <= bound
    rest = optimizer.state[model.head.weight]["step"]
    inside = [optimizer.state[model.layers[i][0].weight].get("step", 0) for i in active(model)]
    assert rest == 16 and all(count <= 2 for count in inside)


@pytest.mark.parametrize("moments", ["reset", "carry", "keep"])
def test_follows_adam_block_by_block(moments):
    """Each block's own Adam, written out, with the drawn sequence given."""
    model, lr = Model(), 0.01
    optimizer = optimizer_of(model, LISA(blocks=2, every=2, moments=moments), lr)
    W = copy(model)
    adam = PlainAdam(lr)
    drawn = None
    for step in range(12):
        if step % 2 == 0:
            last, drawn = drawn, active(model)
            for name in W:
                if not name.startswith("layers"):
                    continue
                block = int(name.split(".")[1])
                stays = last is not None and block in last and block in drawn
                if moments == "reset" or (moments == "carry" and not stays):
                    adam.forget(name)
        gradient(model, step)
        for name, p in model.named_parameters():
            if p.grad is None:
                continue
            W[name] = adam.moved(name, W[name], p.grad)
        optimizer.step()
        optimizer.zero_grad()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), W[name], rtol=0, atol=1e-12, msg=name)


def test_every_block_is_drawn_as_often_as_it_should():
    blocks = LISA(blocks=2).rule().blocks
    counts = torch.zeros(8)
    for period in range(1000):
        drawn = blocks.drawn(8, period * 20, seed=0)
        assert len(drawn) == 2
        counts[list(drawn)] += 1
    sigma = (1000 * 0.25 * 0.75) ** 0.5
    assert ((counts - 250).abs() < 3 * sigma).all()


def test_weights_make_blocks_more_likely():
    blocks = LISA(blocks=1, block_weights=(0.0, 1.0, 3.0)).rule().blocks
    drawn = [blocks.drawn(3, 20 * i, seed=0) for i in range(400)]
    assert sum(2 in d for d in drawn) == pytest.approx(300, abs=3 * (400 * 3 / 16) ** 0.5)
    assert not any(0 in d for d in drawn)


def test_the_first_draw_can_stay():
    model = Model()
    optimizer = optimizer_of(model, LISA(blocks=2, every=2, once=True))
    found = set()
    train(model, optimizer, range(8), lambda _: found.add(active(model)))
    assert len(found) == 1
    assert {s["step"] for s in optimizer.state.values()} == {8}


def test_the_learning_rate_follows_the_schedule_through_a_switch():
    model = Model()
    optimizer = optimizer_of(model, LISA(blocks=1, every=2), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1**step)
    for step in range(5):
        gradient(model, step)
        before = copy(model)
        optimizer.step()
        if step % 2 == 0:  # a fresh block's first Adam step is lr long where the gradient is
            change = max(
                float((p - before[n]).abs().max().detach())
                for n, p in model.named_parameters()
                if n.startswith("layers")
            )
            assert change == pytest.approx(0.1**step, rel=1e-2)
        schedule.step()
        optimizer.zero_grad()


def test_a_handle_saves_blocks_that_rest():
    """Frozen blocks may have been trained before: a checkpoint without them would lose steps."""
    model = tiny.llama()
    handle = attach(model, Recipe(weights=Dense(), update=LISA(blocks=1, every=1)))
    trained = set(handle.trainable())
    optimizer = handle.optimizer(lr=0.01)
    assert set(handle.named_state()) == trained == {name for name, _ in model.named_parameters()}
    assert sum(p.requires_grad for p in model.parameters()) < len(trained)
    first = [p for n, p in model.named_parameters() if n.startswith("model.layers.0.")]
    rested = {all(not p.requires_grad for p in first)}
    for _ in range(6):
        model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
        optimizer.step()
        rested.add(all(not p.requires_grad for p in first))
    assert rested == {True, False}


def test_blocks_may_be_named():
    model = Model()
    optimizer = optimizer_of(model, LISA(blocks=1, block_paths=("layers.1", "norm")))
    train(model, optimizer, range(3))
    assert model.layers[0][0].weight.requires_grad  # in no named block: the rest
    assert model.layers[1][0].weight.requires_grad != model.norm.weight.requires_grad


def test_experts_are_not_taken_for_blocks():
    names = [f"layers.{i}.mlp.experts.{e}.w" for i in range(2) for e in range(8)]
    members = LISA().rule().blocks.members((*names, "head.weight"))
    assert {b for b in members.values() if b is not None} == {0, 1}
    assert members["head.weight"] is None and members["layers.1.mlp.experts.3.w"] == 1


def test_more_blocks_than_there_are_is_an_error():
    with pytest.raises(UsageError) as error:
        optimizer_of(Model(), LISA(blocks=9))
    assert str(error.value) == (
        "more blocks are to be trained than there are\n"
        "  blocks  9 of 6\n"
        "Type update.blocks=6, or name them in update.block_paths."
    )


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"blocks": 0, "train_rest": False}, "nothing would be trained"),
        ({"block_paths": ("norm", "norm")}, "a block is named twice"),
        ({"block_weights": (0.0, 1.0)}, "too few blocks can be drawn with these weights"),
        ({"block_weights": (2.0, 1.0, -1.0)}, "too few blocks can be drawn with these weights"),
    ],
)
def test_blocks_that_cannot_be_drawn_are_refused_with_the_recipe(fields, said):
    with pytest.raises(UsageError) as error:
        Recipe(weights=Dense(), update=LISA(**fields))
    assert error.value.what == said


def test_blocks_that_the_model_has_not_are_refused():
    with pytest.raises(UsageError) as error:
        optimizer_of(Model(), LISA(block_weights=(1.0, 1.0, 1.0)))
    assert "update.block_weights  3 for 6 blocks" in str(error.value)
    with pytest.raises(UsageError) as error:
        optimizer_of(Model(), LISA(blocks=1, block_paths=("layers.1", "layers.10")))
    assert "layers.10  is no module above a trained parameter" in str(error.value)


def test_a_model_without_numbered_blocks_is_refused_in_these_words():
    with pytest.raises(UsageError) as error:
        optimizer_of(nn.Sequential(nn.Linear(2, 2))[0], LISA())
    assert str(error.value) == (
        "this model has no blocks to train in turn\n"
        "  trained parameters  no name has a block's number, as in layers.0.weight\n"
        "Name modules in update.block_paths, or take another update rule."
    )


def test_parameters_without_names_have_no_blocks():
    with pytest.raises(UsageError, match="known by the names of its parameters") as error:
        LowRankOptimizer(Model().parameters(), rule=LISA(blocks=1).rule())
    assert str(error.value).endswith("Pass model.named_parameters().")
