"""What BAdam alone promises."""

import pytest
import torch

from eckart.errors import UsageError
from eckart.methods.update.badam import BAdam
from eckart.optim import Blocks
from tests.methods.blocks import D, Model, N, active, gradient, optimizer_of
from tests.methods.updates import PlainAdam


def sequence(order, seed=0, rounds=3):
    blocks = Blocks(1, every=2, order=order)
    found = [blocks.drawn(N, step, seed) for step in range(0, 2 * N * rounds, 2)]
    assert all(len(b) == 1 for b in found)
    return [next(iter(b)) for b in found]


def test_blocks_come_in_order():
    assert sequence("ascending") == [*range(N)] * 3
    assert sequence("descending") == [*reversed(range(N))] * 3


def test_each_shuffled_round_has_every_block_once():
    found = sequence("shuffled")
    rounds = [found[i : i + N] for i in range(0, 3 * N, N)]
    assert all(sorted(r) == [*range(N)] for r in rounds)
    assert rounds[0] != rounds[1] and found != sequence("shuffled", seed=1)
    assert found == sequence("shuffled")


def test_several_blocks_go_through_the_order_together():
    blocks = Blocks(2, every=1, order="ascending")
    found = [blocks.drawn(5, step, 0) for step in range(6)]
    assert found == [{0, 1}, {2, 3}, {4}, {0, 1}, {2, 3}, {4}]


def test_a_share_of_the_blocks_is_a_number_of_them():
    assert len(Blocks(0.4).drawn(5, 0, 0)) == 2 and len(Blocks(0.01).drawn(5, 0, 0)) == 1


@pytest.mark.parametrize("train_rest", [False, True])
def test_follows_adam_block_by_block(train_rest):
    """Adam on the block that trains, written out, with new moments at each switch."""
    model, lr = Model(), 0.01
    method = BAdam(every=3, order="descending", train_rest=train_rest)
    optimizer = optimizer_of(model, method, lr)
    W = {name: p.detach().clone() for name, p in model.named_parameters()}
    adam = PlainAdam(lr)
    for step in range(3 * N + 4):
        block = N - 1 - step // 3 % N
        assert active(model) == (block,)
        gradient(model, step)
        for name, p in model.named_parameters():
            inside = name.startswith("layers")
            if inside and step % 3 == 0:
                adam.forget(name)
            moves = name.startswith(f"layers.{block}.") if inside else train_rest
            assert (p.grad is not None) == moves, name
            if not moves:
                continue
            W[name] = adam.moved(name, W[name], p.grad)
        optimizer.step()
        optimizer.zero_grad()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), W[name], rtol=0, atol=1e-12, msg=name)


def test_the_state_is_that_of_one_block():
    model = Model()
    optimizer = optimizer_of(model, BAdam(every=2))
    for step in range(9):
        gradient(model, step)
        optimizer.step()
        optimizer.zero_grad()
        held = [v for s in optimizer.state.values() for v in s.values()]
        assert all(isinstance(v, torch.Tensor | int | float) for v in held)
        elements = sum(v.numel() for v in held if isinstance(v, torch.Tensor))
        assert elements <= BAdam().cost(D, D).state + 2 * D  # a layer's matrix and bias


def test_a_run_resumed_inside_a_period_is_the_uninterrupted_one():
    def run(stop):
        model = Model()
        optimizer, found = optimizer_of(model, BAdam(every=3)), []
        for step in range(14):
            if step == stop:
                saved = optimizer.named_state_dict()
                for p in model.parameters():
                    p.requires_grad_(True)
                optimizer = optimizer_of(model, BAdam(every=3))
                optimizer.load_named_state_dict(saved)
            found.append(active(model))
            gradient(model, step)
            optimizer.step()
            optimizer.zero_grad()
        return found, list(model.parameters())

    (whole, end), (resumed, other) = run(None), run(7)
    assert whole == resumed and all(map(torch.equal, end, other))


def test_zero_gradients_leave_the_decay_alone():
    model = Model()
    before = model.layers[0][0].weight.detach().clone()
    optimizer = optimizer_of(model, BAdam(every=9, order="ascending", weight_decay=0.1))
    for p in model.layers[0].parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(
        model.layers[0][0].weight.detach(), 0.999 * before, rtol=1e-14, atol=0
    )


def test_it_learns_a_small_task():
    model = Model()
    optimizer = optimizer_of(model, BAdam(every=5, train_rest=True), lr=0.03)
    losses = []
    for _ in range(150):
        losses.append(gradient(model, 0))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.2 * losses[0]


def test_there_is_nothing_to_free_layer_by_layer():
    with pytest.raises(UsageError, match="layer-wise mode frees nothing here"):
        optimizer_of(Model(), BAdam(), layerwise=True)
