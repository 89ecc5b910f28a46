"""A lab gives all arms the same data and initial weights, and its measurements are right."""

import math
from types import MappingProxyType

import pytest
import torch

from eckart.claims import END, Arm, Splits, Task
from eckart.io.corpora import Corpus
from eckart.jobs.lab.bare_loop import TaskLab, at_steps, start_of
from eckart.jobs.lab.tasks import text_splits, warm_cosine
from eckart.methods import AdamW, Dense, GaLore, LoRA
from eckart.optim.named import pack
from eckart.recipe import Cut, Recipe

SHAPE = MappingProxyType(
    {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
    }
)
TINY = Task(pretrained=None, shape=SHAPE, steps=6, batch_size=4, seq_len=16)
LORA = Recipe(LoRA(rank=2))


def test_a_lab_on_other_text_shares_all_but_the_text():
    lab = TaskLab(TINY, 3, 1e-2)
    other = lab.on("stdlib-code")
    assert other.evaluate(lab.model())["loss"] != lab.evaluate(lab.model())["loss"]
    assert not other.batch(0)["input_ids"].equal(lab.batch(0)["input_ids"])
    assert other.batch(0)["input_ids"].equal(
        TaskLab(TINY, 3, 1e-2).on("stdlib-code").batch(0)["input_ids"]
    )
    own = lab.on(Corpus("own", tuple((str(i), "ab" * 32) for i in range(200))))
    assert set(own.batch(0)["input_ids"].unique().tolist()) <= {1, ord("a") + 1, ord("b") + 1}
    assert own.train(own.model(), LORA, lr=1e-2).quantities["steps_done"] == 6
    assert lab.batch(0)["input_ids"].equal(TaskLab(TINY, 3, 1e-2).batch(0)["input_ids"])


def test_held_out_documents_are_not_trained_on():
    found = text_splits("pydoc-prose", 64)
    train = {tuple(row.tolist()) for row in found.train["input_ids"]}
    for part in (found.validation, found.test):
        rows = [tuple(row.tolist()) for row in part["input_ids"]]
        assert len(rows) > 50 and not train & set(rows)
    other = {tuple(row.tolist()) for row in found.test["input_ids"]}
    assert not other & {tuple(row.tolist()) for row in found.validation["input_ids"]}


def test_a_batch_depends_on_seed_and_step_alone():
    a, b, c = TaskLab(TINY, 1, 1e-3), TaskLab(TINY, 1, 1e-1, steps=3), TaskLab(TINY, 2, 1e-3)
    assert a.batch(5)["input_ids"].equal(b.batch(5)["input_ids"])
    assert not a.batch(5)["input_ids"].equal(c.batch(5)["input_ids"])
    assert not a.batch(5)["input_ids"].equal(a.batch(4)["input_ids"])
    assert not a.batches(1)[0]["input_ids"].equal(a.batch(0)["input_ids"])


