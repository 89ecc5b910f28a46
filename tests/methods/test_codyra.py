"""What CoDyRA alone promises: its thresholds, and training several tasks."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.autograd import gradcheck

from eckart.errors import UsageError
from eckart.io import peft
from eckart.linear import LowRank
from eckart.methods.weights.codyra import (
    CoDyRA,
    Gated,
    Thresholds,
    gated,
    next_task,
    official,
    ranks_of,
    shrunk_product,
    soft,
)
from eckart.recipe import Recipe, attach, attach_from
from tests.conftest import batch_for, cast, randomise, tiny
from tests.laws.matrix import logits, steps
from tests.methods.lawful import assert_lawful, carried, draw
from tests.processes import in_processes

F64 = torch.float64


FORMS = [
    {"importance": "spectral", "dense": 0.0},
    {"gates": "normal", "importance": "gate", "shrink": "official", "schedule": "official"},
    {"dense": 0.0},
]


@pytest.mark.parametrize("fields", FORMS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma", "mixtral", "vit"])
def test_every_form_keeps_the_laws(fields, architecture):
    targets = ("linear", "embedding") if architecture == "gemma" else ("linear",)
    assert_lawful(CoDyRA(rank=4, targets=targets, **fields), architecture)


# --- thresholds ----------------------------------------------------------------------------


def test_the_soft_threshold_is_the_proximal_step():
    grid = torch.linspace(-4, 4, 80001, dtype=F64)  # steps of 1e-4
    for w in (-2.0, -0.5, -0.3, 0.0, 0.2, 0.3, 0.31, 3.0):
        v = grid[(0.5 * (grid - w).square() + 0.3 * grid.abs()).argmin()]
        assert abs(float(soft(torch.tensor(w, dtype=F64), 0.3)) - float(v)) <= 1e-4
    a, b = draw(500), draw(500, seed=1)
    assert ((soft(a, 0.4) - soft(b, 0.4)).abs() <= (a - b).abs() + 1e-15).all()  # no expansion
    edge = torch.tensor([0.3 - 1e-9, 0.3 + 1e-9], dtype=F64)
    assert soft(edge, 0.3).abs().max() < 2e-9  # continuous


def test_the_official_shrink_has_twice_the_dead_zone_and_a_jump():
    w = torch.tensor([-0.7, -0.59, 0.2, 0.31, 0.59, 0.61], dtype=F64)
    expected = torch.tensor([-0.4, 0.0, 0.0, 0.0, 0.0, 0.31], dtype=F64)
    torch.testing.assert_close(official(w, 0.3), expected, rtol=0, atol=1e-15)


def test_the_official_schedule_has_the_sum_of_its_code():
    """The loop of the code, word for word, against the closed form."""
    for T, f, K in ((500, 0.5, 50), (400, 0.3, 50), (60, 0.5, 50), (333, 0.47, 20)):
        plan = Thresholds(T, f, K, 5e-3, "official")
        dense, levels = T * f, [5e-3 * j / (K - 1) for j in range(K)]
        q, level, kappas = int((T - dense) / K), 0, []
        for it in range(T):
            if it >= dense and q and it % q == 0 and level < K - 1:
                level += 1
            kappas.append(levels[level] if it > dense else 0.0)
        assert [plan.kappa(it) for it in range(T)] == pytest.approx(kappas, abs=1e-15)
    plan = Thresholds(500, 0.5, 50, 5e-3, "official")
    assert sum(plan.kappa(it) for it in range(500)) == pytest.approx(0.6499, abs=1e-4)
    assert sum(Thresholds(60, 0.5, 50, 5e-3, "official").kappa(i) for i in range(60)) == 0


@pytest.mark.parametrize("T", [2, 7, 20, 60, 500])
@pytest.mark.parametrize("f", [0.0, 0.3, 0.5])
def test_the_even_schedule_grows_to_its_end_in_any_number_of_steps(T, f):
    plan = Thresholds(T, f, 50, 5e-3, "even")
    kappas = [plan.kappa(it) for it in range(T)]
    assert kappas == sorted(kappas) and kappas[-1] == 5e-3
    assert not any(kappas[: int(f * T)])


@pytest.mark.parametrize("schedule", ["even", "official"])
def test_what_is_gathered_at_level_changes_is_the_whole(schedule):
    plan = Thresholds(200, 0.4, 10, 5e-3, schedule)
    gathered = [plan.gathered(it) for it in range(200)]
    assert sum(gathered) == pytest.approx(sum(plan.kappa(it) for it in range(200)))
    assert 9 <= sum(g > 0 for g in gathered) <= 10  # once per level


# --- the term ------------------------------------------------------------------------------


def test_spectral_thresholding_is_that_of_the_dense_product():
    B, w, A = draw(7, 4), draw(4, seed=1), draw(4, 9, seed=2)
    U, s, Vt = torch.linalg.svd((B * w) @ A, full_matrices=False)
    kappa = float(s[2])
    B2, w2, A2 = shrunk_product(B, w, A, kappa)
    expected = (U * (s - kappa).clamp_min(0)) @ Vt
    torch.testing.assert_close((B2 * w2) @ A2, expected, rtol=0, atol=1e-9)
    assert (w2 > 1e-9).sum() == 2


def test_normalised_shrinks_the_size_of_each_component():
    B, w, A = draw(7, 5), draw(5, seed=1), draw(5, 9, seed=2)
    B[:, 3] = 0
    term = Gated(B.clone(), w.clone(), A.clone())
    sizes = (w * B.norm(dim=0) * A.norm(dim=1)).abs()
    kappa = float(sizes.median())
    term.shrink(kappa, "soft", "normalised")
    new = (term.s.detach() * B.norm(dim=0) * A.norm(dim=1)).abs()
    torch.testing.assert_close(new, (sizes - kappa).clamp_min(0), rtol=0, atol=1e-12)
    assert term.s[3] == 0 and term.s.isfinite().all()
    # the same update in other factors: the same decisions
    other = Gated(7 * B, w / 7, A.clone())
    other.shrink(kappa, "soft", "normalised")
    torch.testing.assert_close(other.dense(), term.dense(), rtol=0, atol=1e-12)


def test_gradients_with_a_dead_gate():
    term = Gated(draw(5, 3), draw(3, seed=1), draw(3, 7, seed=2))
    term.s.data[1] = 0
    x, dy = draw(4, 7, seed=3), draw(4, 5, seed=4)
    (term(x) * dy).sum().backward()
    assert not term.B.grad[:, 1].any() and not term.A.grad[1].any() and term.s.grad[1] != 0

    def run(x, B, s, A):
        return torch.func.functional_call(term, {"B": B, "s": s, "A": A}, (x,))

    values = [t.detach().clone().requires_grad_() for t in (x, term.B, term.s, term.A)]
    assert gradcheck(run, values)


def test_the_order_of_components_does_not_matter():
    B, w, A, order = draw(5, 4), draw(4, seed=1), draw(4, 7, seed=2), [2, 0, 3, 1]
    terms = [Gated(B, w, A), Gated(B[:, order], w[order], A[order])]
    for term in terms:
        term.shrink(0.3, "soft", "gate")
    torch.testing.assert_close(terms[0].dense(), terms[1].dense(), rtol=0, atol=1e-12)


def test_without_gates_and_threshold_it_is_lora():
    B, A = torch.zeros(6, 3, dtype=F64), draw(3, 8)
    ours, theirs = Gated(B.clone(), torch.ones(3, dtype=F64), A.clone()), LowRank(B, A, 1.0)
    x, y = draw(9, 8, seed=3), draw(9, 6, seed=4)
    for term in (ours, theirs):
        optimizer = torch.optim.Adam([term.B, term.A], lr=1e-2)
        for _ in range(10):
            optimizer.zero_grad()
            (term(x) - y).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.dense(), theirs.dense(), rtol=0, atol=1e-10)


# --- a training ----------------------------------------------------------------------------


def test_gates_move_by_the_plan_of_each_step():
    """Gates that get no gradient shrink by the sum of the thresholds and no more."""
    method = CoDyRA(rank=4, importance="gate", dense=0.25, levels=4, threshold=0.02)
    handle = attach(tiny("llama"), Recipe(weights=method), steps=8)
    optimizer = handle.optimizer(lr=1e-2)
    left, plan = 1.0, method.thresholds(8)
    for it in range(8):
        for p in handle.trainable().values():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        left -= plan.kappa(it)
        for term in gated(handle).values():
            # fp32: eight subtractions from 1
            torch.testing.assert_close(term.s, torch.full_like(term.s, left), rtol=0, atol=1e-6)
    assert plan.kappa(1) == 0 and plan.kappa(7) == 0.02


def test_spectral_steps_forget_the_moments_only_when_they_rewrite():
    method = CoDyRA(rank=4, importance="spectral", dense=0.5, levels=2)
    handle = attach(tiny("llama"), Recipe(weights=method), steps=8)
    optimizer = handle.optimizer(lr=1e-3)
    kept = []
    for it in range(8):
        steps(handle, optimizer, [batch_for("llama", seed=it)])
        kept.append(bool(optimizer.state))
    rewritten = [method.thresholds(8).gathered(it) > 0 for it in range(8)]
    assert any(rewritten) and kept == [not r for r in rewritten]
    for term in gated(handle).values():
        # fp32 QR and SVD of at most 64 rows
        torch.testing.assert_close(term.B.T @ term.B, torch.eye(4), rtol=0, atol=1e-5)


def test_a_horizon_is_asked_for_by_name():
    handle = attach(tiny("llama"), Recipe(weights=CoDyRA(rank=4)))
    with pytest.raises(UsageError, match="codyra needs the number of steps"):
        steps(handle, handle.optimizer(lr=1e-3), [batch_for("llama")])


def learnt(method, seed=0, dtype=torch.float32, architecture="llama"):
    """A model after a task: some components out, the others trained."""
    model = tiny(architecture, dtype)
    handle = attach(model, Recipe(weights=method), steps=6)
    model.to(dtype)
    optimizer = handle.optimizer(lr=1e-2)
    steps(handle, optimizer, [cast(batch_for(architecture, seed=s), dtype) for s in range(6)])
    with torch.no_grad():
        for i, term in enumerate(gated(handle).values()):
            term.s[..., : i % 5] = 0  # ranks 4, 3, 2, 1, 0
    return model, handle


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_a_new_task_starts_where_the_last_one_ended(architecture):
    model, handle = learnt(CoDyRA(rank=4), dtype=F64, architecture=architecture)
    batch = batch_for(architecture)
    expected = logits(model, batch)
    ranks = {path: int(r) for path, r in ranks_of(handle).items()}
    assert set(ranks.values()) == {0, 1, 2, 3, 4}
    next_task(handle, steps=6)
    # fp64; the sum of the past is now one product
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-12)
    for path, term in gated(handle).items():
        assert term.A_past.shape[-2] == ranks[path] and term.task == 1
        assert not term.B.any() and (term.s == 1).all() and not term.B_past.requires_grad
    past = {p: (t.B_past.clone(), t.A_past.clone()) for p, t in gated(handle).items()}
    first = {p: t.A.detach().clone() for p, t in gated(handle).items()}
    optimizer = handle.optimizer(lr=1e-2)
    steps(handle, optimizer, [cast(batch_for(architecture, seed=9), F64)] * 6)
    assert handle.events.step == 6
    after = logits(model, batch)
    assert not torch.allclose(after, expected, atol=1e-3)
    for path, term in gated(handle).items():  # the past does not move
        assert torch.equal(term.B_past, past[path][0]) and torch.equal(term.A_past, past[path][1])
    next_task(handle)
    torch.testing.assert_close(logits(model, batch), after, rtol=0, atol=1e-12)
    for path, term in gated(handle).items():
        assert not torch.equal(term.A, first[path])  # another draw for another task
    structure = json.loads(json.dumps(handle.structure()))
    second = attach_from(again := tiny(architecture, F64), structure)
    again.to(F64)
    second.load_named_state(handle.named_state())
    torch.testing.assert_close(logits(again, batch), after, rtol=0, atol=1e-12)
    handle.remove()
    assert torch.equal(logits(model, batch), logits(tiny(architecture, F64), batch))


def test_merging_after_two_tasks_keeps_their_sum():
    model, handle = learnt(CoDyRA(rank=4), dtype=F64)
    next_task(handle, steps=6)
    randomise(handle)
    expected = logits(model, batch_for("llama"))
    torch.testing.assert_close(
        logits(handle.merge(), batch_for("llama")), expected, rtol=0, atol=1e-9
    )


def test_the_past_never_outgrows_the_matrix():
    term = Gated(draw(5, 3), torch.ones(3, dtype=F64), draw(3, 7))
    total = torch.zeros(5, 7, dtype=F64)
    for task in range(4):
        total += term.dense().detach() - (term.B_past @ term.A_past)
        expected = term.dense().detach()
        fresh = draw(5, 3, seed=task), torch.ones(3, dtype=F64), draw(3, 7, seed=task + 9)
        term.begin_task(torch.zeros(5, 3, dtype=F64), *fresh[1:])
        torch.testing.assert_close(term.B_past @ term.A_past, expected, rtol=0, atol=1e-10)
        term.B.data.copy_(fresh[0])
        assert term.B_past.shape[-1] <= 5
    assert term.B_past.shape[-1] == 5
    torch.testing.assert_close(term.B_past @ term.A_past, total, rtol=0, atol=1e-10)


def test_peft_gets_the_rank_that_each_site_kept(tmp_path):
    model, handle = learnt(CoDyRA(rank=4))
    next_task(handle)
    expected = logits(model, batch_for("llama"))
    peft.save(handle, tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    # fp32, the same products in another order
    torch.testing.assert_close(logits(loaded, batch_for("llama")), expected, rtol=0, atol=5e-6)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kept = {name: t.shape[0] for name, t in tensors.items() if "lora_A" in name}
    assert set(kept.values()) == {1, 2, 3, 4}
    empty = {path for path, term in gated(handle).items() if term.A_past.shape[-2] == 0}
    assert empty and not any(path in name for name in kept for path in empty)


def test_when_all_gates_die_nothing_is_left():
    method = CoDyRA(rank=4, threshold=1e3, dense=0.0, levels=1)
    model, handle, batch = carried(method, "llama")
    base = logits(tiny("llama"), batch)
    randomise(handle)
    for term in gated(handle).values():
        term.shrink(1e3, "soft", "normalised")
    assert torch.equal(logits(model, batch), base)
    next_task(handle)
    assert all(term.B_past.shape[-1] == 0 for term in gated(handle).values())
    assert torch.equal(logits(model, batch), base)


def sparse_training(rank, count, importance):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    method = CoDyRA(rank=4, importance=importance, dense=0.2, threshold=0.4)
    model = tiny("llama", F64)
    handle = attach(model, Recipe(weights=method), steps=5)
    model.to(F64)
    randomise(handle)
    if count > 1:
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
    optimizer = handle.optimizer(lr=1e-2)
    for seed in range(5):
        batch = batch_for("llama", rows=4, seed=seed)
        batch = {k: t[rank * 4 // count : (rank + 1) * 4 // count] for k, t in batch.items()}
        handle.loss(batch, model(**batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = handle.named_state()
    return {
        k: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for k, t in state.items()
    }


@pytest.mark.parametrize("importance", ["gate", "normalised"])
def test_sharded_gates_shrink_as_whole_ones(importance):
    alone = sparse_training(0, 1, importance)
    assert any((t == 0).any() for name, t in alone.items() if name.endswith(".s"))
    for found in in_processes(sparse_training, 2, importance):
        for name, expected in alone.items():
            # fp64, the mean of two half batches
            torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-9)


def test_a_copy_of_the_method_plans_the_same():
    assert copy.deepcopy(CoDyRA()) == CoDyRA()


def test_the_job_learns_and_keeps_task_by_task(tmp_path, monkeypatch):
    from eckart.io.opening import open_model
    from tests.journeys.runs import eckart, model_folder, texts

    monkeypatch.setenv("ECKART_CACHE", str(tmp_path / "cache"))
    model_folder(tmp_path / "m")
    texts(tmp_path / "a.jsonl")
    lines = [json.loads(line)["text"][::-1] for line in (tmp_path / "a.jsonl").open()]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    ran = eckart(
        "finetune", tmp_path / "m", f"data.train=[{tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}]",
        "method=codyra", "method.rank=4", "train.steps=6", "train.lr=1e-2", "data.eval=0.1",
        "-o", tmp_path / "run", "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    names = sorted(p.name for p in (tmp_path / "run" / "stages").iterdir())
    assert names == ["00-learn-a", "01-keep-a", "02-learn-b", "03-keep-b"]
    first, second = ran.document["tasks"]
    before = ran.document["eval"]["before"]["tasks"]
    assert first["held_out"]["a"]["loss"] < before["a"]["loss"]
    assert second["held_out"]["b"]["loss"] < first["held_out"]["b"]["loss"]
    ended = open_model(tmp_path / "run")
    kept = load_file(tmp_path / "run" / "stages" / "03-keep-b" / "state" / "model.safetensors")
    ranks = {t.shape[-1] for name, t in kept.items() if name.endswith("B_past")}
    assert max(ranks) <= 8 and ended.model is not None
