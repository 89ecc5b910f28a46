"""What GaLore alone promises: galore.md's list, against formulas reimplemented here."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from eckart.methods.update.galore import GaLore
from eckart.optim import SGD, SVD, Adam, LowRankOptimizer, Refresh, Rule
from tests.methods import updates
from tests.methods.updates import F64, check_experts, spectrum, start


def train(rule, W, grads):
    path, states = updates.train(rule, W, grads)
    return path, states[-1]


def by_the_paper(W, grads, rank, every, lr, alpha, betas, eps, wd):
    """GaLore on the right side, line by line, with its code's epsilon and decay."""
    W, M, V = W.clone(), 0.0, 0.0
    for t, G in enumerate(grads):
        if t % every == 0:
            Vh = torch.linalg.svd(G, full_matrices=False)[2][:rank]
            top = Vh.gather(1, Vh.abs().argmax(1, keepdim=True))
            P = Vh * top.sign()
        R = G @ P.T
        M = betas[0] * M + (1 - betas[0]) * R
        V = betas[1] * V + (1 - betas[1]) * R**2
        size = lr * (1 - betas[1] ** (t + 1)) ** 0.5 / (1 - betas[0] ** (t + 1))
        W = W - size * alpha * (M / (V.sqrt() + eps)) @ P
        W = W - lr * wd * W
    return W


@pytest.mark.parametrize("shape", [(9, 6), (6, 6)])
def test_follows_the_papers_algorithm(shape):
    grads = spectrum(shape, 23)
    method = GaLore(rank=3, every=7, stagger=False, weight_decay=0.1, scale=0.3)
    path, _ = train(method.rule(), start(shape), grads)
    wanted = by_the_paper(start(shape), grads, 3, 7, 0.05, 0.3, (0.9, 0.999), 1e-6, 0.1)
    torch.testing.assert_close(path[-1], wanted, rtol=0, atol=1e-12)  # fp64, 23 steps


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("shape", [(8, 5), (5, 8)])
def test_full_rank_sgd_is_sgd(shape, momentum):
    grads = spectrum(shape, 20)
    # momentum lives in the basis: it is SGD's while the basis stays
    every = 1000 if momentum else 3
    rule = Rule(SGD(momentum), SVD(99), Refresh(every, stagger=False))
    path, _ = train(rule, start(shape), grads)
    p = nn.Parameter(start(shape))
    reference = torch.optim.SGD([p], lr=0.05, momentum=momentum)
    for G in grads:
        p.grad = G
        reference.step()
    torch.testing.assert_close(path[-1], p.detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(8, 5), (5, 8)])
def test_the_long_side_projected_on_as_many_directions_as_the_short_one_is_sgd(shape):
    """R is then square: which side was projected cannot be told from its shape."""
    grads = spectrum(shape, 20)
    rule = Rule(SGD(), SVD(5, "reverse"), Refresh(1))
    path, state = train(rule, start(shape), grads)
    assert state["left" if shape[0] > shape[1] else "right"].numel() == 40
    wanted = start(shape) - 0.05 * sum(grads)
    torch.testing.assert_close(path[-1], wanted, rtol=0, atol=1e-10)


