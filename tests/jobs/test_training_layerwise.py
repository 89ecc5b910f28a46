"""Layer-wise mode in a Trainer: the same training, with few gradients alive."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from eckart.errors import UsageError
from eckart.jobs.settings.settle import gradient_bytes
from eckart.jobs.settings.tree import Train
from eckart.jobs.training.trainer import Training
from eckart.recipe import Recipe, attach, registry
from tests.conftest import tiny
from tests.jobs.loops import SEED, logged, mixed

STEPS = 7


def trained(out, update, accumulate, layerwise, monkeypatch=None, **more):
    """A dense llama in fp64 after some steps, and the most bytes of gradients at a time."""
    dense: Any = registry.load("dense")
    model = tiny("llama", torch.float64)
    handle = attach(model, Recipe(weights=dense(), update=update), seed=SEED)
    trainer = mixed(handle, Trainer, out, STEPS, accumulate, **more)
    trainer.layerwise = layerwise
    peaks = Peaks(model, trainer)
    trainer.train()
    return trainer, peaks


class Peaks:
    """The most bytes of gradients, whole and projected, that are alive at once: by step."""

    def __init__(self, model: nn.Module, trainer: Training):
        self.model, self.trainer = model, trainer
        self.by_step: dict[int, int] = {}
        for p in model.parameters():  # before the optimizer's hooks: each gradient is seen
            p.register_post_accumulate_grad_hook(self.look)

    def look(self, _: Any) -> None:
        projected = self.trainer.inner_optimizer.projected
        low = [] if projected is None else list(projected.low.values())
        alive = [p.grad for p in self.model.parameters() if p.grad is not None] + low
        step, count = self.trainer.state.global_step, sum(t.nbytes for t in alive)
        self.by_step[step] = max(count, self.by_step.get(step, 0))

    @property
    def highest(self) -> int:
        return max(self.by_step.values())


def galore(**more: Any) -> Any:
    return registry.load("galore")(rank=2, every=4, **more)  # type: ignore[call-arg]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_galore_trains_as_without_it(accumulate, tmp_path):
    """fp64; the norm is that of the low-rank gradients of the whole step, and is clipped."""
    (a, full), (b, few) = (
        trained(tmp_path, galore(), accumulate, layerwise) for layerwise in (False, True)
    )
    for (name, p), q in zip(a.model.named_parameters(), b.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9, msg=name)
    assert logged(a, "grad_norm") == pytest.approx(logged(b, "grad_norm"), rel=1e-9)
    assert max(logged(a, "grad_norm")) > 0.5  # else nothing was clipped
    assert full.highest == sum(p.nbytes for p in a.model.parameters() if p.requires_grad)
    # a basis that is due keeps its gradient where micro-batches are accumulated; in the
    # first step all are
    later = [count for step, count in few.by_step.items() if accumulate == 1 or step > 0]
    assert max(later) < 0.7 * full.highest


# fira needs whole gradients, so it accumulates nothing layer by layer
@pytest.mark.parametrize(("slug", "accumulate"), [("galore", 1), ("galore", 3), ("fira", 1)])
def test_no_more_bytes_live_than_a_job_counts(slug, accumulate, tmp_path):
    update: Any = registry.load(slug)(rank=2, every=4)  # type: ignore[call-arg]
    trainer, few = trained(tmp_path, update, accumulate, True, max_grad_norm=0.0)
    train = Train(layerwise=True, accumulate=accumulate)
    counted = gradient_bytes(train, trainer.inner_optimizer)
    # the embedding's gradient comes last, when the largest projected one is gone
    assert 0.7 * counted < few.highest <= counted


def test_a_rule_that_needs_whole_gradients_moves_as_they_come(tmp_path):
    fira: Any = registry.load("fira")
    a, b = (
        trained(tmp_path, fira(rank=2, every=4), 1, layerwise, max_grad_norm=0.0)[0]
        for layerwise in (False, True)
    )
    for (name, p), q in zip(a.model.named_parameters(), b.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9, msg=name)
    assert logged(a, "grad_norm") == pytest.approx(logged(b, "grad_norm"), rel=1e-9)


def test_hooks_end_with_the_training(tmp_path):
    trainer, _ = trained(tmp_path, galore(), 1, True)
    model = trainer.model
    model.zero_grad()
    model(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long))[
        "loss"
    ].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_gradient_scaler_is_refused(tmp_path):
    """It would leave what is projected scaled. Accelerate makes one on a GPU, for fp16."""
    dense: Any = registry.load("dense")
    handle = attach(tiny("llama"), Recipe(weights=dense(), update=galore()))
    trainer = mixed(handle, Trainer, tmp_path, STEPS, 1)
    trainer.layerwise, trainer.accelerator.scaler = True, torch.amp.GradScaler("cpu")
    with pytest.raises(UsageError, match="not seen by a gradient scaler"):
        trainer.train()
