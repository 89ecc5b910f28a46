"""Layer-wise mode equals the normal mode and keeps few gradients alive."""

import pytest
import torch
from torch import nn

from eckart.errors import UsageError
from eckart.optim import SVD, Adam, LowRankOptimizer, Refresh, Rule

RULE = Rule(Adam(), SVD(2), Refresh(5), scale=0.5)


def network(widths=(6, 9, 7, 4), seed=0):
    torch.manual_seed(seed)
    layers = [
        nn.Linear(a, b, dtype=torch.float64) for a, b in zip(widths, widths[1:], strict=False)
    ]
    return nn.Sequential(*(m for layer in layers for m in (layer, nn.Tanh())))


def batches(steps, accumulate, n=6, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(8, n, generator=g, dtype=torch.float64) for _ in range(accumulate)]
        for _ in range(steps)
    ]


def train(model, optimizer, data, after_backward=lambda: None):
    norms = []
    for micro in data:
        for x in micro:
            (model(x) ** 2 / len(micro)).sum().backward()
            after_backward()
        optimizer.step()
        optimizer.zero_grad()
        norms.append(optimizer.grad_norm)
    return norms


@pytest.mark.parametrize("refresh_from, accumulate", [("step", 1), ("step", 4), ("first", 1)])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_equals_the_normal_mode(accumulate, clip, refresh_from):
    models = network(), network()
    data = batches(12, accumulate)
    a, b = (LowRankOptimizer(m.named_parameters(), 0.01, rule=RULE, clip=clip) for m in models)
    b.attach_layerwise(refresh_from)
    norms = [train(m, o, data) for m, o in zip(models, (a, b), strict=True)]
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9, msg=name)
    if clip:
        assert max(n.item() for n in norms[0]) > clip  # else nothing was clipped
        torch.testing.assert_close(norms[0], norms[1], rtol=0, atol=1e-9)


def test_the_first_micro_batch_alone_is_not_the_step():
    """A basis from the first micro-batch differs, so parameters that are due keep G."""
    models = network(), network()
    data = batches(6, 4)
    a, b = (LowRankOptimizer(m.named_parameters(), 0.01, rule=RULE) for m in models)
    b.attach_layerwise("first")
    for m, o in zip(models, (a, b), strict=True):
        train(m, o, data)
    gap = (models[0][0].weight - models[1][0].weight).abs().max()
    assert 1e-4 < gap < 1e-1


def alive(model, optimizer):
    """Bytes of gradients and of projected gradients in memory now."""
    low = optimizer.projected.low.values()
    full = [p.grad for p in model.parameters() if p.grad is not None]
    return sum(t.numel() * t.element_size() for t in [*full, *low])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_only_one_full_gradient_is_alive_between_refreshes(accumulate):
    model = network((40,) * 9)
    optimizer = LowRankOptimizer(
        model.named_parameters(), 0.01, rule=Rule(Adam(), SVD(2), Refresh(50))
    )
    peak = 0

    def look(_):
        nonlocal peak
        peak = max(peak, alive(model, optimizer))

    data = batches(30, accumulate, n=40)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(look)  # before ours: sees the gradient come
    optimizer.attach_layerwise("step" if accumulate > 1 else "first")
    train(model, optimizer, data[:1])  # in the first step all are due
    first, peak = peak, 0
    for step in data[1:]:
        due = sum(s["due"] == s["step"] for s in optimizer.state.values() if "due" in s)
        peak = 0
        train(model, optimizer, [step])
        matrix, low, vector = 40 * 40 * 8, 40 * 2 * 8, 40 * 8
        kept = due if accumulate > 1 else 0
        assert peak <= (1 + kept) * matrix + 8 * low + 8 * vector
    if accumulate == 1:
        assert first <= matrix + 8 * low + 8 * vector


def test_dropped_gradients_are_dropped():
    model = network()
    optimizer = LowRankOptimizer(model.named_parameters(), rule=RULE, layerwise=True)
    train(model, optimizer, batches(1, 1))
    reference = [p.detach().clone() for p in model.parameters()]
    (model(batches(1, 1)[0][0]) ** 2).sum().backward()
    assert optimizer.projected.low
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(reference, model.parameters(), strict=True))


def test_resumes_in_the_middle_of_a_period():
    models, data = (network(), network()), batches(9, 2)
    whole = LowRankOptimizer(models[0].named_parameters(), rule=RULE, layerwise=True)
    train(models[0], whole, data)
    first = LowRankOptimizer(models[1].named_parameters(), rule=RULE, layerwise=True)
    train(models[1], first, data[:4])
    first.projected.bind([], lambda p: None)  # the old optimizer's hooks would take gradients
    second = LowRankOptimizer(models[1].named_parameters(), rule=RULE, layerwise=True)
    second.load_named_state_dict(first.named_state_dict())
    train(models[1], second, data[4:])
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_swapped_parameters_are_hooked_anew():
    models, data = (network(), network()), batches(9, 2)
    train(models[0], LowRankOptimizer(models[0].named_parameters(), rule=RULE), data)
    optimizer = LowRankOptimizer(models[1].named_parameters(), rule=RULE, layerwise=True)
    for layer in models[1]:
        for name, p in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(p.detach().clone()))
    optimizer.param_groups[0]["params"] = list(models[1].parameters())
    train(models[1], optimizer, data)
    assert set(optimizer.projected.handles) == {m.weight for m in models[1] if hasattr(m, "weight")}
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_a_penalty_on_a_freed_gradient_is_refused():
    model = network()
    optimizer = LowRankOptimizer(model.named_parameters(), rule=RULE, layerwise=True)
    optimizer.add_penalty(lambda: {model[2].weight: model[2].weight})
    (model(batches(1, 1)[0][0]) ** 2).sum().backward()
    with pytest.raises(UsageError) as error:
        optimizer.step()
    assert str(error.value) == (
        "a penalty needs a gradient that layer-wise mode has freed\n"
        "  2.weight  is projected layer by layer\n"
        "Leave layer-wise mode out, or the penalty."
    )


def test_a_rule_that_projects_nothing_is_refused():
    with pytest.raises(UsageError, match="layer-wise mode frees nothing here"):
        LowRankOptimizer(network().named_parameters(), layerwise=True)
