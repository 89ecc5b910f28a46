"""What LoRA alone promises: gradients of the factors, scales, and every start."""

import json

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.autograd import gradcheck

import eckart
from eckart.errors import UsageError
from eckart.io import peft
from eckart.linear import LowRank, find_sites
from eckart.methods.weights.lora import LoRA, divide_ranks
from eckart.recipe import Recipe, attach
from eckart.recipe.calibrate import gather_activations
from eckart.recipe.targets import sites_of
from tests.conftest import batch_for, randomise, tiny
from tests.laws.matrix import logits
from tests.methods.lawful import assert_lawful, carried, draw

F64 = torch.float64
M, N, R, S = 7, 9, 3, 0.5


def site_with(G=None, m=M, n=N):
    (site,) = find_sites(nn.Linear(n, m, bias=False))
    site.gradient = G
    return site


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa", "olora", "eva", "gradient"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma", "mixtral", "vit"])
def test_every_start_keeps_the_laws(init, architecture):
    targets = ("linear", "embedding") if architecture == "gemma" else ("linear",)
    method = LoRA(rank=4, init=init, targets=targets, rho=1.0)
    assert_lawful(method, architecture)


def test_gradients_of_the_factors_are_the_projected_gradient():
    term, x, dy = LowRank(draw(M, R), draw(R, N, seed=1), S), draw(5, N, seed=2), draw(5, M)
    (term(x) * dy).sum().backward()
    G = dy.T @ x
    # fp64, sums of at most 9 products in another order
    torch.testing.assert_close(term.A.grad, S * term.B.T @ G, rtol=0, atol=1e-12)
    torch.testing.assert_close(term.B.grad, S * G @ term.A.T, rtol=0, atol=1e-12)

    def forward(x, A, B):
        return torch.func.functional_call(term, {"A": A, "B": B}, x)

    inputs = [t.detach().clone().requires_grad_() for t in (x, term.A, term.B)]
    assert gradcheck(forward, inputs)


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_a_frozen_identity_makes_it_full_fine_tuning(frozen):
    W, x, y = draw(M, N), draw(12, N, seed=1), draw(12, M, seed=2)
    if frozen == "A":
        term = LowRank(torch.zeros(M, N, dtype=F64), torch.eye(N, dtype=F64), trained=("B",))
    else:
        term = LowRank(torch.eye(M, dtype=F64), torch.zeros(M, N, dtype=F64), trained=("A",))
    full = W.clone().requires_grad_()
    (own,) = term.parameters()
    for _ in range(5):
        for weight, parameter in ((full, full), (W + term.dense(), own)):
            (grad,) = torch.autograd.grad((x @ weight.T - y).square().sum(), parameter)
            parameter.data -= 1e-2 * grad
    torch.testing.assert_close(W + term.dense(), full, rtol=0, atol=1e-12)


def test_rank_stabilised_scale_is_another_alpha():
    site, rank = site_with(), 4
    one = LoRA(rank=rank, alpha=3.0 * rank**0.5, scaling="rslora").build_one(site)["lora"]
    other = LoRA(rank=rank, alpha=3.0 * rank).build_one(site)["lora"]
    assert one.scale == pytest.approx(other.scale, rel=1e-15) and torch.equal(one.A, other.A)


def test_dropout_acts_in_training_alone():
    term = LowRank(draw(M, R), draw(R, N, seed=1), S, dropout=0.5)
    x = draw(5, N)
    assert not torch.equal(term.train()(x), term.eval()(x))
    assert torch.equal(term(x), LowRank(term.B.detach(), term.A.detach(), S)(x))


def test_pissa_takes_the_leading_singular_values_and_leaves_the_rest():
    site = site_with()
    W = site.weight(F64)
    values = torch.linalg.svdvals(W)
    term = LoRA(rank=R, init="pissa", alpha=1.5).build_one(site)["lora"]
    B, A = term.B.double(), term.A.double()
    product = term.scale * B @ A
    # fp32 factors of a matrix of order 1
    torch.testing.assert_close(torch.linalg.svdvals(product)[:R], values[:R], rtol=1e-5, atol=0)
    torch.testing.assert_close(
        torch.linalg.svdvals(W - product)[: M - R], values[R:], rtol=0, atol=1e-6
    )
    torch.testing.assert_close(B.norm(dim=0), A.norm(dim=1), rtol=1e-5, atol=0)


