"""Random subspaces: their numbers, their coordinates, and the errors they raise."""

import math
from types import SimpleNamespace

import pytest
import torch
from tests.optim.trainings import gradients, parameters, run

from eckart.errors import UsageError
from eckart.optim import (
    SVD,
    Adam,
    Coordinates,
    Gaussian,
    LowRankOptimizer,
    Memoryless,
    Orthogonal,
    Outside,
    Refresh,
    Rule,
    Whole,
)
from eckart.optim.drawn import drawn, normals
from eckart.optim.entry import check_sharded
from eckart.optim.orthogonal import exactly_by, exactly_orthogonal
from eckart.optim.project import Basis, Chosen, add_up_, down
from eckart.optim.sharded import Layout

F64 = torch.float64
SEEDS = torch.tensor([1, 2, 3, 2**31 + 7])


def test_normal_numbers_are_normal():
    x = normals(SEEDS, 200, 501).double()  # 100,200 each; an odd count in a row
    n = x[0].numel()
    for one in x:
        # four standard deviations of each estimate
        assert abs(one.mean()) < 4 / math.sqrt(n)
        assert abs(one.var() - 1) < 4 * math.sqrt(2 / n)
        assert abs((one**4).mean() - 3) < 4 * math.sqrt(96 / n)
        assert one.abs().max() < 6.7  # sqrt(2 ln 2^32): the hash has 32 bits
        assert (one.abs() < 1).double().mean() == pytest.approx(0.6827, abs=4 * 0.466 / n**0.5)


