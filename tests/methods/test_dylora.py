"""What DyLoRA alone promises: every truncation is a LoRA, and inactive components are frozen."""

import copy
import io
import json
import math

import pytest
import torch
from peft import PeftModel
from torch.autograd import gradcheck

from eckart.errors import UsageError
from eckart.io import peft
from eckart.linear import LowRank, describe
from eckart.methods.update.adamw import AdamW
from eckart.methods.weights.dylora import DyLoRA, Nested, Ranks, in_order, nested, use_rank
from eckart.recipe import Recipe, attach, attach_from
from tests.conftest import batch_for, randomise, tiny
from tests.laws.matrix import logits, steps
from tests.methods.lawful import assert_lawful, carried, draw

F64 = torch.float64


FORMS = [{"frozen": True}, {"unit": 2, "draw": "geometric"}, {"active_rank": 2}]


@pytest.mark.parametrize("fields", FORMS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma", "mixtral", "vit"])
def test_every_form_keeps_the_laws(fields, architecture):
    targets = ("linear", "embedding") if architecture == "gemma" else ("linear",)
    assert_lawful(DyLoRA(rank=5, alpha=4.0, targets=targets, **fields), architecture)


def nest(r=6, unit=1, alpha=4.0, m=7, n=9, scaling="lora", seed=0):
    term = Nested(draw(m, r, seed=seed), draw(r, n, seed=seed + 1), alpha, unit, scaling)
    term.bind({"dylora": Ranks(r, r)}, term, "weight")
    return term


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@pytest.mark.parametrize("unit", [1, 4])
@pytest.mark.parametrize("b", range(1, 7))
def test_rank_b_is_the_lora_of_the_first_b(b, unit, scaling):
    term, x, dy = nest(unit=unit, scaling=scaling), draw(5, 9, seed=2), draw(5, 7, seed=3)
    B, A = (t.detach() for t in term.frames())
    scale = 4.0 / (math.sqrt(b) if scaling == "rslora" else b)
    lora = LowRank(B[:, :b].clone(), A[:b].clone(), scale)
    term.ranks.drawn.fill_(b)
    (term(x) * dy).sum().backward()
    (lora(x) * dy).sum().backward()
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(term(x), lora(x), **close)
    dB = torch.cat([B.grad for _, B, _ in term.units()], -1)
    dA = torch.cat([A.grad for _, _, A in term.units()], -2)
    torch.testing.assert_close(dB[:, :b], lora.B.grad, **close)
    torch.testing.assert_close(dA[:b], lora.A.grad, **close)
    assert not dB[:, b:].any() and not dA[b:].any()
    use_rank({"": {"": term}}, b)
    term.eval()
    for ours, theirs in (
        (term(x), lora(x)),
        (term.dense(), lora.dense()),
        (term.back(dy), lora.back(dy)),
        (term.columns(torch.tensor([3, 1])), lora.columns(torch.tensor([3, 1]))),
    ):
        torch.testing.assert_close(ours, theirs, **close)
    assert term.factors()[0].shape == (7, b)


def test_gradients_through_the_gates():
    term, x = nest(r=3), draw(4, 9).requires_grad_()
    term.ranks.drawn.fill_(2)
    names, values = zip(*term.named_parameters(), strict=True)

    def run(x, *tensors):
        return torch.func.functional_call(term, dict(zip(names, tensors, strict=True)), (x,))

    assert gradcheck(run, (x, *values))


def attached(method, **update):
    model = tiny("llama").train()
    handle = attach(model, Recipe(weights=method, update=AdamW(**update)))
    return handle, handle.optimizer(lr=1e-2, clip=0.5)


def values(handle):
    return [
        (term, start, torch.cat([B.detach().flatten(), A.detach().flatten()]).clone())
        for term in nested(handle.terms())
        for start, B, A in term.units()
    ]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("unit", [1, 2])
def test_what_rests_does_not_move_under_momentum_and_decay(frozen, unit):
    handle, optimizer = attached(DyLoRA(rank=5, unit=unit, frozen=frozen), weight_decay=0.1)
    randomise(handle)
    steps(handle, optimizer, [batch_for("llama")])  # all components have momentum now
    seen = set()
    for seed in range(12):
        before = values(handle)
        b = int(handle.shared["dylora"].drawn)
        seen.add(b)
        steps(handle, optimizer, [batch_for("llama", seed=seed)])
        for (term, start, old), (_, _, new) in zip(before, values(handle), strict=True):
            end = min(start + unit, term.width())
            moves = start < b <= end if frozen else start < b
            assert torch.equal(old, new) != moves, (b, start)
    assert len(seen) >= 3


def test_each_component_counts_its_own_steps():
    """A component that first trains late takes Adam's first step, not one corrected for step 50."""
    handle, optimizer = attached(DyLoRA(rank=4, frozen=True))
    counts = dict.fromkeys(range(4), 0)
    for seed in range(10):
        b = int(handle.shared["dylora"].drawn)
        counts[b - 1] += 1
        steps(handle, optimizer, [batch_for("llama", seed=seed)])
    term = nested(handle.terms())[0]
    for i, (_, _, A) in enumerate(term.units()):
        assert (
            optimizer.state[A].get("step", 0) == counts[i]
            if A in optimizer.state
            else not counts[i]
        )
    assert sum(counts.values()) == 10 and max(counts.values()) < 10


def test_at_rank_one_frozen_or_not_is_the_same():
    models = []
    for frozen in (False, True):
        handle, optimizer = attached(DyLoRA(rank=4, frozen=frozen))
        for seed in range(4):
            handle.shared["dylora"].drawn.fill_(1)
            steps(handle, optimizer, [batch_for("llama", seed=seed)])
        models.append(handle.named_state())
    assert all(torch.equal(models[0][n], t) for n, t in models[1].items() if "drawn" not in n)


def test_one_unit_of_all_is_lora():
    B, A = torch.zeros(7, 4), draw(4, 9).float()
    ours = Nested(B, A, 8.0, 4, "lora")
    ours.bind({"dylora": Ranks(4, 4)}, ours, "weight")
    theirs = LowRank(B.clone(), A.clone(), 2.0)
    assert DyLoRA(rank=4, unit=4).probabilities() == {4: 1.0}
    x, y = draw(9, 9, seed=4).float(), draw(9, 7, seed=5).float()
    for term in (ours, theirs):
        optimizer = torch.optim.AdamW(term.parameters(), lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            (term(x) - y).square().sum().backward()
            optimizer.step()
    assert torch.equal(ours.B0, theirs.B) and torch.equal(ours.A0, theirs.A)


def test_the_expected_gradient_is_the_weighted_sum():
    term, x, dy = nest(), draw(5, 9, seed=2), draw(5, 7, seed=3)
    P = DyLoRA(rank=6, draw="geometric").probabilities()
    total, one_by_one = torch.zeros((), dtype=F64), torch.zeros_like(term.A1)
    for b, p in P.items():
        term.ranks.drawn.fill_(b)
        loss = (term(x) * dy).sum()
        one_by_one += p * torch.autograd.grad(loss, term.A1, retain_graph=True)[0]
        total = total + p * loss
    (together,) = torch.autograd.grad(total, term.A1)
    torch.testing.assert_close(one_by_one, together, rtol=0, atol=1e-12)


def test_ranks_are_drawn_as_often_as_they_should_be():
    method = DyLoRA(rank=4, draw="geometric", p=0.5)
    P = method.probabilities()
    assert list(P) == [1, 2, 3, 4] and list(P.values()) == pytest.approx(
        [8 / 15, 4 / 15, 2 / 15, 1 / 15]
    )
    assert DyLoRA(rank=7, unit=3).probabilities() == {3: 1 / 3, 6: 1 / 3, 7: 1 / 3}
    handle = attach(tiny("llama"), Recipe(weights=method))
    before = torch.random.get_rng_state()
    counts, draws = dict.fromkeys(P, 0), 2000
    for step in range(draws):
        handle.events.step = step
        method.draw_rank(handle.events.now("rank of the next step"))
        counts[int(handle.shared["dylora"].drawn)] += 1
    for b, p in P.items():
        assert abs(counts[b] - draws * p) < 3 * math.sqrt(draws * p * (1 - p)), counts
    assert torch.equal(torch.random.get_rng_state(), before)  # the global generator is not used


def test_resume_draws_and_trains_the_same():
    method = DyLoRA(rank=4)
    handle, optimizer = attached(method, weight_decay=0.1)
    steps(handle, optimizer, [batch_for("llama", seed=s) for s in range(4)])
    saved = io.BytesIO()
    torch.save([optimizer.state_dict(), handle.events.state_dict()], saved)
    tensors = {k: v.detach().clone() for k, v in handle.named_state().items()}
    model = tiny("llama").train()
    structure = json.loads(json.dumps(handle.structure()))
    second = attach_from(model, structure, recipe=handle.recipe)
    second.load_named_state(tensors)
    again = second.optimizer(lr=1e-2, clip=0.5)
    saved.seek(0)
    states = torch.load(saved, weights_only=True)
    again.load_state_dict(states[0])
    second.events.load_state_dict(states[1])
    rest = [batch_for("llama", seed=s) for s in range(4, 9)]
    ranks = second.shared["dylora"]
    assert ranks.in_step() == int(ranks.drawn) == handle.shared["dylora"].in_step()
    assert steps(second, again, rest) == steps(handle, optimizer, rest)
    theirs = handle.named_state()
    assert all(torch.equal(t, theirs[n]) for n, t in second.named_state().items())


def test_a_state_loaded_in_place_brings_its_rank():
    ranks = Ranks(5, 5)
    assert ranks.in_step() == 5
    ranks.draw(3)
    ranks.load_state_dict(Ranks(2, 5).state_dict())
    assert ranks.in_step() == 2
    assert copy.deepcopy(ranks).in_step() == 2


def test_all_micro_batches_of_a_step_have_one_rank():
    handle, optimizer = attached(DyLoRA(rank=4))
    for seed in range(6):
        drawn = int(handle.shared["dylora"].drawn)
        for part in range(3):
            batch = batch_for("llama", seed=3 * seed + part)
            (handle.loss(batch, handle.model(**batch)) / 3).backward()
            assert int(handle.shared["dylora"].drawn) == drawn
        for term in nested(handle.terms()):
            resting = [A for start, _, A in term.units() if start >= drawn]
            assert not any(A.grad.any() for A in resting)
        optimizer.step()
        optimizer.zero_grad()


def test_evaluation_is_at_one_rank_whatever_was_drawn():
    model, handle, batch = carried(DyLoRA(rank=4, active_rank=3), "llama")
    randomise(handle)
    expected = logits(model, batch)
    for b in (1, 2, 4):
        handle.shared["dylora"].drawn.fill_(b)
        assert torch.equal(logits(model, batch), expected)
    model.train()
    assert not torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize("b", [1, 3, 5])
def test_every_rank_can_be_exported_and_merged(b, tmp_path):
    model, handle, batch = carried(DyLoRA(rank=5), "llama")
    randomise(handle)
    use_rank(handle.terms(), 2)
    other = logits(model, batch)
    use_rank(handle.terms(), b)
    expected = logits(model, batch)
    assert not torch.allclose(expected, other, atol=1e-3)
    peft.save(handle, tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert loaded.peft_config["default"].r == b
    # fp32, the same products in another order
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=0, atol=5e-6)
    torch.testing.assert_close(logits(handle.merge(), batch), expected, rtol=0, atol=5e-6)


def test_ranks_in_order_cut_best():
    term = nest(r=6)
    whole, terms = term.dense().detach(), {"": {"": term}}
    B, A = (t.detach() for t in term.frames())
    in_order(terms)
    torch.testing.assert_close(term.dense(), whole, rtol=0, atol=1e-12)
    s = torch.linalg.svdvals(whole)
    for b in range(1, 6):
        use_rank(terms, b)
        error = torch.linalg.matrix_norm(term.dense() - whole)
        torch.testing.assert_close(error, s[b:].square().sum().sqrt(), rtol=1e-10, atol=0)
        first = 4.0 / 6 * B[:, :b] @ A[:b]  # the same scale
        assert error <= torch.linalg.matrix_norm(first - whole)
        term.eval()
        x = draw(3, 9, seed=7)
        torch.testing.assert_close(term(x), x @ term.dense().T, rtol=0, atol=1e-12)
    said = json.loads(json.dumps(describe(term)))
    assert Nested.empty(said["tensors"], said["scalars"]).ordered


def test_a_narrow_map_is_cut_at_its_own_rank():
    override = {"match": "attn.q", "rank": 2}
    model, handle, batch = carried(DyLoRA(rank=4, alpha=8.0, overrides=(override,)), "llama")
    randomise(handle)
    use_rank(handle.terms(), 4)
    q = handle.terms()["model.layers.0.self_attn.q_proj"]["dylora"]
    assert q.factors()[0].shape[-1] == 2 and torch.equal(q.gates(), torch.full((2,), 4.0))
    wide = {"match": "attn.q", "rank": 6}
    _, handle, _ = carried(DyLoRA(rank=4, overrides=(wide,)), "llama")
    assert int(handle.shared["dylora"].active) == 6


def test_wrong_ranks_are_refused():
    _, handle, _ = carried(DyLoRA(rank=4), "llama")
    for b in (0, 5):
        with pytest.raises(UsageError, match=r"no such rank(.|\n)*1\.\.4"):
            use_rank(handle.terms(), b)
    with pytest.raises(UsageError, match="active_rank is larger than rank"):
        DyLoRA(rank=4, active_rank=5)
