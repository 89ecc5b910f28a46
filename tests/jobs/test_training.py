"""One recipe, three loops: the same losses and the same tensors, whatever the accumulation."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from transformers import Trainer
from trl import SFTTrainer

import eckart
from eckart.errors import Diverged, UsageError
from eckart.jobs.training.trainer import still_fitting
from eckart.recipe import Objective, Recipe, attach, registry
from tests.jobs.loops import LR, arguments, bare, collate, handle_of, head_of, logged, mixed, rows
from tests.tiny import llama

LOOPS = [Trainer, SFTTrainer]
STEPS = 10


@dataclass(frozen=True)
class Calm(Objective):
    """Replaces the loss: its square root plus a price on large logits."""

    kind: ClassVar = "data"

    def loss(self, model, inputs, outputs, loss, reference=None) -> torch.Tensor:
        return 0.7 * loss + 0.01 * outputs["logits"].square().mean()


@dataclass(frozen=True)
class Contrast(Calm):
    """An objective that compares the examples of a batch."""

    couples_batch: ClassVar = True


def objectives(kind: str) -> tuple[Any, ...]:
    if kind == "penalty":
        orthogonality: Any = registry.load("orthogonality")
        return (orthogonality(weight=0.3),)
    return (Calm(),) if kind == "data" else ()


@pytest.mark.parametrize("kind", ["none", "penalty", "data"])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("cls", LOOPS, ids=lambda c: c.__name__)
def test_trainers_train_as_the_bare_loop_does(cls, accumulate, kind, tmp_path):
    ours = handle_of(objectives(kind))
    # An objective on logits takes Trainer's own way in both.
    more = head_of(cls, ours) if kind != "data" else {}
    losses = bare(ours, STEPS, accumulate, **more)
    theirs = handle_of(objectives(kind))
    trained = mixed(theirs, cls, tmp_path, STEPS, accumulate)
    trained.train()
    # Trainer keeps the running loss in fp32: some ulp (1.2e-7) of it.
    torch.testing.assert_close(logged(trained), losses, rtol=1e-5, atol=0)
    for name, tensor in ours.named_state().items():  # fp64: two orders of the same sums
        error = (theirs.named_state()[name] - tensor).norm() / tensor.norm()
        assert error < 1e-9, name


@pytest.mark.parametrize("cls", LOOPS, ids=lambda c: c.__name__)
def test_a_data_objective_changes_what_is_trained(cls, tmp_path):
    plain, with_it = handle_of(), handle_of((Calm(),))
    mixed(plain, cls, tmp_path / "a", 2, 1).train()
    mixed(with_it, cls, tmp_path / "b", 2, 1).train()
    a, b = plain.named_state(), with_it.named_state()
    assert max((a[n] - b[n]).abs().max() for n in a) > 1e-4


@pytest.mark.parametrize("cls", LOOPS, ids=lambda c: c.__name__)
def test_terms_on_the_head_are_trained_and_evaluated(cls, tmp_path):
    handle = handle_of(targets=("head",))
    trained = mixed(handle, cls, tmp_path, 3, 1, do_eval=False)
    before = {n: t.detach().clone() for n, t in handle.named_state().items()}
    trained.train()
    assert all(not torch.equal(t, before[n]) for n, t in handle.named_state().items())
    trained.eval_dataset = trained.train_dataset
    measured = trained.evaluate(trained.train_dataset)["eval_loss"]
    with torch.no_grad():
        expected = handle.model(**collate(rows())).loss.item()
    # Equal rows: the mean over batches is the mean over tokens; SFTTrainer gathers in fp32.
    assert measured == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("cls", LOOPS, ids=lambda c: c.__name__)
def test_evaluation_reports_the_task_loss_without_the_objective(cls, tmp_path):
    handle = handle_of((Calm(),))
    trained = mixed(handle, cls, tmp_path, 1, 1)
    with torch.no_grad():
        expected = handle.model(**collate(rows())).loss.item()
    measured = trained.evaluate(trained.train_dataset)["eval_loss"]
    assert measured == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("cls", LOOPS, ids=lambda c: c.__name__)
def test_an_unmixed_trainer_with_a_data_objective_is_stopped_at_its_first_step(cls, tmp_path):
    from datasets import Dataset

    from tests.jobs.loops import tokenizer

    handle = handle_of((Calm(),))
    before = {n: t.detach().clone() for n, t in handle.named_state().items()}
    extra = {} if cls is Trainer else {"processing_class": tokenizer()}
    foreign = cls(
        model=handle.model,
        args=arguments(cls, tmp_path, 3, 1),
        train_dataset=Dataset.from_list(rows()),
        data_collator=collate,
        **extra,
    )
    with pytest.raises(UsageError, match="this loop leaves the objective out"):
        foreign.train()
    assert all(torch.equal(t, before[n]) for n, t in handle.named_state().items())


def test_an_unmixed_trainer_without_data_objectives_is_let_be(tmp_path):
    from datasets import Dataset

    handle = handle_of()
    args = arguments(Trainer, tmp_path, 1, 1)
    Trainer(
        handle.model, args, train_dataset=Dataset.from_list(rows()), data_collator=collate
    ).train()


def test_an_objective_that_couples_the_batch_refuses_accumulation(tmp_path):
    handle = handle_of((Contrast(),))
    with pytest.raises(UsageError, match=r"train\.accumulate = 4"):
        mixed(handle, Trainer, tmp_path, 1, 4)


@pytest.mark.parametrize("cls", LOOPS, ids=lambda c: c.__name__)
def test_the_log_has_our_norm_the_penalty_and_the_rate_that_was_applied(cls, tmp_path):
    handle = handle_of(objectives("penalty"), lr_ratio=4.0)
    trained = mixed(handle, cls, tmp_path, 4, 1)
    trained.train()
    twin = handle_of(objectives("penalty"), lr_ratio=4.0)
    norms: list[float] = []
    optimizer = twin.optimizer(lr=LR, clip=0.5)
    optimizer.register_step_post_hook(lambda o, *_: norms.append(float(o.grad_norm)))
    twin.optimizer = lambda *a, **k: optimizer  # type: ignore[method-assign]
    bare(twin, 4, 1, **head_of(cls, twin))
    assert logged(trained, "grad_norm") == pytest.approx(norms, rel=1e-9)
    assert all(p > 0 for p in logged(trained, "penalty"))
    rates = sorted([LR * (1 - s / 4) for s in range(4)], reverse=True)
    first, second = logged(trained, "learning_rate"), logged(trained, "learning_rate_2")
    assert first == pytest.approx(rates)
    assert second == pytest.approx([4 * r for r in rates])


def test_micro_batches_of_unequal_length_weigh_by_their_tokens(tmp_path):
    def ragged(examples):
        batch = collate(examples)
        cut = 3 + int(batch["input_ids"].sum()) % 7  # a length that depends on the rows alone
        batch["labels"][:, cut:] = -100
        return batch

    def trained(accumulate: int, size: int):
        handle = handle_of()
        run = mixed(handle, Trainer, tmp_path, 1, accumulate, per_device_train_batch_size=size)
        run.data_collator = lambda rows: {
            k: torch.cat([ragged([r])[k] for r in rows]) for k in ragged(rows[:1])
        }
        run.train()
        return handle.named_state()

    once, in_parts = trained(1, 8), trained(4, 2)
    for name, tensor in once.items():
        torch.testing.assert_close(in_parts[name], tensor, rtol=0, atol=1e-9)


def test_a_loss_that_is_not_finite_names_the_weight(tmp_path):
    handle = handle_of()
    handle.trainable()["model.layers.1.mlp.up_proj.lora.B"].data.fill_(math.nan)
    with pytest.raises(Diverged) as fault:
        mixed(handle, Trainer, tmp_path, 2, 1).train()
    where = "model.layers.1.mlp.up_proj.lora.B (weight)"
    assert fault.value.what == f"loss is NaN at step 1; first in {where}"


def test_an_activation_that_is_not_finite_names_the_module(tmp_path):
    handle = handle_of()
    module = handle.model.model.layers[1].self_attn.k_proj
    module.register_forward_hook(lambda _, args, out: out * math.inf)
    with pytest.raises(Diverged) as fault:
        mixed(handle, Trainer, tmp_path, 2, 1).train()
    assert "; first in model.layers.1.self_attn.k_proj (activation)" in fault.value.what


def test_a_gradient_that_is_not_finite_names_where_the_backward_pass_met_it(tmp_path):
    handle = handle_of()
    for name in ("model.layers.0.mlp.up_proj.lora.A", "model.layers.1.self_attn.q_proj.lora.A"):
        handle.trainable()[name].register_hook(lambda grad: grad * math.nan)
    with pytest.raises(Diverged) as fault:
        mixed(handle, Trainer, tmp_path, 2, 1).train()
    where = "model.layers.1.self_attn.q_proj.lora (gradient)"
    assert fault.value.what == f"gradient norm is NaN at step 1; first in {where}"


@pytest.mark.parametrize("update", [eckart.AltLoRA(), eckart.LoRARITE(), eckart.AdamW()])
def test_of_another_rank_an_earlier_training_s_moments_are_left_out(update):
    """A later stage takes over what fits: a pair's r x r state is a state like any other."""

    def trained(rank):
        handle = attach(llama(), Recipe(weights=eckart.LoRA(rank=rank), update=update))
        return handle, handle.optimizer(lr=1e-3)

    handle, first = trained(4)
    for p in handle.trainable().values():
        p.grad = torch.ones_like(p)
    first.step()
    saved = first.named_state_dict()
    _, same = trained(4)
    kept = still_fitting(saved, same)
    assert kept == {key: value for key, value in saved.items() if not key.endswith("/lr")}
    _, smaller = trained(2)
    kept = still_fitting(saved, smaller)
    smaller.load_named_state_dict(kept)
    assert not any(".lora." in key for key in kept)
