"""What LaMDA alone promises: the start, the freezing of B, and the ranks of LaMDA++."""

import json
import math

import pytest
import torch
from peft import PeftModel
from torch.autograd import gradcheck
from transformers import Trainer, TrainerCallback

from eckart.errors import UsageError
from eckart.io import peft
from eckart.jobs.measuring.memory import held_state_bytes
from eckart.jobs.training import cut
from eckart.jobs.training.checkpoints import read_state
from eckart.linear import LowRank
from eckart.linear.lowrank import low_rank
from eckart.methods.update.adamw import AdamW
from eckart.methods.weights.lamda import (
    Core,
    LaMDA,
    at_equal_energy,
    energies,
    frozen_columns,
    in_bins,
)
from eckart.recipe import Recipe, attach, attach_from
from tests.conftest import batch_for, randomise, tiny
from tests.jobs.loops import SEED, mixed
from tests.laws.matrix import logits, steps
from tests.methods.lawful import assert_lawful, carried, draw

F64 = torch.float64


FORMS = [{"init": "svd_zero"}, {"init": "code", "alpha": 4.0}, {"eta": 0.0}, {"eta": 1.0}]


@pytest.mark.parametrize("fields", FORMS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma", "mixtral", "vit"])
def test_every_form_keeps_the_laws(fields, architecture):
    targets = ("linear", "embedding") if architecture == "gemma" else ("linear",)
    assert_lawful(LaMDA(rank=4, targets=targets, **fields), architecture)


@pytest.mark.parametrize("init", ["svd", "svd_zero", "code"])
def test_it_starts_at_the_base_in_every_dtype(init):
    for dtype in (torch.float32, F64):
        model, _, batch = carried(LaMDA(rank=8, init=init), "llama", dtype)
        # B_0 diag(s_0) has the bits of B R where R is diagonal: the difference is 0, not small
        assert torch.equal(logits(model, batch), logits(tiny("llama", dtype), batch))


@pytest.mark.parametrize("thaw", [True, False])
def test_the_term_is_its_formula_of_rank_r(thaw):
    U, s, Vt, x = draw(7, 3), draw(3, seed=1).abs(), draw(3, 9, seed=2), draw(5, 9, seed=3)
    term = Core(U.clone(), s.diag(), Vt, 0.5, s0=0.5 * s, thaw=thaw)
    assert not term.dense().any()
    term.R.data.add_(draw(3, 3, seed=4))
    if thaw:
        term.B.data.add_(draw(7, 3, seed=5))
    expected = (0.5 * term.B @ term.R - 0.5 * U @ s.diag()) @ Vt
    torch.testing.assert_close(term.dense(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(term(x), x @ expected.T, rtol=0, atol=1e-12)
    assert torch.linalg.matrix_rank(term.dense()) == 3


def test_gradients_of_core_and_outer_factor():
    term, x = Core(draw(5, 3), draw(3, 3), draw(3, 7), s0=draw(3)), draw(4, 7).requires_grad_()

    def run(x, B, R):
        return torch.func.functional_call(term, {"B": B, "R": R}, (x,))

    B, R = draw(5, 3, seed=1).requires_grad_(), draw(3, 3, seed=2).requires_grad_()
    assert gradcheck(run, (x, B, R))


def test_a_pass_keeps_r_numbers_per_token_where_lora_keeps_n():
    x = draw(64, 90).requires_grad_()
    terms = {
        "lamda": Core(draw(7, 4), draw(4, 4), draw(4, 90)),
        "lora": LowRank(draw(7, 4), draw(4, 90)),
    }
    kept = {name: [] for name in terms}
    for name, term in terms.items():
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, name=name: kept[name].append(t.shape) or t, lambda t: t
        ):
            term(x)
    per_token = {name: sum(s[1] for s in shapes if s[0] == 64) for name, shapes in kept.items()}
    assert per_token == {"lamda": 4, "lora": 4 + 90}


@pytest.mark.parametrize(("steps_", "eta", "r"), [(20, 0.3, 4), (100, 0.3, 32), (7, 1.0, 64)])
def test_the_schedule_freezes_all_columns_in_time(steps_, eta, r):
    k = [frozen_columns(t, steps_, eta, r) for t in range(steps_ + 1)]
    assert k[0] == 0 and k == sorted(k)
    assert k[math.ceil(eta * steps_)] == r and k[-1] == r
    assert all(k[t] == math.floor(r * t / (eta * steps_) + 1e-12) for t in range(int(eta * steps_)))
    assert frozen_columns(0, steps_, 0.0, r) == r


def attached(method, steps_=10, **update):
    model = tiny("llama")
    handle = attach(model, Recipe(weights=method, update=AdamW(**update)), steps=steps_)
    return handle, handle.optimizer(lr=1e-2, clip=0.5)


def columns_of(handle):
    return {path: t["lamda"].B.detach().clone() for path, t in handle.terms().items()}


def test_a_frozen_column_is_constant_under_momentum_and_decay():
    handle, optimizer = attached(LaMDA(rank=4, eta=0.5, init="svd_zero"), weight_decay=0.1)
    randomise(handle)
    before = columns_of(handle)
    for t in range(8):
        steps(handle, optimizer, [batch_for("llama", seed=t)])
        now, k = columns_of(handle), frozen_columns(t, 10, 0.5, 4)
        for path in now:
            assert torch.equal(now[path][:, :k], before[path][:, :k])
            assert all((now[path][:, i] != before[path][:, i]).any() for i in range(k, 4))
        before = now
    assert k == 4  # the last steps trained R alone


def test_frozen_columns_are_out_of_the_clipped_norm():
    handle, optimizer = attached(LaMDA(rank=4, eta=0.2))
    randomise(handle)
    steps(handle, optimizer, [batch_for("llama", seed=t) for t in range(2)])
    batch = batch_for("llama", seed=5)
    handle.loss(batch, handle.model(**batch)).backward()
    cores = [g for n, p in handle.trainable().items() if n.endswith(".R") for g in [p.grad]]
    expected = torch.stack([g.square().sum() for g in cores]).sum().sqrt()
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm, expected)


def test_resume_in_the_middle_of_the_thaw():
    method = LaMDA(rank=4, eta=0.8, init="svd_zero")
    batches = [batch_for("llama", seed=s) for s in range(8)]
    handle, optimizer = attached(method, weight_decay=0.1)
    steps(handle, optimizer, batches[:4])
    state = optimizer.state_dict(), handle.events.state_dict()
    tensors = {k: v.detach().clone() for k, v in handle.named_state().items()}
    second = attach_from(
        tiny("llama"), json.loads(json.dumps(handle.structure())), recipe=handle.recipe
    )
    second.steps, second.lr = handle.steps, handle.lr
    second.load_named_state(tensors)
    again = second.optimizer(lr=1e-2, clip=0.5)
    again.load_state_dict(state[0])
    second.events.load_state_dict(state[1])
    assert steps(second, again, batches[4:]) == steps(handle, optimizer, batches[4:])
    theirs = handle.named_state()
    assert all(torch.equal(t, theirs[n]) for n, t in second.named_state().items())


class Memory(TrainerCallback):
    """The optimizer's names and bytes of state after each step."""

    def __init__(self):
        self.seen = {}

    def on_step_end(self, args, state, control, optimizer, **_):
        inner = getattr(optimizer, "optimizer", optimizer)
        names = {name.rpartition(".")[2] for name, _, _ in inner.named()}
        self.seen[state.global_step] = names, held_state_bytes(inner)


@pytest.mark.parametrize("init", ["svd", "svd_zero"])
def test_b_leaves_the_optimizer_after_the_thaw_and_a_run_resumes_on_either_side(init, tmp_path):
    method = LaMDA(rank=4, eta=0.5, init=init)

    def run(folder, resume=None):
        model, recipe, saved = tiny("llama"), Recipe(weights=method), None
        if resume:
            saved = read_state(resume)["structure"]
            handle = attach_from(model, json.loads(json.dumps(saved)), recipe=recipe)
            handle.steps = 8
        else:
            handle = attach(model, recipe, steps=8, seed=SEED)
        saves = {"save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2}
        trained, memory = mixed(handle, Trainer, folder, 8, 1, **saves), Memory()
        trained.add_callback(memory)
        trained.train(resume_from_checkpoint=str(resume) if resume else None)
        return {n: t.detach().clone() for n, t in handle.named_state().items()}, memory.seen

    final, seen = run(tmp_path)
    cores = len(attached(method)[0].terms())
    assert seen[4][0] == {"B", "R"} and seen[5][0] == {"R"}
    per_core = 2 * 4 * 4 * 4 + 8  # two moments of a 4 x 4 core in fp32, and a count
    assert seen[5][1] <= cores * per_core < seen[4][1] / 4
    for step in (3, 6):
        again, _ = run(tmp_path, tmp_path / "checkpoints" / f"step-{step}")
        assert all(torch.equal(t, final[name]) for name, t in again.items())


def test_b_stays_where_fsdp_holds_it(monkeypatch):
    handle, _ = attached(LaMDA(rank=4, eta=0.3))
    assert [step for step in range(1, 10) if cut.is_due(handle, step)] == [3]
    monkeypatch.setattr(cut, "FSDPModule", type(handle.model))
    assert not any(cut.is_due(handle, step) for step in range(1, 10))


def test_what_moves_after_the_thaw_is_the_same_with_b_gone():
    """A loop without structural changes keeps B to the end; the weights are the same."""
    batches = [batch_for("llama", seed=t) for t in range(6)]
    ends = []
    for leaves in (True, False):
        handle, optimizer = attached(LaMDA(rank=4, eta=0.3))
        handle.model.double()
        steps(handle, optimizer, batches[:3])
        if leaves:
            kept = handle.events.due_cut()
            moments = cut.cut_moments(handle, kept, optimizer.named_state_dict())
            cut.cut_terms(handle, kept)
            optimizer = handle.optimizer(lr=1e-2, clip=0.5)
            optimizer.load_named_state_dict(moments)
        else:
            assert handle.events.due_cut()
        steps(handle, optimizer, batches[3:])
        ends.append(handle.named_state())
    for name, tensor in ends[0].items():
        # fp64: the clipped norm is a sum with and without zeros
        torch.testing.assert_close(tensor, ends[1][name], rtol=0, atol=1e-12)


def test_a_horizon_is_asked_for_by_name():
    handle = attach(tiny("llama"), Recipe(weights=LaMDA(rank=4)))
    optimizer = handle.optimizer(lr=1e-3)
    with pytest.raises(UsageError, match="lamda needs the number of steps"):
        steps(handle, optimizer, [batch_for("llama")])
    handle = attach(tiny("llama"), Recipe(weights=LaMDA(rank=4, eta=0.0)))
    steps(handle, handle.optimizer(lr=1e-3), [batch_for("llama")])


def train(parameters, forward, optimizer_class, count=10, **options):
    optimizer = optimizer_class(parameters, lr=1e-2, **options)
    x, y = draw(9, 8, seed=10), draw(9, 6, seed=11)
    for _ in range(count):
        optimizer.zero_grad()
        (forward(x) - y).square().mean().backward()
        optimizer.step()


def test_without_thaw_it_is_lora_xs():
    B, A = torch.linalg.qr(draw(6, 3))[0], torch.linalg.qr(draw(8, 3))[0].T.contiguous()
    ours = Core(B, torch.zeros(3, 3, dtype=F64), A, thaw=False)
    theirs = LowRank(B, A, R=torch.zeros(3, 3, dtype=F64), trained=("R",))
    for term in (ours, theirs):
        train([p for p in term.parameters() if p.requires_grad], term, torch.optim.Adam)
    assert ours.R.abs().max() > 1e-2
    torch.testing.assert_close(ours.dense(), theirs.dense(), rtol=0, atol=1e-10)


def test_with_an_identity_core_it_is_lora_with_a_frozen_a():
    A = draw(3, 8)
    ours = Core(torch.zeros(6, 3, dtype=F64), torch.eye(3, dtype=F64), A, 2.0)
    theirs = LowRank(torch.zeros(6, 3, dtype=F64), A, 2.0, trained=("B",))
    for term in (ours, theirs):
        train([term.B], term, torch.optim.Adam)
    torch.testing.assert_close(ours.dense(), theirs.dense(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_the_signs_of_singular_pairs_do_not_matter(optimizer):
    W = draw(6, 8)
    U, s, Vt = (t[..., :3] if i < 2 else t[:3] for i, t in enumerate(torch.linalg.svd(W)))
    flip = torch.tensor([1.0, -1.0, -1.0], dtype=F64)
    pairs = [(U, Vt), (U * flip, flip[:, None] * Vt)]
    terms = [Core(B.contiguous(), s.diag(), A.contiguous(), s0=s) for B, A in pairs]
    for term in terms:
        train(list(term.parameters()), lambda x, t=term: x @ W.T + t(x), optimizer)
    assert terms[0].dense().abs().max() > 1e-3
    torch.testing.assert_close(terms[0].dense(), terms[1].dense(), rtol=0, atol=1e-9)


def test_the_base_and_a_never_move():
    handle, optimizer = attached(LaMDA(rank=4), weight_decay=0.1)
    before = {n: t.clone() for n, t in handle.model.state_dict().items()}
    steps(handle, optimizer, [batch_for("llama", seed=t) for t in range(4)])
    after = handle.model.state_dict()
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    assert moved == set(handle.trainable())


# --- LaMDA++ -------------------------------------------------------------------------------


def spectrum(values, seed=0):
    """A matrix [k + 2, k] with these singular values."""
    k = len(values)
    U = torch.linalg.qr(draw(k + 2, k, seed=seed))[0]
    V = torch.linalg.qr(draw(k, k, seed=seed + 1))[0]
    return U * torch.tensor(values, dtype=F64) @ V.T


FLAT, STEEP = spectrum([1.0] * 12), spectrum([2.0**-i for i in range(12)], seed=2)
RANK_ONE, MIDDLE = spectrum([1.0] + [0.0] * 11, seed=4), spectrum([1 / (i + 1) for i in range(12)])
SHARES = {
    name: energies(W)
    for name, W in {"flat": FLAT, "steep": STEEP, "one": RANK_ONE, "middle": MIDDLE}.items()
}


def test_energies_are_those_of_the_singular_values():
    W = torch.stack([draw(6, 9), 3 * draw(6, 9, seed=1)])
    squares = torch.linalg.svdvals(W).square().sum(0)  # experts pooled
    torch.testing.assert_close(energies(W), squares.cumsum(0) / squares.sum(), rtol=0, atol=1e-12)
    assert not energies(torch.zeros(4, 5)).any()


def test_bins_give_flat_spectra_more():
    ranks = in_bins(SHARES, 4, [2, 3, 5, 6])
    assert ranks == {"flat": 6, "middle": 5, "steep": 3, "one": 2}
    assert in_bins(SHARES, 4, [2, 6]) == {"flat": 6, "middle": 6, "steep": 2, "one": 2}
    five = SHARES | {"also flat": SHARES["flat"]}  # a tie: by name; what is left over goes first
    assert in_bins(five, 4, [2, 6]) == {
        "also flat": 6, "flat": 6, "middle": 6, "steep": 2, "one": 2,
    }  # fmt: skip


def test_equal_energy_spends_the_budget_and_no_more():
    for budget in (16, 50, 100, 200, 10**6):
        ranks = at_equal_energy(SHARES, budget, 2, 9, dict.fromkeys(SHARES, 1))
        cost = sum(r * r for r in ranks.values())
        assert cost <= budget and ranks["one"] == 2
        assert ranks["flat"] >= ranks["middle"] >= ranks["steep"]
        more = at_equal_energy(SHARES, budget + 40, 2, 9, dict.fromkeys(SHARES, 1))
        assert all(more[name] >= ranks[name] for name in ranks)
    # so much that tau is 1: as many as each spectrum has (2^-22 of the energy is still some)
    assert ranks == {"flat": 9, "middle": 9, "steep": 9, "one": 2}


def test_equal_energy_takes_the_largest_level_that_fits():
    weights = {"flat": 1, "middle": 2, "steep": 1, "one": 1}
    for budget in (20, 60, 120):
        ranks = at_equal_energy(SHARES, budget, 1, 12, weights)
        fitting = []
        for tau in torch.cat(list(SHARES.values())).tolist():
            r = {n: int((tau - 1e-12 > E).sum()) + 1 for n, E in SHARES.items()}
            if sum(weights[n] * r[n] ** 2 for n in r) <= budget:
                fitting.append((tau, r))
        assert ranks == max(fitting, key=lambda pair: pair[0])[1]


@pytest.mark.parametrize("scale", [1e-3, 7.0])
def test_the_scale_of_a_matrix_does_not_matter(scale):
    scaled = SHARES | {"flat": energies(scale * FLAT), "middle": energies(scale * MIDDLE)}
    assert in_bins(scaled, 4, [2, 6]) == in_bins(SHARES, 4, [2, 6])
    ones = dict.fromkeys(SHARES, 1)
    assert at_equal_energy(scaled, 80, 2, 9, ones) == at_equal_energy(SHARES, 80, 2, 9, ones)
    twins = {"a": energies(MIDDLE), "b": energies(scale * MIDDLE), "c": SHARES["steep"]}
    ranks = at_equal_energy(twins, 90, 2, 9, dict.fromkeys(twins, 1))
    assert ranks["a"] == ranks["b"]


def test_a_budget_below_the_smallest_ranks_is_refused():
    with pytest.raises(UsageError, match="below the smallest ranks"):
        at_equal_energy(SHARES, 15, 2, 9, dict.fromkeys(SHARES, 1))


@pytest.mark.parametrize("allocation", ["bins", "equal_energy"])
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_model_gets_ranks_by_its_spectra(allocation, architecture, tmp_path):
    override = {"match": "layers.0.self_attn.q_proj", "rank": 3}
    method = LaMDA(rank=6, allocation=allocation, spread=(0.5, 1.0, 1.5), overrides=(override,))
    model, handle, batch = carried(method, architecture)
    ranks = {path: t["lamda"].R.shape[-1] for path, t in handle.terms().items()}
    assert ranks["model.layers.0.self_attn.q_proj"] == 3
    assert len(set(ranks.values())) > 2 and min(ranks.values()) >= 3 and max(ranks.values()) <= 9
    free = {p: r for p, r in ranks.items() if "q_proj" not in p or "layers.0" not in p}
    if allocation == "equal_energy":
        count = {p: math.prod(handle.sites[p].leading) for p in free}
        assert sum(count[p] * r * r for p, r in free.items()) <= sum(count.values()) * 36
    randomise(handle)
    expected = logits(model, batch)
    second = attach_from(again := tiny(architecture), json.loads(json.dumps(handle.structure())))
    second.load_named_state(handle.named_state())
    assert torch.equal(logits(again, batch), expected)
    if architecture == "llama":
        peft.save(handle, tmp_path)
        loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
        # fp32, the same products in another order
        torch.testing.assert_close(logits(loaded, batch), expected, rtol=0, atol=5e-6)


def test_dropout_acts_behind_a():
    term, x = Core(draw(5, 4), draw(4, 4), draw(4, 9), dropout=0.5), draw(6, 9)
    torch.manual_seed(0)
    y = term(x)
    torch.manual_seed(0)
    h = torch.nn.functional.dropout(x @ term.A.T, 0.5)
    torch.testing.assert_close(y, low_rank(h, term.R, term.B), rtol=0, atol=1e-12)
    term.eval()
    torch.testing.assert_close(term(x), x @ term.dense().T, rtol=0, atol=1e-12)


def test_spread_is_checked():
    with pytest.raises(UsageError, match="spread is out of range"):
        LaMDA(spread=(0.0, 1.0))


def test_scaled_copies_tie_in_bins_and_go_by_name():
    for scale in (0.1, 0.3, 0.7, 3.0, 7.0, 1e3):
        twins = {"a": energies(scale * MIDDLE), "b": energies(MIDDLE)}
        assert in_bins(twins, 4, [2, 6]) == {"a": 6, "b": 2}


@pytest.mark.parametrize("init", ["svd", "svd_zero"])
def test_decay_takes_nothing_from_the_leading_part(init):
    """In svd zero is not the base: decay would remove W's largest directions from the model."""
    handle, optimizer = attached(LaMDA(rank=4, init=init), weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in handle.trainable().items()}
    for p in handle.trainable().values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    same = {torch.equal(p, before[name]) for name, p in handle.trainable().items() if "B" in name}
    assert same == {init == "svd"}