def test_the_loop_is_a_bare_loop_with_a_schedule():
    """The same training in plain torch: AdamW with clipping, warm-up and a cosine schedule."""
    lab = TaskLab(TINY, 1, 3e-3)
    ours = lab.train(lab.model(), Recipe(Dense(), AdamW()))
    model = lab.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    losses = []
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 3e-3 * warm_cosine(step, 6, 0.1)
        loss = model(**lab.batch(step)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    # clipping divides by norm + 1e-6 there: a relative 1e-6 of each update
    assert ours.losses == pytest.approx(losses, rel=1e-5)
    assert ours.quantities["loss"] == pytest.approx(lab.evaluate(model)["loss"], rel=1e-5)


def test_a_run_repeats_to_the_bit_whatever_was_drawn_before():
    recipe = Recipe(LoRA(rank=2, dropout=0.3))
    first = TaskLab(TINY, 1, 1e-2).measure(Arm("a", recipe))
    torch.rand(7)
    second = TaskLab(TINY, 1, 1e-2).measure(Arm("b", recipe))
    first.pop("seconds"), second.pop("seconds")
    assert first == second


def test_a_run_leaves_the_global_generator_as_it_was():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    TaskLab(TINY, 1, 1e-2).measure(Arm("a", LORA))
    assert torch.get_rng_state().equal(state)


def test_a_run_that_diverges_is_given_the_worst_loss():
    lab = TaskLab(TINY, 1, 1e6)
    found = lab.measure(Arm("a", Recipe(Dense()), loss_at=(100,)))
    assert found["diverged"] == 1 and math.isfinite(found["loss"])
    first = lab.model()(**lab.batch(0)).loss.item()
    assert found["loss"] == found["validation"] == pytest.approx(first + 1.0, rel=1e-6)


def test_costs_are_counted():
    found = TaskLab(TINY, 1, 1e-2).measure(Arm("a", LORA))
    factors = 2 * (4 * (16 + 16) + 3 * (16 + 24))  # rank 2 on q, k, v, o and gate, up, down
    assert found["parameters"] == factors and found["state_bytes"] == 2 * 4 * factors
    assert found["peak_bytes"] > found["state_bytes"] and found["steps_done"] == 6


def test_watches_run_at_their_steps_and_all_at_the_end_of_a_quick_check():
    seen = []

    def watch(name):
        return lambda trained, lab: seen.append((name, trained.step)) or {name: trained.step}

    arm = Arm("a", LORA, watch={2: watch("early"), 50: watch("late"), END: watch("end")})
    found = TaskLab(TINY, 1, 1e-2).measure(arm)
    assert seen == [("early", 2), ("late", 6), ("end", 6)]
    assert (found["early"], found["late"], found["end"]) == (2, 6, 6)
    assert list(at_steps({END: print}, 9)) == [9]


def test_a_claims_own_data_and_score_are_used():
    def splits():
        rows = torch.arange(64).reshape(8, 8) % 5
        part = {"input_ids": rows, "labels": rows}
        return Splits(part, part, part)

    def score(model, batch):
        return {"rows": len(batch["input_ids"])}

    task = Task(data=splits, pretrained=None, shape={**SHAPE, "vocab_size": 8}, score=score)
    found = TaskLab(task, 1, 1e-2, steps=2).measure(Arm("a", LORA))
    assert found["rows"] == 8 and found["loss"] == found["validation"]


class Halving(LoRA):
    """LoRA that keeps every second component after three steps."""

    def events(self):
        def kept(now):
            index = torch.arange(0, 4, 2)
            return {path: dict.fromkeys(by_name, index) for path, by_name in now.terms.items()}

        yield Cut("halve", lambda step, steps: step == 3, kept)


def test_a_cut_goes_on_with_the_moments_that_are_left():
    lab, seen = TaskLab(TINY, 1, 1e-2), {}

    def watch(trained, lab):
        seen[trained.step] = dict(pack(trained.optimizer.named(), trained.optimizer.state))
        return {}

    recipe = Recipe(Halving(rank=4))
    trained = lab.train(lab.model(), recipe, watch={3: watch, 4: watch, 6: watch})
    name = next(k for k in seen[3] if k.endswith(".A/exp_avg"))
    before, after = seen[3][name], seen[4][name]
    assert before.shape[0] == 4 and after.shape[0] == 2
    # one more step of decay 0.9: what is left of the old moment points the same way
    old = before[::2].flatten()
    assert torch.nn.functional.cosine_similarity(old, after.flatten(), 0) > 0.3
    steps = {v for k, v in seen[6].items() if k.endswith("/step")}
    assert steps == {6} and trained.quantities["parameters"] == 2 * (4 * 32 + 3 * 40)
    assert len(trained.losses) == 6 and all(map(math.isfinite, trained.losses))


def test_a_search_starts_at_the_recipes_default_or_where_it_is_told():
    galore, trained = Arm("a", Recipe(Dense(), GaLore(rank=2))), Task()
    assert start_of(galore, trained) == GaLore.default_lr
    assert start_of(galore, Task(pretrained=None)) == GaLore.scratch_lr
    assert start_of(Arm("a", LORA, lr=0.5), trained) == 0.5
    assert math.isnan(start_of(Arm("a", search=False), trained))


def test_the_schedule_rises_and_falls():
    shares = [warm_cosine(step, 20, 0.1, 0.1) for step in range(20)]
    assert shares[:2] == [0.5, 1.0] and max(shares) == 1.0
    assert all(a >= b for a, b in zip(shares[1:], shares[2:], strict=False))
    assert 0.1 < shares[-1] < 0.11