def test_normal_numbers_are_unrelated():
    """Between seeds, between neighbours in a row and between rows."""
    x = normals(torch.arange(6), 200, 500).double()
    n = x[0].numel()
    pairs = [(x[0], x[1]), (x[2], x[5]), (x[0][:, :-1], x[0][:, 1:]), (x[0][:-1], x[0][1:])]
    pairs.append((x[0].flatten()[: n // 2], x[0].flatten()[n // 2 :]))  # of one length, two angles
    for a, b in pairs:
        assert abs((a * b).mean()) < 4 / math.sqrt(a.numel())
        assert abs((a**2 * b**2).mean() - 1) < 4 * math.sqrt(8 / a.numel())


def by_hand(seed, i, half):
    """Number i, in Python's own integers and doubles."""

    def scrambled(x):
        x &= 2**32 - 1
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    def bits(place):
        return scrambled(scrambled(place ^ scrambled(seed)) + seed)

    pair = i % half
    length = math.sqrt(-2 * math.log((bits(pair) + 1) / 2**32))
    angle = 2 * math.pi * bits(pair + half) / 2**32
    return length * (math.cos(angle) if i < half else math.sin(angle))


def test_a_number_is_a_function_of_seed_and_place():
    both = normals(SEEDS, 7, 9)
    for seed, found in zip(SEEDS, both, strict=True):
        assert torch.equal(normals(seed, 7, 9), found)
        expected = [by_hand(int(seed), i, 32) for i in range(63)]  # 63 numbers are 32 pairs
        # fp32: an angle up to 6.3 is known to 4e-7, a length up to 6.7
        close = {"rtol": 0, "atol": 1e-5}
        torch.testing.assert_close(found.flatten(), torch.tensor(expected), **close)


@pytest.mark.parametrize("shape", [(400, 300), (300, 400)])
def test_lengths_are_kept_on_average(shape):
    projector = Gaussian(64)
    (row,) = gradients([shape], 1)
    G = row[0]
    state = projector.init(G) | {"seed": torch.tensor(5)}
    basis = projector.basis(state, G, shape)
    assert down(G, basis).shape == ((400, 64) if shape[0] > shape[1] else (64, 400))
    ratio = down(G, basis).norm() / G.norm()
    assert ratio == pytest.approx(1, abs=0.3)  # a few directions carry G: 1 / sqrt(2 r) and more


@pytest.mark.parametrize("kind", ["columns", "rows", "entries"])
@pytest.mark.parametrize("layout", ["plain", "transposed", "experts"])
def test_coordinates_go_down_and_back(kind, layout):
    shape = (3, 6, 8) if layout == "experts" else (6, 8)
    W = torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    W = W.mT.contiguous().mT if layout == "transposed" else W
    projector = Coordinates(0.5, kind)
    found = torch.randint(3, (24,), generator=torch.Generator().manual_seed(1)).cumsum(0)
    r = max(projector.ranks(6, 8))
    index = (found[:r] % {"columns": 8, "rows": 6, "entries": 48}[kind]).unique()
    basis = Chosen(index.expand(*shape[:-2], -1), projector.axis, kind == "entries")
    mask = torch.zeros(6, 8, dtype=F64)
    if kind == "columns":
        mask[:, index] = 1
    elif kind == "rows":
        mask[index] = 1
    else:
        mask.view(-1)[index] = 1
    R = down(W, basis)
    assert R.numel() == W[mask.expand(shape) > 0].numel()
    back, kept = torch.zeros_like(W), W.clone(memory_format=torch.preserve_format)
    add_up_(back, R, basis, alpha=2.0)
    assert torch.equal(back, 2 * W * mask)
    add_up_(kept, R, basis, alpha=-1.0, beta=0.5)
    assert torch.equal(kept, 0.5 * W - W * mask)


def test_draws_are_without_replacement_and_all_alike():
    found = drawn(10, 4, 500, seed=3)
    assert found.shape == (500, 4) and (found.diff() > 0).all()
    counts = found.flatten().bincount(minlength=10)
    assert ((counts - 200).abs() < 4 * math.sqrt(500 * 0.4 * 0.6)).all()


@pytest.mark.parametrize("kind", ["columns", "rows", "entries"])
def test_moments_follow_their_coordinate(kind):
    """With moments="rotate" a coordinate that stays keeps its moments, a new one starts at 0."""
    projector = Coordinates(0.5, kind)
    old, new = torch.tensor([0, 2, 3]), torch.tensor([2, 3, 5])
    shape = {"columns": (4, 3), "rows": (3, 4), "entries": (1, 3)}[kind]
    M = torch.rand(shape)
    turned = projector.turn({"index": old}, {"index": new}, (8, 8)).mean(M)
    axis = 0 if kind == "rows" else 1
    assert torch.equal(turned.narrow(axis, 0, 2), M.narrow(axis, 1, 2))
    assert not turned.narrow(axis, 2, 1).any()


def test_many_of_one_shape_move_as_each_alone():
    """Draws come from names, so that neither order nor grouping matters."""
    for projector, residual in [(Coordinates(0.5), Outside()), (Gaussian(3), None)]:
        rule = Rule(Adam(), projector, Refresh(3), residual=residual)
        grads = gradients([(9, 6)] * 3, 7)
        together = parameters([(9, 6)] * 3)
        run(LowRankOptimizer(together, lr=0.02, rule=rule), together, grads)
        for i in (2, 0, 1):
            alone = [parameters([(9, 6)] * 3)[i]]
            run(LowRankOptimizer(alone, lr=0.02, rule=rule), alone, [[row[i]] for row in grads])
            torch.testing.assert_close(alone[0][1], together[i][1], rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("kind", "axes", "fits"),
    [
        ("columns", ("rows",), True),
        ("columns", ("columns",), False),
        ("rows", ("rows",), False),
        ("entries", ("rows",), False),
        ("entries", ("lead",), True),
    ],
)
def test_coordinates_need_their_side_whole(kind, axes, fits):
    mesh = SimpleNamespace(get_group=lambda i: f"group {i}")
    placements = tuple(SimpleNamespace(dim=0) for _ in axes)
    layout = Layout(mesh, axes, placements, 0, kind == "rows", kind != "rows", 2)
    rule = Rule(Adam(), Coordinates(0.5, kind))
    if fits:
        check_sharded("w", rule, layout)
        return
    with pytest.raises(UsageError) as error:
        check_sharded("w", rule, layout)
    assert str(error.value).splitlines()[0] == (
        "these coordinates cannot be drawn from a part of the parameter"
    )


def test_an_interval_cannot_adapt_to_directions_that_are_drawn():
    for projector in (Gaussian(3), Coordinates(0.5), Whole()):
        with pytest.raises(UsageError, match="no leading direction"):
            Rule(Adam(), projector, Refresh(7, adaptive=0.4))


def test_signs_are_of_what_lies_outside():
    """With SGD inside and signs outside, each entry changes by its gradient or by its sign."""
    rule = Rule(Memoryless("sgd"), Coordinates(0.5), residual=Outside(Memoryless("sign", 0.1)))
    named = parameters([(4, 6)])
    before = named[0][1].detach().clone()
    grads = gradients([(4, 6)], 1)
    run(LowRankOptimizer(named, lr=1.0, rule=rule), named, grads)
    moved, G = before - named[0][1].detach(), grads[0][0]
    inside = torch.isclose(moved, G, rtol=0, atol=1e-14).all(0)
    assert inside.sum() == 3
    outside = torch.isclose(moved, 0.1 * G.sign(), rtol=0, atol=1e-14).all(0)
    assert torch.equal(outside, ~inside)


def test_the_exact_form_on_shards_is_the_exact_form():
    (row,) = gradients([(12, 5)], 1)
    R = row[0]
    exact = exactly_orthogonal(R)
    torch.testing.assert_close(exact.mT @ exact, torch.eye(5, dtype=F64), rtol=0, atol=1e-13)
    # fp64: the Gram matrix has a condition number of 1e4, squared from 100
    torch.testing.assert_close(exactly_by(R[:4], R.mT @ R), exact[:4], rtol=0, atol=1e-11)
    flat = torch.outer(R[:, 0], R[0])  # of rank 1
    torch.testing.assert_close(
        exactly_by(flat, flat.mT @ flat), exactly_orthogonal(flat), rtol=0, atol=1e-7
    )
    assert not exactly_orthogonal(torch.zeros(4, 3)).any()
    assert not exactly_by(torch.zeros(4, 3), torch.zeros(3, 3)).any()


def test_momentum_before_orthogonal_steps_is_rotated_with_its_basis():
    inner = Orthogonal(momentum=0.9, exact=True)
    rule = Rule(inner, SVD(3), Refresh(4, "rotate", stagger=False))
    named, grads = parameters([(9, 6)]), gradients([(9, 6)], 5)
    optimizer = LowRankOptimizer(named, lr=0.02, rule=rule)
    run(optimizer, named, grads[:4])
    state = {k: v.clone() for k, v in optimizer.state[named[0][1]].items() if torch.is_tensor(v)}
    run(optimizer, named, grads[4:])
    new = optimizer.state[named[0][1]]
    carried = state["momentum"] @ state["right"] @ new["right"].mT
    wanted = 0.9 * carried + grads[4][0] @ new["right"].mT
    torch.testing.assert_close(new["momentum"], wanted, rtol=0, atol=1e-13)


def test_nothing_projected_is_a_matrix_as_it_is():
    W = torch.ones(4, 3, dtype=F64)
    add_up_(W, torch.ones(4, 3, dtype=F64), Basis(None, None), alpha=-0.25, beta=0.5)
    assert torch.equal(W, torch.full((4, 3), 0.25, dtype=F64))
