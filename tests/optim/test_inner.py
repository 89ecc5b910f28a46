"""Inner rules against their formulas, and the fused Adam against the plain one."""

import pytest
import torch
from tests.optim.trainings import gradients, parameters, run

from eckart.optim import Adafactor, Adam, LowRankOptimizer, Rule


def directions(adam, dtype, fused, steps=6, count_gap=3):
    """N and the moments after some steps on two tensors whose counts differ."""
    g = torch.Generator().manual_seed(0)
    R = [
        [
            torch.randn(s, generator=g, dtype=torch.float64).to(torch.bfloat16)
            for s in ((40, 30), (7,))
        ]
        for _ in range(steps)
    ]
    states = [adam.init(r.to(dtype)) for r in R[0]]
    for t, row in enumerate(R, 1):
        found = adam.step([r.to(dtype) for r in row], states, [t, t + count_gap], fused=fused)
    N = [n.double() / c for n, c in zip(found.tensors(), found.correction, strict=True)]
    return N + [t.double() for state in states for t in state.values()]


@pytest.mark.parametrize("eps_mode", ["torch", "hf"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fused_adam_errs_no_more_than_the_plain_one(dtype, eps_mode):
    adam = Adam((0.9, 0.99), 1e-3, eps_mode)
    exact = directions(adam, torch.float64, False)
    plain = directions(adam, dtype, False)
    fused = directions(adam, dtype, True)
    for e, p, f in zip(exact, plain, fused, strict=True):
        error = (p - e).abs().max()
        # at most twice the plain form's; a few last bits in fp64, where the plain one is exact
        assert (f - e).abs().max() <= 2 * error + 1e-15
        assert error > 0 or dtype == torch.float64


def test_float32_moments_are_taken_by_both_forms():
    adam = Adam(state_dtype="float32")
    R = [torch.randn(5, 4, dtype=torch.bfloat16)]
    for fused in (False, True):
        states = [adam.init(R[0])]
        N = adam.step(R, states, [1], fused=fused).tensors()[0]
        assert N.dtype == states[0]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_adafactor_is_that_of_transformers(beta1):
    """With a fixed learning rate and without relative steps, as GaLore uses it."""
    from transformers.optimization import Adafactor as Reference

    shapes = [(9, 6), (6, 9), (7,)]
    grads = gradients(shapes, 12)
    grads[6] = [50 * G for G in grads[6]]  # a spike: the update is clipped
    ours, theirs = parameters(shapes), parameters(shapes)
    rule = Rule(Adafactor(beta1=beta1), weight_decay=0.1)
    found = run(LowRankOptimizer(ours, lr=0.03, rule=rule), ours, grads)
    options = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    params = [p for _, p in theirs]
    reference = Reference(params, lr=0.03, weight_decay=0.1, beta1=beta1 or None, **options)
    wanted = run(reference, theirs, grads)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