def test_full_rank_adam_is_adam_in_rotated_coordinates():
    shape, grads = (8, 5), spectrum((8, 5), 20)
    rule = Rule(Adam(eps=1e-300), SVD(5), Refresh(1000, stagger=False))
    path, state = train(rule, start(shape), grads)
    P = state["right"]
    p = nn.Parameter(start(shape) @ P.T)
    reference = torch.optim.AdamW([p], lr=0.05, eps=1e-300, weight_decay=0)
    for G in grads:
        p.grad = G @ P.T
        reference.step()
    torch.testing.assert_close(path[-1] @ P.T, p.detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_each_period_moves_the_weights_in_r_more_directions(shape):
    rank, every = 2, 5
    path, _ = train(
        GaLore(rank=rank, every=every, stagger=False).rule(), start(shape), spectrum(shape, 15)
    )
    for steps in range(1, 16):
        s = torch.linalg.svdvals(path[steps - 1] - start(shape))
        periods = (steps + every - 1) // every
        assert (s > 1e-9 * s[0]).sum() == min(rank * periods, 8)


@pytest.mark.parametrize("side", ["auto", "reverse", "both"])
@pytest.mark.parametrize("on_refresh", ["keep", "rotate", "reset"])
def test_a_transposed_run_is_the_run_transposed(side, on_refresh):
    shape, grads = (9, 6), spectrum((9, 6), 20)
    rule = GaLore(rank=3, every=6, side=side, on_refresh=on_refresh, weight_decay=0.1).rule()
    path, _ = train(rule, start(shape), grads)
    turned, _ = train(rule, start(shape).T, [G.T for G in grads])
    torch.testing.assert_close(path[-1], turned[-1].T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_bases_are_orthonormal(shape, dtype, tolerance):
    """1e-6: the SVD's own error in fp32. 1e-2: entries are rounded to 8 bits."""
    p = nn.Parameter(start(shape).to(dtype))
    optimizer = LowRankOptimizer([p], rule=GaLore(rank=6).rule())
    p.grad = spectrum(shape, 1)[0].to(dtype)
    optimizer.step()
    basis = next(optimizer.state[p][k] for k in ("left", "right") if k in optimizer.state[p])
    assert basis.dtype == dtype
    wide = basis.double() if basis.shape[0] == 6 else basis.double().T
    torch.testing.assert_close(wide @ wide.T, torch.eye(6, dtype=F64), rtol=0, atol=tolerance)


def test_signs_of_singular_vectors_do_not_matter(monkeypatch):
    shape, grads = (9, 6), spectrum((9, 6), 20)
    rule = GaLore(rank=3, every=6).rule()
    path, _ = train(rule, start(shape), grads)
    svd, calls = torch.linalg.svd, []

    def flipped(G, full_matrices=True):
        calls.append(G.shape)
        U, s, Vh = svd(G, full_matrices=full_matrices)
        signs = torch.tensor([(-1.0) ** (i + len(calls)) for i in range(len(s[0]))], dtype=F64)
        return U * signs, s, Vh * signs[:, None]

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    again, _ = train(rule, start(shape), grads)
    assert len(calls) >= 4 and torch.equal(path[-1], again[-1])


@pytest.mark.parametrize(
    "shape, side, left, right, moment",
    [
        ((12, 8), "auto", None, (3, 8), (12, 3)),
        ((8, 12), "auto", (8, 3), None, (3, 12)),
        ((8, 8), "auto", None, (3, 8), (8, 3)),
        ((12, 8), "reverse", (12, 3), None, (3, 8)),
        ((8, 12), "reverse", None, (3, 12), (8, 3)),
        ((12, 8), "left", (12, 3), None, (3, 8)),
        ((8, 12), "right", None, (3, 12), (8, 3)),
        ((12, 8), "both", (12, 3), (3, 8), (3, 3)),
    ],
)
def test_state_has_these_shapes_and_no_others(shape, side, left, right, moment):
    method = GaLore(rank=3, side=side)
    _, state = train(method.rule(), start(shape), spectrum(shape, 2))
    shapes = {k: tuple(v.shape) for k, v in state.items() if isinstance(v, torch.Tensor)}
    wanted = {"left": left, "right": right, "exp_avg": moment, "exp_avg_sq": moment}
    assert shapes == {k: v for k, v in wanted.items() if v}
    measured = sum(v.numel() for v in state.values() if isinstance(v, torch.Tensor))
    assert method.cost(*shape).state == measured


@pytest.mark.parametrize("inner", ["adam", "adam8bit", "adafactor"])
@pytest.mark.parametrize("shape", [(128, 96), (64, 96), (7, 5)])
def test_cost_is_what_is_stored(shape, inner):
    method = GaLore(rank=48, inner=inner)
    _, state = train(method.rule(), start(shape), spectrum(shape, 2))
    measured = sum(v.numel() for v in state.values() if isinstance(v, torch.Tensor))
    assert method.cost(*shape).state == measured


def test_adafactor_moves_the_subspace_by_its_factored_update():
    grads = spectrum((9, 6), 6)
    method = GaLore(rank=3, every=100, inner="adafactor", weight_decay=0.1, scale=0.5)
    path, state = train(method.rule(), start((9, 6)), grads)
    W, P, row, column = start((9, 6)), state["right"], 0.0, 0.0
    for t, G in enumerate(grads, 1):
        R, keep = G @ P.T, 1 - t**-0.8
        square = R**2 + 1e-30
        row = keep * row + (1 - keep) * square.mean(1)
        column = keep * column + (1 - keep) * square.mean(0)
        N = R * (row / row.mean()).rsqrt()[:, None] * column.rsqrt()
        N = N / max(1.0, N.pow(2).mean().sqrt())
        W = W - 0.05 * 0.1 * W - 0.05 * 0.5 * N @ P
    torch.testing.assert_close(path[-1], W, rtol=0, atol=1e-12)


@pytest.mark.parametrize("search", ["svd", "gram", "randomised", "iteration"])
@pytest.mark.parametrize("side", ["auto", "reverse", "both"])
def test_all_searches_serve_all_sides(search, side):
    grads = spectrum((9, 6), 12)
    method = GaLore(rank=3, every=5, search=search, side=side)
    path, _ = train(method.rule(), start((9, 6)), grads)
    turned, _ = train(method.rule(), start((9, 6)).T, [G.T for G in grads])
    if search != "randomised":  # whose directions are drawn for the side they lie on
        torch.testing.assert_close(path[-1], turned[-1].T, rtol=0, atol=1e-9)
    assert (path[-1] - start((9, 6))).abs().max() > 1e-3


@pytest.mark.parametrize("side", ["auto", "both"])
@pytest.mark.parametrize("on_refresh", ["keep", "rotate", "reset"])
def test_a_basis_in_four_bits_is_the_basis_to_half_a_level(side, on_refresh):
    shape, grads = (64, 48), spectrum((64, 48), 6)
    exact, packed = (
        GaLore(rank=6, every=5, side=side, on_refresh=on_refresh, basis_dtype=dtype, stagger=False)
        for dtype in ("param", "int4")
    )
    _, wanted = train(exact.rule(), start(shape), grads)
    path, state = train(packed.rule(), start(shape), grads)
    assert state["right_codes"].dtype == torch.uint8
    assert state["right_codes"].shape == (6, 24) and state["right_ends"].shape == (6, 2)
    basis = packed.rule().projector.basis(state, path[-1], shape)
    for found, name in ((basis.right, "right"), (basis.left, "left")):
        if found is not None:
            P, Q = (t if name == "right" else t.T for t in (found, wanted[name]))
            level = (Q.amax(1) - Q.amin(1)) / 15
            assert ((P - Q).abs().amax(1) <= level / 2 + 1e-6).all()
            # 48 errors of a few hundredths in each inner product of unit vectors
            torch.testing.assert_close(P @ P.T, torch.eye(6, dtype=F64), rtol=0, atol=0.1)
    tensors = [v for v in state.values() if isinstance(v, torch.Tensor)]
    assert packed.cost(*shape).state == sum(t.numel() for t in tensors)
    turned, _ = train(packed.rule(), start(shape).T, [G.T for G in grads])
    # ends of rows are kept in fp32
    torch.testing.assert_close(turned[-1].T, path[-1], rtol=0, atol=1e-6)


def test_an_adaptive_interval_doubles_where_the_leading_direction_keeps():
    G = spectrum((9, 6), 1)[0]
    noise = spectrum((9, 6), 40, seed=3)
    method = GaLore(rank=3, every=2, stagger=False, adaptive=0.9)
    steady = [10 * G + g for g in noise]
    _, state = train(method.rule(), start((9, 6)), steady)
    # refreshes at 0, 2, .. 10: five cosines; then at multiples of 4, 8, 16: 12, 16, 32
    assert state["gap"] == 32 and state["cosines"].min() > 0.9
    flipped = [g * (-1) ** i for i, g in enumerate(steady)]  # a sign is no change
    assert train(method.rule(), start((9, 6)), flipped)[1]["gap"] == 32
    _, state = train(method.rule(), start((9, 6)), noise)
    assert state["gap"] == 2
    _, state = train(GaLore(rank=3, every=2).rule(), start((9, 6)), steady)
    assert "gap" not in state


def test_a_rank_above_the_short_side_is_cut_there():
    _, state = train(GaLore(rank=99).rule(), start((7, 5)), spectrum((7, 5), 1))
    assert state["right"].shape == (5, 5)


def test_skip_if_no_saving_is_adam_itself():
    """Full rank on a square matrix needs 3 n^2 elements of state, Adam 2 n^2."""
    method = GaLore(rank=6, skip_if_no_saving=True)
    path, state = train(method.rule(), start((6, 6)), spectrum((6, 6), 10))
    plain, _ = train(method.plain(), start((6, 6)), spectrum((6, 6), 10))
    assert "right" not in state and torch.equal(path[-1], plain[-1])
    assert method.cost(6, 6).state == 72
    assert method.cost(600, 6).state == 600 * 6 * 2  # cut to full rank: nothing is saved
    assert method.cost(600, 60).state == 600 * 6 * 2 + 6 * 60


def test_vectors_and_plain_parameters_are_adamw_bit_for_bit():
    method = GaLore(eps_mode="torch", weight_decay=0.1)
    for rule, shape in ((method.rule(), (7,)), (method.plain(), (7, 5))):
        grads = [torch.randn(shape, dtype=F64) for _ in range(20)]
        path, _ = train(rule, start(shape), grads)
        p = nn.Parameter(start(shape))
        reference = torch.optim.AdamW([p], lr=0.05, eps=1e-6, weight_decay=0.1)
        for G in grads:
            p.grad = G
            reference.step()
        assert torch.equal(path[-1], p.detach())


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_useless_gradient_keeps_the_basis_and_is_tried_again(bad):
    grads = spectrum((8, 5), 8)
    grads[4] = torch.full((8, 5), bad, dtype=F64)
    _, before = train(GaLore(rank=2, every=4, stagger=False).rule(), start((8, 5)), grads[:4])
    _, at = train(GaLore(rank=2, every=4, stagger=False).rule(), start((8, 5)), grads[:5])
    _, after = train(GaLore(rank=2, every=4, stagger=False).rule(), start((8, 5)), grads[:6])
    assert torch.equal(before["right"], at["right"]) and at["due"] == 5
    assert not torch.equal(at["right"], after["right"]) and after["due"] == 8


def test_a_zero_gradient_at_the_first_step_leaves_an_orthonormal_basis():
    path, state = train(GaLore(rank=2).rule(), start((8, 5)), [torch.zeros(8, 5, dtype=F64)])
    assert torch.equal(path[-1], start((8, 5)))
    assert torch.equal(state["right"], torch.eye(2, 5, dtype=F64)) and state["due"] == 1


def test_refreshes_are_spread_by_name_and_the_first_is_at_step_zero(monkeypatch):
    every, names = 10, [f"layers.{i}.q_proj.weight" for i in range(20)]
    found = {}
    for order in (names, names[::-1]):
        params = [(name, nn.Parameter(start((6, 4)))) for name in order]
        optimizer = LowRankOptimizer(params, rule=GaLore(rank=2, every=every).rule())
        steps = {name: [] for name in names}
        for step, G in enumerate(spectrum((6, 4), 35)):
            last = {n: optimizer.state[p].get("due", 0) for n, p in params}
            for _, p in params:
                p.grad = G.clone()
            optimizer.step()
            for n, p in params:
                if optimizer.state[p]["due"] != last[n]:
                    steps[n].append(step)
        assert found in ({}, steps)  # whatever the order
        found = steps
    assert all(s[0] == 0 for s in found.values())
    assert all(b - a == every for s in found.values() for a, b in pairwise(s[1:]))
    busiest = max(sum(step in s for s in found.values()) for step in range(1, 35))
    assert busiest <= 8  # not all 20 at once


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_rotated_moments_follow_ldadams_formula(shape):
    """Written for the right side; the left is its transpose."""
    grads = spectrum(shape, 5)
    rule = GaLore(rank=3, every=4, stagger=False, on_refresh="rotate").rule()
    _, before = train(rule, start(shape), grads[:4])
    _, after = train(rule, start(shape), grads)
    side = "right" if shape[0] >= shape[1] else "left"
    turn = (lambda t: t) if side == "right" else (lambda t: t.T)
    old, new = turn(before[side]), turn(after[side])
    M, V, R = turn(before["exp_avg"]), turn(before["exp_avg_sq"]), turn(grads[4]) @ new.T
    X, c1, c2 = old @ new.T, 1 - 0.9**4, 1 - 0.999**4
    V = (c2 * ((V / c2 - (M / c1) ** 2) @ (X * X) + (M @ X / c1) ** 2)).abs()
    M = 0.9 * (M @ X) + 0.1 * R
    V = 0.999 * V + 0.001 * R**2
    torch.testing.assert_close(turn(after["exp_avg"]), M, rtol=0, atol=1e-13)
    torch.testing.assert_close(turn(after["exp_avg_sq"]), V, rtol=0, atol=1e-13)


def test_reset_makes_the_next_step_a_first_step():
    grads = spectrum((9, 6), 5)
    rule = GaLore(rank=3, every=4, stagger=False, on_refresh="reset").rule()
    path, _ = train(rule, start((9, 6)), grads)
    fresh, _ = train(rule, path[3], grads[4:])
    torch.testing.assert_close(path[4], fresh[0], rtol=0, atol=1e-14)


def test_convolutions_are_matrices_of_their_outputs():
    shape = (8, 3, 2, 2)
    grads = [torch.randn(shape, dtype=F64) for _ in range(8)]
    flat = [G.flatten(1) for G in grads]
    rule = GaLore(rank=3, every=3).rule()
    path, state = train(rule, start(shape), grads)
    wanted, _ = train(rule, start(shape).flatten(1), flat)
    assert state["left"].shape == (8, 3)
    assert torch.equal(path[-1].flatten(1), wanted[-1])


def test_channels_last_convolutions_are_updated_too():
    shape = (8, 3, 2, 2)
    grads = [torch.randn(shape, dtype=F64) for _ in range(8)]
    rule = GaLore(rank=3, every=3, weight_decay=0.1).rule()
    path, _ = train(rule, start(shape), grads)
    last = start(shape).to(memory_format=torch.channels_last)
    wanted, _ = train(rule, last, [G.to(memory_format=torch.channels_last) for G in grads])
    torch.testing.assert_close(path[-1], wanted[-1], rtol=0, atol=1e-13)


def test_experts_are_projected_one_by_one():
    rule = GaLore(rank=2, every=3, weight_decay=0.1).rule()
    check_experts(rule, [spectrum((8, 5), 8, seed=i) for i in range(3)])
