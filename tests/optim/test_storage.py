"""Moments in 8 bits, and stochastic rounding of bf16 weights."""

import dataclasses

import pytest
import torch
from torch import nn

from eckart.errors import UsageError
from eckart.optim import SVD, Adafactor, Adam, EightBit, LowRankOptimizer, Refresh, Rule
from eckart.optim.storage import dequantise, levels, quantise, rounded_by_chance


@pytest.mark.parametrize("signed", [True, False])
def test_there_are_256_levels_over_seven_decades(signed):
    values = levels(signed)
    assert len(values.unique()) == 256 and values.max() == 1 and 0 in values
    assert values[values > 0].min() == pytest.approx(5.5e-7 if signed else 3.25e-7)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (5, 300), (1, 1), (3, 2, 200)])
def test_levels_come_back_and_others_within_their_spacing(signed, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = x if signed else x**2
    codes, scale = quantise(x, signed)
    assert codes.dtype == torch.uint8 and codes.shape == x.shape
    back = dequantise(codes, scale, signed)
    lines = back.flatten(1).shape[1]
    largest = scale.repeat_interleave(min(256, lines), 1)[:, :lines].reshape(shape)
    # half the coarsest spacing: 0.9/64 of a block's largest signed, 0.9/128 unsigned;
    # between the lowest negative level and -1 there is no code
    assert ((back - x).abs() <= largest * (0.9 / 64 if signed else 0.9 / 128) / 2 * 1.001).all()
    if not signed:  # there is no code for -1: a block led by it would come back smaller
        assert torch.equal(quantise(back, signed)[0], codes)


def test_a_positive_second_moment_never_becomes_zero():
    x = torch.tensor([1.0, 1e-12, 0.0]).repeat(2, 100)
    back = dequantise(*quantise(x, False), False)
    assert (back[x > 0] > 0).all() and (back[x == 0] == 0).all()


def test_small_tensors_keep_32_bits():
    for small in (torch.zeros(63, 65), torch.zeros(5000)):
        assert EightBit().init(small)["exp_avg"].dtype == torch.float32
    for shape, blocks in (((64, 64), 1), ((16, 257), 2), ((8, 3, 200), 3)):
        state = EightBit().init(torch.zeros(shape))
        assert state["exp_avg"].dtype == torch.uint8
        assert state["exp_avg_scale"].shape == (shape[0], blocks)


def test_blocks_are_the_same_on_shards_of_rows():
    x = torch.randn(9, 300, generator=torch.Generator().manual_seed(0))
    codes, scale = quantise(x, True)
    for rows in (slice(0, 5), slice(5, 9), slice(9, 9)):
        part = quantise(x[rows], True)
        assert torch.equal(part[0], codes[rows]) and torch.equal(part[1], scale[rows])
        back = dequantise(*part, True)
        assert torch.equal(back, dequantise(codes, scale, True)[rows])


@pytest.mark.parametrize("moments", ["keep", "rotate", "reset"])
@pytest.mark.parametrize("eps_mode", ["torch", "hf"])
def test_updates_deviate_by_less_than_a_twentieth(moments, eps_mode):
    """GaLore's own bound for 8 bits: the change of the weights after 20 steps."""
    changes = []
    for eight in (False, True):
        adam = Adam(eps=1e-6, eps_mode=eps_mode)
        inner = EightBit(adam) if eight else adam
        p = nn.Parameter(torch.zeros(128, 96))
        optimizer = LowRankOptimizer([p], lr=0.01, rule=Rule(inner, SVD(48), Refresh(8, moments)))
        g = torch.Generator().manual_seed(0)
        trend = torch.randn(128, 96, generator=g)
        for _ in range(20):
            p.grad = trend + torch.randn(128, 96, generator=g)
            optimizer.step()
        changes.append(p.detach())
    assert (changes[1] - changes[0]).norm() < 0.05 * changes[0].norm()
    assert not torch.equal(*changes)


def test_rounding_by_chance_is_right_on_average():
    """Between two bf16 neighbours, 10 000 draws: five standard errors of the mean."""
    x = torch.tensor([1.0 + 2**-9, -3.0 - 2**-11, 1e-30, 0.0, 256.25, -1.0])
    draws = torch.stack([rounded_by_chance(x, seed) for seed in range(10_000)]).double()
    step = (draws.amax(0) - draws.amin(0)).clamp(min=0)
    exact = x.double()
    assert ((draws.amin(0) <= exact) & (exact <= draws.amax(0))).all()
    assert ((draws.mean(0) - exact).abs() <= 5 * step / 2 / 100 + 1e-15).all()
    assert step[3] == step[5] == 0 and (step[[0, 1, 2, 4]] > 0).all()
    assert step[0] == 2**-7 and step[4] == 2  # one bf16 step: 8 bits


def test_rounding_by_chance_keeps_what_is_not_finite():
    x = torch.tensor([torch.inf, -torch.inf, torch.nan])
    for seed in range(9):
        found = rounded_by_chance(x, seed)
        assert torch.equal(found[:2], x[:2].bfloat16()) and found[2].isnan()


@pytest.mark.parametrize("rule", [Rule(Adam()), Rule(Adam(), SVD(4), Refresh(5))])
def test_updates_below_a_bf16_step_are_made_on_average(rule):
    """Adam changes each weight by 1e-4 at each of 100 steps, a fortieth of a bf16 step at 1.

    Rounded to nearest nothing changes; rounded stochastically the mean changes by the sum.
    """
    moved = {}
    for rounding in ("nearest", "stochastic"):
        p = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        chosen = dataclasses.replace(rule, rounding=rounding)
        optimizer = LowRankOptimizer([("w", p)], 1e-4, rule=chosen)
        G = torch.outer(torch.ones(64), torch.ones(64)).bfloat16()  # of rank 1: all is projected
        for _ in range(100):
            p.grad = G.clone()
            optimizer.step()
        moved[rounding] = (1 - p.detach().double()).mean().item()
    assert moved["nearest"] == 0
    size = 1e-2 if rule.projector.identity else 1e-2 / 8  # R = 8 along (1/8, 1/8, ...)
    # 4096 weights, each the sum of 100 draws that are a bf16 step with probability p
    step = 2**-8
    p = size / 100 / step
    assert moved["stochastic"] == pytest.approx(size, abs=5 * step * p**0.5 * 10 / 64)


def test_copies_draw_alike_and_names_do_not():
    """Data-parallel replicas must stay equal; two weights must not have the same noise."""
    found = []
    for name, seed in (("a", 0), ("a", 0), ("b", 0), ("a", 1)):
        p = nn.Parameter(torch.ones(40, 40, dtype=torch.bfloat16))
        optimizer = LowRankOptimizer([(name, p)], 1e-3, rule=Rule(rounding="stochastic"), seed=seed)
        p.grad = torch.ones_like(p)
        optimizer.step()
        found.append(p.detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2]) and not torch.equal(found[0], found[3])


def test_fp16_weights_and_pairs_are_not_rounded_by_chance():
    p = nn.Parameter(torch.ones(4, 4, dtype=torch.float16))
    with pytest.raises(UsageError, match="stochastic rounding is for bf16 weights"):
        LowRankOptimizer([("w", p)], rule=Rule(rounding="stochastic"))


def test_factored_moments_cannot_be_rotated():
    with pytest.raises(UsageError, match="these moments cannot be rotated into another basis"):
        Rule(Adafactor(), SVD(4), Refresh(10, "rotate"))