# --- gradient ------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [2, 3, 6])  # 2 r of 7 directions, and more than there are
def test_gradient_start_takes_the_directions_after_as(rank):
    G = draw(M, N)
    term = LoRA(rank=rank, init="gradient").build_one(site_with(G.float()))["lora"]
    U, _, Vt = torch.linalg.svd(G)
    size = (M / 256) ** 0.25
    B, A = term.B.double() / size, term.A.double() / size
    first = min(rank, M - rank)
    # fp32 singular vectors with gaps of order 1
    torch.testing.assert_close(A.T @ A, Vt[:rank].T @ Vt[:rank], rtol=0, atol=1e-5)
    Q = U[:, first : first + rank]
    torch.testing.assert_close(B @ B.T, Q @ Q.T, rtol=0, atol=1e-5)
    assert torch.equal(term.B0, term.B) and torch.equal(term.A0, term.A)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_an_orthogonal_start_is_zero_and_moves(rank):
    term = LoRA(rank=rank, init="orthogonal").build_one(site_with())["lora"]
    # fp32: the products of a rotation's rows, of order 1e-2
    torch.testing.assert_close(term.dense(), torch.zeros(M, N), rtol=0, atol=1e-7)
    term(torch.ones(1, N)).sum().backward()
    assert term.B.grad.any() or term.A.grad.any()


def test_gradient_start_covers_twice_the_directions_in_its_first_step():
    G = draw(M, N)

    def first_step(term):
        B, A = term.B.double(), term.A.double()
        return B @ B.T @ G + G @ A.T @ A  # up to -lr s^2

    def missed(step):  # of G, by the best multiple of the step
        return 1 - (step * G).sum() ** 2 / (step.square().sum() * G.square().sum())

    site = site_with(G.float())
    kaiming = LoRA(rank=R).build_one(site)["lora"]
    gradient = LoRA(rank=R, init="gradient").build_one(site)["lora"]
    s = torch.linalg.svdvals(G)
    tail = s[2 * R :].square().sum() / s.square().sum()
    torch.testing.assert_close(missed(first_step(gradient)), tail, rtol=1e-3, atol=0)
    assert missed(first_step(kaiming)) > 5 * tail


# --- eva -----------------------------------------------------------------------------------


def eva(architecture="llama", **fields):
    model, batches = tiny(architecture), [batch_for(architecture, seed=s) for s in range(4)]
    method = LoRA(**{"rank": 4, "init": "eva", **fields})
    handle = attach(model, Recipe(method), calibration=batches)
    fresh = tiny(architecture)
    sites = sites_of(fresh)
    gather_activations(fresh, sites, batches)
    return model, handle, {site.path: site.activations for site in sites}


def ranks_of(handle):
    terms = handle.terms()
    return {
        path: terms[path]["lora"].A.shape[0] if path in terms else 0
        for path, site in handle.sites.items()
    }


