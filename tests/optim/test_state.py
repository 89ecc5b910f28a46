"""State holds tensors and numbers alone, and is restored with the same bits and dtypes."""

import io

import pytest
import torch
from tests.optim.trainings import gradients, parameters, run
from torch import nn

from eckart.errors import FileError, UsageError
from eckart.optim import SVD, Adam, EightBit, LowRankOptimizer, Packed, Refresh, Rule

SHAPES = [(9, 6), (6, 9), (5,), (4, 3, 2, 2)]
RULES = {
    "adamw": Rule(Adam()),
    "galore": Rule(Adam(eps_mode="hf"), SVD(3), Refresh(7), scale=0.25),
    "rotated": Rule(Adam(), SVD(3), Refresh(7, "rotate")),
    "reset": Rule(Adam(), SVD(3, "both"), Refresh(7, "reset", stagger=False)),
    "q-galore": Rule(EightBit(), Packed(SVD(3)), Refresh(2, adaptive=0.1)),
    "wide": Rule(Adam(state_dtype="float32"), SVD(3, basis_dtype="float32"), Refresh(7)),
}


def saved(state):
    """The object after torch.save and torch.load(weights_only=True)."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def resume(rule, dtype, stop, how, steps=20):
    """Parameters after `steps`: uninterrupted, and resumed with a new optimizer at `stop`."""
    grads = gradients(SHAPES, steps, dtype)
    whole = parameters(SHAPES, dtype)
    run(LowRankOptimizer(whole, lr=0.02, rule=rule), whole, grads)
    named = parameters(SHAPES, dtype)
    first = LowRankOptimizer(named, lr=0.02, rule=rule)
    run(first, named, grads[:stop])
    second = LowRankOptimizer(named, lr=0.5, rule=rule)
    if how == "by place":
        second.load_state_dict(saved(first.state_dict()))
    else:
        second.load_named_state_dict(saved(first.named_state_dict()))
    run(second, named, grads[stop:])
    return whole, named, first, second


@pytest.mark.parametrize("how", ["by place", "by name"])
@pytest.mark.parametrize("stop", [7, 10])  # at a refresh, and in the middle of a period
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_is_the_uninterrupted_one(rule, dtype, stop, how):
    whole, named, _, _ = resume(RULES[rule], dtype, stop, how)
    for (name, p), (_, q) in zip(whole, named, strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("how", ["by place", "by name"])
def test_loading_changes_no_dtype(how):
    """torch's own loading would cast float32 moments to the parameter's bfloat16."""
    _, named, first, second = resume(RULES["wide"], torch.bfloat16, 10, how)
    found = {k: v.dtype for _, p in named for k, v in second.state[p].items() if k not in INTS}
    assert set(found) == {"left", "right", "exp_avg", "exp_avg_sq"}
    assert set(found.values()) == {torch.float32}
    assert all(
        type(second.state[p][k]) is int for _, p in named for k in INTS & set(second.state[p])
    )


INTS = {"step", "due", "start", "gap"}


def test_loaded_tensors_are_copies():
    named = parameters(SHAPES)
    optimizer = LowRankOptimizer(named, rule=RULES["galore"])
    run(optimizer, named, gradients(SHAPES, 3))
    state = optimizer.named_state_dict()
    kept = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
    for load in ("named", "plain"):
        other = LowRankOptimizer(named, rule=RULES["galore"])
        if load == "named":
            other.load_named_state_dict(state)
        else:
            other.load_state_dict(optimizer.state_dict())
        run(other, named, gradients(SHAPES, 3))
    assert all(torch.equal(torch.as_tensor(kept[k]), torch.as_tensor(v)) for k, v in state.items())


def test_named_state_survives_regrouping_and_order():
    grads, rule = gradients(SHAPES, 12), RULES["galore"]
    whole, named = parameters(SHAPES), parameters(SHAPES)
    run(LowRankOptimizer(whole, lr=0.02, rule=rule), whole, grads)
    first = LowRankOptimizer(named, lr=0.02, rule=rule)
    run(first, named, grads[:8])
    second = LowRankOptimizer(
        [{"params": named[2:][::-1]}, {"params": named[:2]}], lr=0.3, rule=rule
    )
    second.load_named_state_dict(first.named_state_dict())
    run(second, named, grads[8:])
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(whole, named, strict=True))
    assert [g["lr"] for g in second.param_groups] == [0.02, 0.02]


def test_state_of_another_rule_is_refused():
    named = parameters(SHAPES)
    first = LowRankOptimizer(named, rule=RULES["galore"])
    run(first, named, gradients(SHAPES, 1))
    second = LowRankOptimizer(named, rule=Rule(Adam(eps_mode="hf"), SVD(2), Refresh(7), scale=0.25))
    with pytest.raises(UsageError) as error:
        second.load_state_dict(first.state_dict())
    assert str(error.value) == (
        "the optimizer's state was saved under another rule\n"
        "  rule.projector.rank  saved 3, now 2\n"
        "Resume with the saved values, or start the optimizer fresh."
    )
    with pytest.raises(FileError, match=r"w0/right +saved \(3, 6\), needed \(2, 6\)"):
        second.load_named_state_dict(first.named_state_dict())


def test_state_of_a_stranger_is_refused():
    named = parameters(SHAPES)
    first = LowRankOptimizer(named)
    run(first, named, gradients(SHAPES, 1))
    with pytest.raises(FileError, match="w3  saved, but not trained here"):
        LowRankOptimizer(named[:3]).load_named_state_dict(first.named_state_dict())


def test_swapped_parameters_keep_their_state():
    """accelerate puts other Parameter objects into the groups under FSDP2."""
    grads, rule = gradients(SHAPES, 12), RULES["galore"]
    whole, named = parameters(SHAPES), parameters(SHAPES)
    run(LowRankOptimizer(whole, lr=0.02, rule=rule), whole, grads)
    optimizer = LowRankOptimizer(named, lr=0.02, rule=rule)
    run(optimizer, named, grads[:5])
    named = [(name, nn.Parameter(p.detach().clone())) for name, p in named]
    optimizer.param_groups[0]["params"] = [p for _, p in named]
    run(optimizer, named, grads[5:])
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(whole, named, strict=True))
    assert set(optimizer.state) == {p for _, p in named}


def test_reset_parameters_start_afresh():
    named = parameters(SHAPES)
    optimizer = LowRankOptimizer(named, rule=RULES["galore"])
    run(optimizer, named, gradients(SHAPES, 3))
    optimizer.reset_state([named[0][1]])
    assert named[0][1] not in optimizer.state
    run(optimizer, named, gradients(SHAPES, 1))
    assert optimizer.state[named[0][1]]["step"] == 1 and optimizer.state[named[1][1]]["step"] == 4


def test_every_state_is_tensors_and_numbers():
    for rule in RULES.values():
        named = parameters(SHAPES)
        optimizer = LowRankOptimizer(named, rule=rule)
        run(optimizer, named, gradients(SHAPES, 9))
        for state in optimizer.state.values():
            assert all(isinstance(v, torch.Tensor | int | float) for v in state.values())
