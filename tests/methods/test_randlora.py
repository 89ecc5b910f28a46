"""What RandLoRA alone promises: full rank from shared random bases, and PEFT's files."""

import json
import math

import pytest
import torch
from peft import PeftModel, RandLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.autograd import gradcheck

import eckart
from eckart.errors import FileError, UsageError
from eckart.io import peft
from eckart.linear.basis import RandomBasis
from eckart.methods.weights.randlora import RandLoRA, ScaledBases
from eckart.recipe import Recipe, attach
from tests.conftest import batch_for, randomise, tiny
from tests.laws.matrix import logits
from tests.methods.lawful import assert_lawful, carried, draw

F64 = torch.float64
SHAPES = [(11, 7), (7, 11), (8, 8)]  # tall, wide, square; r = 3 divides neither side
ORDERS = ["compat", "paper"]
R = 3


def bases(d, D, shared_a=True, r=R):
    """A [r, 1 or N, d] and B [D, N, r], larger than any map of the tests needs."""
    N = -(-d // r)
    return draw(r, 1 if shared_a else N, d, seed=1), draw(D, N, r, seed=2)


def term_for(m, n, A, B, order="compat", scale=0.5, r=R):
    d = min(m, n)
    N = -(-d // r)
    term = ScaledBases(draw(r, N, seed=3), draw(N, d, seed=4), m, n, scale, order)
    shared = {
        name: RandomBasis(0, name, *t.shape, stored=t)
        for name, t in (("randlora_A", A), ("randlora_B", B))
    }
    term.bind(shared, nn.Linear(n, m), "weight")
    return term


def explicit(m, n, lam, gam, A, B, order, s):
    """s sum over bases and rows, one rank-one matrix at a time."""
    r, N = lam.shape
    d, D = min(m, n), max(m, n)
    P = torch.zeros(D, d, dtype=F64)
    for p in range(N * r):
        b, k = divmod(p, r)  # B's columns are counted (b, k)
        k2, b2 = divmod(p, N) if order == "compat" else (k, b)
        row = lam[k2, b2] * A[k2, b2 % A.shape[1], :d] * gam[b2]
        P = P + torch.outer(B[:D, b, k], row)
    return s * (P if d == n else P.T)


@pytest.mark.parametrize(
    "fields",
    [
        {"order": "paper", "shared_a": False},
        {"entries": "sparse", "scaling": "bases", "scale": 2.0},
        {"entries": "very_sparse", "init": "jittered"},
        {"overrides": ({"match": "attn", "rank": 3},)},
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma", "mixtral", "vit"])
def test_every_variant_keeps_the_laws(fields, architecture):
    targets = ("linear", "embedding") if architecture == "gemma" else ("linear",)
    assert_lawful(RandLoRA(**{"rank": 5, "scale": 4.0, "targets": targets, **fields}), architecture)


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shared_a", [True, False])
@pytest.mark.parametrize("tokens", [4, 40])  # fewer and more than the longer side
def test_formula_and_gradients_are_the_papers(m, n, order, shared_a, tokens):
    A, B = bases(9, 13, shared_a)
    term = term_for(m, n, A, B, order)
    lam, gam = (t.detach().clone().requires_grad_() for t in (term.lam, term.gam))
    dW = explicit(m, n, lam, gam, A, B, order, 0.5)
    # fp64, sums of at most 9 products of order 1 in another order
    torch.testing.assert_close(term.dense(), dW, rtol=0, atol=1e-12)
    x, dy = draw(tokens, n, seed=5).requires_grad_(), draw(tokens, m, seed=6)
    y = term(x)
    torch.testing.assert_close(y, x @ dW.T, rtol=0, atol=1e-12)
    ours = torch.autograd.grad(y, (x, term.lam, term.gam), dy)
    theirs = torch.autograd.grad(x @ dW.T, (x, lam, gam), dy)
    # sums over 40 tokens of products of a few numbers of order 1 to 5
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("m", "n"), [(5, 4), (4, 5)])
@pytest.mark.parametrize("tokens", [3, 7])
def test_function_passes_gradcheck(m, n, tokens):
    term = term_for(m, n, *bases(4, 5))

    def forward(x, lam, gam):
        return torch.func.functional_call(term, {"lam": lam, "gam": gam}, x)

    inputs = (draw(tokens, n), term.lam.detach().clone(), term.gam.detach().clone())
    assert gradcheck(forward, [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize(("m", "n"), [(7, 12), (12, 7)])
def test_few_tokens_and_many_are_computed_alike(m, n):
    """Two thin products for few tokens, the built update for more of them than its longer side."""
    term = term_for(m, n, *bases(7, 12))
    x = draw(20, n, seed=2)
    slices = torch.cat([term(part) for part in x.split(3)])
    torch.testing.assert_close(term(x), slices, rtol=0, atol=1e-11)  # fp64, sums of size 100
    torch.testing.assert_close(term(x), x @ term.dense().T, rtol=0, atol=1e-11)


def test_only_lambda_moves_first():
    model, handle, batch = carried(RandLoRA(rank=4), "llama")
    model(**batch)["loss"].backward()
    for by_name in handle.terms().values():
        assert not by_name["randlora"].gam.grad.any() and by_name["randlora"].lam.grad.any()


def rank_of(shared_a, gam):
    d, r = 8, 3
    A, B = bases(d, 12, shared_a, r)
    term = term_for(12, d, A, B, r=r)
    term.gam.data.copy_(gam)
    return int(torch.linalg.matrix_rank(term.dense().detach()))


def test_rank_law():
    same = torch.full((3, 8), 0.3, dtype=F64)
    assert rank_of(True, same) == 3  # one A: all bases span the same rows
    assert rank_of(False, same) == 8
    assert rank_of(True, draw(3, 8, seed=9)) == 8
    jittered = RandLoRA(rank=3, init="jittered")
    term = jittered.build_one(eckart.linear.find_sites(nn.Linear(8, 12))[0])["randlora"]
    assert rank_of(True, term.gam.detach().double()) == 8


def test_rank_grows_from_r_with_the_second_step():
    ranks = []
    method = RandLoRA(rank=4, scale=1.0, targets=("attn.q",))
    model, handle, batch = carried(method, "llama", F64)
    optimizer = handle.optimizer(lr=1e-3)
    for _ in range(2):
        model(**batch)["loss"].backward()
        optimizer.step(), optimizer.zero_grad()
        dense = handle.terms()["model.layers.0.self_attn.q_proj"]["randlora"].dense()
        ranks.append(int(torch.linalg.matrix_rank(dense.detach())))
    assert ranks == [4, 32]


def test_transposed_layers_have_transposed_updates():
    A, B = bases(9, 13)
    torch.testing.assert_close(
        term_for(7, 11, A, B).dense().T, term_for(11, 7, A, B).dense(), rtol=0, atol=1e-13
    )


def test_one_basis_of_full_width_is_vera_with_one_vector():
    d, D = 4, 6
    A, B = bases(d, D, r=d)
    term = term_for(D, d, A, B, scale=1.0, r=d)
    term.gam.data.fill_(1.0)
    expected = B[:, 0] @ torch.diag(term.lam[:, 0]) @ A[:, 0]
    torch.testing.assert_close(term.dense(), expected, rtol=0, atol=1e-12)


def test_other_targets_change_no_update():
    updates = []
    for targets in (("attn.q",), ("attn", "mlp", "embedding")):
        handle = attach(tiny("llama"), Recipe(RandLoRA(rank=4, targets=targets)), seed=2)
        term = handle.terms()["model.layers.0.self_attn.q_proj"]["randlora"]
        term.lam.data.fill_(0.1)
        updates.append(term.dense().detach())
    # fp32, entries of order 1; larger bases are read with other strides
    torch.testing.assert_close(*updates, rtol=0, atol=1e-5)


def test_entries_have_variance_one():
    for entries, share in (("dense", 1.0), ("sparse", 1 / 3), ("very_sparse", 1 / math.sqrt(48))):
        handle = attach(tiny("llama"), Recipe(RandLoRA(rank=4, entries=entries, targets=("mlp",))))
        B = handle.shared["randlora_B"].values  # 48 x 12 x 4: five deviations of its mean square
        spread = 5 * ((B**4).mean() - 1).clamp_min(0).sqrt() / B.numel() ** 0.5
        assert abs(B.square().mean() - 1) < spread
        assert abs(B.count_nonzero() / B.numel() - share) < 5 / B.numel() ** 0.5


def test_nothing_of_the_size_of_the_update_is_kept():
    kept = []
    term = term_for(11, 8, *bases(8, 13))
    x = draw(40, 8).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = term(x)
    held = {t.data_ptr() for t in (x, term.lam, term.gam, *term.slices())}
    assert kept and all(t.data_ptr() in held for t in kept)
    y.sum().backward()


def test_gamma_is_not_decayed():
    method = RandLoRA(rank=4)
    assert method.ratios("q_proj.randlora.gam", torch.zeros(1)) == {"weight_decay": 0.0}
    assert method.ratios("q_proj.randlora.lam", torch.zeros(1)) == {}


# --- PEFT ----------------------------------------------------------------------------------


def peft_adapter(folder, architecture="llama", **config):
    """An adapter of stock PEFT with random scalings on a tiny model: its logits."""
    targets = ["c_attn", "c_fc"] if architecture == "gpt2" else ["q_proj", "k_proj", "down_proj"]
    settings = RandLoraConfig(r=6, randlora_alpha=9, target_modules=targets, **config)
    model = get_peft_model(tiny(architecture), settings)
    g = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "randlora_lambda" in name or "randlora_gamma" in name:
            parameter.data.normal_(0, 0.1, generator=g)
    model.save_pretrained(folder)
    return logits(model, batch_for(architecture))


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("config", [{}, {"sparse": True}, {"very_sparse": True}])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_files_of_peft_load_and_are_written_back_equal(architecture, config, tmp_path):
    expected = peft_adapter(tmp_path / "theirs", architecture, **config)
    model = tiny(architecture)
    handle = peft.load(model, tmp_path / "theirs")
    # fp32, the same products in another order; relative to the largest logit
    scale = expected.abs().max().item()
    torch.testing.assert_close(
        logits(model, batch_for(architecture)), expected, rtol=0, atol=1e-5 * scale
    )
    peft.save(handle, tmp_path / "ours")
    theirs, ours = tensors(tmp_path / "theirs"), tensors(tmp_path / "ours")
    copies = {k for k in theirs if k.count("randlora_A") + k.count("randlora_B")} - ours.keys()
    assert ours.keys() == theirs.keys() - copies
    assert all(torch.equal(theirs[k].to(ours[k].dtype), ours[k]) for k in ours)
    again = PeftModel.from_pretrained(tiny(architecture), tmp_path / "ours")
    torch.testing.assert_close(
        logits(again, batch_for(architecture)), expected, rtol=0, atol=1e-5 * scale
    )


@pytest.mark.parametrize("fields", [{}, {"scaling": "bases"}, {"entries": "sparse"}])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_our_files_load_in_peft(architecture, fields, tmp_path):
    targets = ("attn", "mlp")
    method = RandLoRA(**{"rank": 6, "scale": 1.5, "targets": targets, **fields})
    model, handle, batch = carried(method, architecture)
    randomise(handle)
    expected = logits(model, batch)
    peft.save(handle, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "RANDLORA"
    assert sum("randlora_B" in name for name in tensors(tmp_path)) == 1
    loaded = PeftModel.from_pretrained(tiny(architecture), tmp_path)
    scale = expected.abs().max().item()
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=0, atol=1e-5 * scale)


def test_files_that_lack_their_bases_are_refused(tmp_path):
    peft_adapter(tmp_path, save_projection=False)
    with pytest.raises(FileError, match="leaves its random bases to the machine"):
        peft.load(tiny("llama"), tmp_path)


def test_copies_that_differ_are_refused(tmp_path):
    peft_adapter(tmp_path)
    held = tensors(tmp_path)
    name = next(k for k in held if k.endswith("q_proj.randlora_A"))
    held[name] = held[name] + 1
    save_file(held, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FileError, match="copies of a shared tensor differ"):
        peft.load(tiny("llama"), tmp_path)


def test_misshapen_scalings_are_refused_by_name(tmp_path):
    peft_adapter(tmp_path)
    held = tensors(tmp_path)
    name = next(k for k in held if k.endswith("layers.1.self_attn.q_proj.randlora_lambda"))
    held[name] = held[name][:, :3].contiguous()
    save_file(held, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FileError, match=r"layers\.1\.self_attn\.q_proj .*expected \[6, 6\]"):
        peft.load(tiny("llama"), tmp_path)


@pytest.mark.parametrize("fields", [{"order": "paper"}, {"shared_a": False}])
def test_what_peft_cannot_hold_is_refused(fields, tmp_path):
    model, handle, _ = carried(RandLoRA(rank=6, **fields), "llama")
    with pytest.raises(UsageError, match="cannot be written for PEFT"):
        peft.save(handle, tmp_path)