def test_eva_leaves_out_the_padding_of_each_side():
    """An encoder and a decoder of one length: each has padding of its own."""
    model, batch = tiny("t5"), batch_for("t5")
    length = batch["labels"].shape[1]
    ids = batch["input_ids"][:, :1].expand(-1, length).contiguous()
    mask, labels = torch.ones_like(ids), batch["labels"].clone()
    mask[:, 3:], labels[:, 5:] = 0, -100
    sites = sites_of(model)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    gather_activations(model, sites, [batch])
    counts = {s.path: len(s.activations) // len(ids) for s in sites if s.kind == "linear"}
    inner = {p: c for p, c in counts.items() if "block" in p}
    cross = ("EncDecAttention.k", "EncDecAttention.v")
    assert {c for p, c in inner.items() if p.startswith("encoder") or p.endswith(cross)} == {3}
    assert {c for p, c in inner.items() if p.startswith("decoder") and not p.endswith(cross)} == {5}


def test_eva_directions_are_those_of_the_centred_inputs():
    _, handle, inputs = eva()
    for path, by_name in handle.terms().items():
        term, X = by_name["lora"], inputs[path].double()
        values, vectors = torch.linalg.eigh(torch.cov(X.T))
        exact = vectors.flip(-1)[:, : term.A.shape[0]].T
        assert not term.B.any()
        # one by one: neighbouring variances differ by more than fp32 noise in these inputs
        assert ((term.A.double() * exact).sum(1).abs() > 0.99).all(), path


def test_eva_divides_the_budget_by_explained_variance():
    _, handle, inputs = eva(rho=2.0)
    ranks, shares = ranks_of(handle), {}
    for path, site in handle.sites.items():
        X = inputs[path].double()
        values = torch.linalg.eigvalsh(torch.cov(X.T)).flip(0)
        shares[path] = (values / values.sum())[: min(8, *site.shape)]
    assert sum(ranks.values()) == 4 * len(ranks) and max(ranks.values()) <= 8
    assert len(set(ranks.values())) > 2
    kept = [shares[path][r - 1] for path, r in ranks.items() if r]
    left = [shares[path][r] for path, r in ranks.items() if r < len(shares[path])]
    assert min(kept) > max(left) - 1e-6
    scales = {by_name["lora"].scale for by_name in handle.terms().values()}
    assert scales == {8.0}  # alpha / r of the mean rank, everywhere


def test_eva_with_rho_one_gives_all_maps_the_same():
    _, handle, _ = eva(rho=1.0)
    assert set(ranks_of(handle).values()) == {4}


def test_divide_ranks_by_hand():
    shares = [torch.tensor(s) for s in ([0.5, 0.2], [0.5, 0.2], [0.4, 0.3], [0.1])]
    assert divide_ranks(shares, 1) == [1, 0, 0, 0]  # the first wins a tie
    assert divide_ranks(shares, 4) == [1, 1, 2, 0]
    assert divide_ranks(shares, 5) == [2, 1, 2, 0]
    assert divide_ranks(shares, 99) == [2, 2, 2, 1]


def test_eva_gives_a_map_with_flat_inputs_no_term_and_none_more_than_its_most():
    model = nn.ModuleDict({name: nn.Linear(30, 40, bias=False) for name in "abc"})
    sites = find_sites(model)
    narrow = (draw(200, 6) @ draw(6, 30, seed=1)).float()  # six directions hold everything
    sites[0].activations = sites[1].activations = narrow
    sites[2].activations = draw(200, 30, seed=2).float()
    sites[1].overrides = {"rank": 1}
    parts = LoRA(rank=3, init="eva").build(sites)  # 3 + 1 + 3 ranks; at most 6, 2 and 6
    ranks = [p["lora"].A.shape[0] if p else 0 for p in parts.values()]
    assert ranks == [5, 2, 0] and parts["c"] == {}


def test_eva_leaves_what_it_cannot_see_to_the_usual_start():
    _, handle, _ = eva("mixtral", targets=("experts", "embedding"), rho=1.0)
    terms = handle.terms()
    gate_up = terms["model.layers.0.mlp.experts.gate_up_proj"]["lora"]
    down = terms["model.layers.0.mlp.experts.down_proj"]["lora"]
    table = terms["model.embed_tokens"]["lora"]
    assert torch.equal(gate_up.A[0], gate_up.A[1]) and not gate_up.B.any()
    torch.testing.assert_close(gate_up.A[0] @ gate_up.A[0].mT, torch.eye(4), rtol=0, atol=1e-5)
    assert not torch.equal(down.A[0], down.A[1]) and down.A.shape[-2] == 4
    assert not table.A.any() and table.B.any()


def test_eva_file_for_peft_has_the_ranks_and_the_scale(tmp_path):
    model, handle, _ = eva(rho=2.0)
    randomise(handle)
    expected = logits(model, batch_for("llama"))
    peft.save(handle, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["rank_pattern"] and config["alpha_pattern"]
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    # fp32, the same products in another order
    torch.testing.assert_close(logits(loaded, batch_for("llama")), expected, rtol=0, atol=5e-6)


# --- asking --------------------------------------------------------------------------------


@pytest.mark.parametrize(("init", "need"), [("eva", "activations"), ("gradient", "gradients")])
def test_data_are_asked_for_by_the_starts_that_use_them(init, need):
    with pytest.raises(UsageError, match=f"lora needs {need}"):
        attach(tiny("llama"), Recipe(LoRA(rank=4, init=init)))
    attach(tiny("llama"), Recipe(LoRA(rank=4)))


def test_a_start_from_data_in_an_override_says_what_is_missing():
    method = eckart.LoRA(rank=4, overrides=({"match": "attn", "init": "gradient"},))
    with pytest.raises(UsageError, match="this start of lora needs gradients"):
        attach(tiny("llama"), Recipe(method))


def test_a_start_subtracts_to_nothing():
    model, handle, batch = carried(LoRA(rank=4, init="gradient"), "llama")
    assert all(by_name["lora"].B.any() for by_name in handle.terms().values())
    assert torch.equal(logits(model, batch), logits(tiny("llama"), batch))
