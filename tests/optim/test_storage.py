"""Moments in 8 bits."""

import pytest
import torch
from torch import nn

from eckart.errors import UsageError
from eckart.optim import SVD, Adafactor, Adam, EightBit, LowRankOptimizer, Refresh, Rule
from eckart.optim.storage import dequantise, levels, quantise


@pytest.mark.parametrize("signed", [True, False])
def test_there_are_256_levels_over_seven_decades(signed):
    values = levels(signed)
    assert len(values.unique()) == 256 and values.max() == 1 and 0 in values
    assert values[values > 0].min() == pytest.approx(5.5e-7 if signed else 3.25e-7)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (5, 77), (1,)])
def test_levels_come_back_and_others_within_their_spacing(signed, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = x if signed else x**2
    codes, scale = quantise(x, signed)
    assert codes.dtype == torch.uint8 and codes.shape == x.shape
    back = dequantise(codes, scale, signed)
    largest = scale.repeat_interleave(256)[: x.numel()].view(shape)
    # half the coarsest spacing: 0.9/64 of a block's largest signed, 0.9/128 unsigned;
    # between the lowest negative level and -1 there is no code
    assert ((back - x).abs() <= largest * (0.9 / 64 if signed else 0.9 / 128) / 2 * 1.001).all()
    if not signed:  # there is no code for -1: a block led by it would come back smaller
        assert torch.equal(quantise(back, signed)[0], codes)


def test_a_positive_second_moment_never_becomes_zero():
    x = torch.tensor([1.0, 1e-12, 0.0]).repeat(100)
    back = dequantise(*quantise(x, False), False)
    assert (back[x > 0] > 0).all() and (back[x == 0] == 0).all()


def test_small_tensors_keep_32_bits():
    state = EightBit().init(torch.zeros(4095))
    assert state["exp_avg"].dtype == torch.float32
    state = EightBit().init(torch.zeros(64, 64))
    assert state["exp_avg"].dtype == torch.uint8 and state["exp_avg_scale"].shape == (16,)


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


def test_a_selection_is_requantised():
    p = nn.Parameter(torch.zeros(128, 96))
    optimizer = LowRankOptimizer([("w", p)], rule=Rule(EightBit()))
    p.grad = torch.randn(128, 96)
    optimizer.step()
    before = optimizer.state[p]
    wide = dequantise(before["exp_avg"], before["exp_avg_scale"], True)
    index = torch.arange(0, 128, 2)
    optimizer.select_state("w", 0, index)
    after = optimizer.state[p]
    assert after["exp_avg_scale"].shape == (64 * 96 // 256,)
    found = dequantise(after["exp_avg"], after["exp_avg_scale"], True)
    torch.testing.assert_close(found, wide[index], rtol=0, atol=float(wide.abs().max()) / 64)


def test_factored_moments_cannot_be_rotated():
    with pytest.raises(UsageError, match="these moments cannot be rotated into another basis"):
        Rule(Adafactor(), SVD(4), Refresh(10, "rotate"))
