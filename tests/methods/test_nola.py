"""What NOLA alone promises: LoRA in a random subspace that a seed describes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.autograd import gradcheck

from eckart.errors import FileError
from eckart.io import native, peft
from eckart.io.tensors import write_tensors
from eckart.linear import LowRank, find_sites
from eckart.linear.basis import RandomBasis, combined
from eckart.methods.weights import nola
from eckart.methods.weights.nola import NOLA, Combination, frozen_start, quantise, rounded
from eckart.recipe import Recipe, attach
from tests.conftest import batch_for, randomise, tiny
from tests.laws.matrix import logits
from tests.methods.lawful import assert_lawful, carried, draw

F64 = torch.float64
M, N, R, K = 7, 9, 3, 5


def term_with(A, B, k, m=M, n=N, r=R, **options):
    """A term over given bases: A [k, n, r], B [k, m, r]."""
    term = Combination(k, m, n, r, path="q", **options).double()
    held = {"nola_A": A, "nola_B": B}
    shared = {name: RandomBasis(0, name, *t.shape, stored=t) for name, t in held.items()}
    term.bind(shared, nn.Linear(n, m), "weight")
    with torch.no_grad():
        term.a.copy_(draw(k, seed=7))
        term.b.copy_(draw(k, seed=8))
    return term


@pytest.mark.parametrize("fields", [{"hold": False}, {"bits": 8}, {"bits": 4}])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma", "mixtral"])
def test_every_variant_keeps_the_laws(fields, architecture):
    targets = ("linear", "embedding") if architecture == "gemma" else ("linear",)
    assert_lawful(NOLA(rank=3, bases=24, targets=targets, **fields), architecture)


def test_formula_and_gradients_are_the_papers():
    A, B = draw(K, N, R, seed=1), draw(K, M, R, seed=2)
    term, s = term_with(A, B, K, scale=0.5), 0.5
    a, b = (c.detach().clone().requires_grad_() for c in (term.a, term.b))
    total_A, total_B = term.A0.mT.clone(), torch.zeros(M, R, dtype=F64)
    for i in range(K):
        total_A = total_A + a[i] * A[i].T / K**0.5
        total_B = total_B + b[i] * B[i] / K**0.5
    x, dy = draw(4, N, seed=3), draw(4, M, seed=4)
    y = s * x @ total_A.T @ total_B.T
    # fp64, sums of at most 45 products in another order
    torch.testing.assert_close(term(x), y, rtol=0, atol=1e-12)
    torch.testing.assert_close(term.dense(), s * total_B @ total_A, rtol=0, atol=1e-12)
    (term(x) * dy).sum().backward()
    G = dy.T @ x
    g_A, g_B = s * total_B.T @ G, s * G @ total_A.T
    by_hand = [(g_A * A[i].T).sum() / K**0.5 for i in range(K)]
    torch.testing.assert_close(term.a.grad, torch.stack(by_hand), rtol=0, atol=1e-12)
    by_hand = [(g_B * B[i]).sum() / K**0.5 for i in range(K)]
    torch.testing.assert_close(term.b.grad, torch.stack(by_hand), rtol=0, atol=1e-12)

    def forward(a, b):
        return torch.func.functional_call(term, {"a": a, "b": b}, x)

    assert gradcheck(forward, (a, b))


def test_only_b_moves_first():
    term = term_with(draw(K, N, R, seed=1), draw(K, M, R, seed=2), K)
    with torch.no_grad():
        term.a.zero_(), term.b.zero_()
    x = draw(4, N, seed=3)
    assert not term(x).any()
    (term(x) * draw(4, M)).sum().backward()
    assert not term.a.grad.any() and term.b.grad.all()


def test_one_hot_bases_train_as_lora():
    W, x, y = draw(M, N), draw(12, N, seed=1), draw(12, M, seed=2)
    kA, kB = R * N, R * M  # the larger count for both; the shorter factor ignores the rest
    k = max(kA, kB)
    A = torch.eye(k, kA, dtype=F64).unflatten(1, (N, R)) * k**0.5
    B = torch.eye(k, kB, dtype=F64).unflatten(1, (M, R)) * k**0.5
    nola = term_with(A, B, k)
    with torch.no_grad():
        nola.a.zero_(), nola.b.zero_()
    lora = LowRank(torch.zeros(M, R, dtype=F64), nola.A0.mT.clone())
    for _ in range(10):
        for term in (nola, lora):
            term.zero_grad()
            (x @ W.T + term(x) - y).square().sum().backward()
            with torch.no_grad():
                for parameter in term.parameters():
                    parameter -= 2e-3 * parameter.grad
    assert lora.B.abs().max() > 0.1
    torch.testing.assert_close(nola.dense(), lora.dense(), rtol=0, atol=1e-12)


def test_a_step_is_loras_step_projected_on_the_span_of_the_bases():
    A, B = draw(K, N, R, seed=1), draw(K, M, R, seed=2)
    term, lr = term_with(A, B, K), 0.1
    lora = LowRank(*(t.detach().clone() for t in term.factors()))
    x, dy = draw(4, N, seed=3), draw(4, M, seed=4)
    before = [t.detach().clone() for t in term.factors()]
    for map_ in (term, lora):
        (map_(x) * dy).sum().backward()
    with torch.no_grad():
        for c in (term.a, term.b):
            c -= lr * c.grad
    for old, new, grad, basis in (
        (before[0], term.factors()[0], lora.B.grad, B),
        (before[1].mT, term.factors()[1].mT, lora.A.grad.mT, A),
    ):
        P = basis.flatten(1) / K**0.5  # its rows span the subspace
        projected = (grad.flatten() @ P.mT @ P).view_as(grad)
        # fp64, sums of at most 45 products of order 1 to 10
        torch.testing.assert_close(new - old, -lr * projected, rtol=0, atol=1e-11)


def test_micro_batches_add_up_to_the_whole_one():
    model, handle, _ = carried(NOLA(rank=3, bases=20), "llama", F64)
    randomise(handle)
    whole, found = batch_for("llama", rows=4), []
    for size in (4, 1):
        model.zero_grad()
        for start in range(0, 4, size):
            part = {name: t[start : start + size] for name, t in whole.items()}
            (model(**part)["loss"] * size / 4).backward()
        found.append({name: p.grad.clone() for name, p in handle.trainable().items()})
    for name, grad in found[0].items():  # fp64, but the model's own loss is in fp32
        torch.testing.assert_close(found[1][name], grad, rtol=0, atol=1e-7)


@pytest.mark.parametrize("hold", [True, False])
def test_factors_are_made_once_per_step(hold, monkeypatch):
    model, handle, batch = carried(NOLA(rank=3, bases=24, hold=hold), "llama")
    randomise(handle)
    made = []

    def counted(coefficients, basis, known=None):
        made.append(known is None)
        return combined(coefficients, basis, known)

    monkeypatch.setattr(nola, "combined", counted)
    optimizer = handle.optimizer(lr=1e-3)
    for step in range(1, 3):
        for _ in range(3):
            model(**batch)["loss"].backward()
        assert sum(made) == 2 * len(handle.terms()) * step  # A and B of every map
        optimizer.step()


def test_update_has_the_promised_rank_and_entries():
    model, handle, _ = carried(NOLA(rank=3, bases=64), "llama")
    randomise(handle, std=1.0)
    for by_name in handle.terms().values():
        term = by_name["nola"]
        assert torch.linalg.matrix_rank(term.dense().detach()) == 3
        bound = 1 / term.n**0.5
        assert term.A0.abs().max() <= bound and term.A0.std() > bound / 3
    A, B = (handle.shared[name].values for name in ("nola_A", "nola_B"))
    entries = A.numel()
    assert abs(A.var() / 64 - 1 / (3 * 64)) < 0.03 / (3 * 64)
    overlap = torch.corrcoef(torch.stack([A.flatten(), B.flatten()[:entries]]))[0, 1]
    assert abs(overlap) < 5 / entries**0.5
    starts = {tuple(t["nola"].A0.flatten()[:5].tolist()) for t in handle.terms().values()}
    assert len(starts) == len(handle.terms())  # every site its own


def test_held_and_streamed_compute_the_same():
    outputs = []
    for hold in (True, False):
        model, handle, batch = carried(NOLA(rank=3, bases=40, hold=hold), "llama", F64)
        randomise(handle)
        assert bool(handle.shared) == hold
        outputs.append(logits(model, batch))
    # fp64: the same fp32 numbers of the basis, one product or several
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)


def test_other_targets_change_no_update():
    updates = []
    for targets in (("attn.q",), ("attn", "mlp", "embedding")):
        method = NOLA(rank=3, bases=20, targets=targets)
        handle = attach(tiny("llama"), Recipe(method), seed=4)
        term = handle.terms()["model.layers.0.self_attn.q_proj"]["nola"]
        with torch.no_grad():
            term.a.fill_(0.3), term.b.fill_(0.7)
        updates.append(term.dense().detach())
    # fp32; a longer basis is read with other strides, so in another order of the sum
    torch.testing.assert_close(*updates, rtol=0, atol=1e-6)


def test_neither_building_nor_training_draws_from_torch():
    before = torch.get_rng_state()
    for hold in (True, False):
        model, handle, batch = carried(NOLA(rank=3, bases=20, hold=hold), "llama")
        model(**batch)["loss"].backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_base_in_bf16_has_the_same_basis():
    terms = []
    for dtype in (torch.float32, torch.bfloat16):
        handle = attach(tiny("llama", dtype), Recipe(NOLA(rank=3, bases=20)))
        terms.append(handle)
    for name in ("nola_A", "nola_B"):
        one, other = (h.shared[name].values for h in terms)
        assert one.dtype == other.dtype == torch.float32 and torch.equal(one, other)
    (one, other) = (next(iter(h.terms().values()))["nola"].A0 for h in terms)
    assert torch.equal(one, other)


LOAD = """
import sys, torch
from safetensors.torch import load_file, save_file
from eckart.io import native
from tests.conftest import batch_for, tiny
from tests.laws.matrix import logits
model = tiny("llama")
native.load(model, sys.argv[1])
save_file({"logits": logits(model, batch_for("llama"))}, sys.argv[2])
"""


def test_a_small_file_gives_the_same_model_in_another_process(tmp_path):
    model, handle, batch = carried(NOLA(rank=4, bases=48), "llama")
    randomise(handle)
    native.save(handle, tmp_path / "a")
    out = tmp_path / "logits.safetensors"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", LOAD, tmp_path / "a", out], check=True, cwd=root)
    assert torch.equal(load_file(out)["logits"], logits(model, batch))
    size = sum(f.stat().st_size for f in (tmp_path / "a").iterdir())
    assert size < len(handle.terms()) * (8 * 48 + 1024)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_file_of_few_bits_is_the_same_function(bits, architecture, tmp_path):
    k = 49
    model, handle, batch = carried(NOLA(rank=4, bases=k, bits=bits), architecture)
    randomise(handle)
    expected = logits(model, batch)
    native.save(handle, tmp_path / "a")
    again = native.load(tiny(architecture), tmp_path / "a")
    assert torch.equal(logits(again.model, batch), expected)
    native.save(again, tmp_path / "b")
    files = [tmp_path / place / native.TENSORS for place in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    for name, kept in again.named_state().items():
        c = handle.named_state()[name]
        step = quantise(c, bits)[1]
        assert ((kept - c).abs() <= step / 2 * (1 + 1e-6)).all()  # fp32
    if architecture == "llama":
        size = sum(f.stat().st_size for f in (tmp_path / "a").iterdir())
        assert size < len(handle.terms()) * (2 * k * bits / 8 + 1024)


def test_a_file_of_other_bits_is_refused(tmp_path):
    _, handle, _ = carried(NOLA(rank=4, bases=10, bits=8), "llama")
    native.save(handle, tmp_path)
    tensors = load_file(tmp_path / native.TENSORS)
    name = next(iter(tensors))
    write_tensors(tmp_path / native.TENSORS, tensors | {name: tensors[name][:-1]})
    with pytest.raises(FileError, match=rf"{name} +shape \(13,\), expected \(10,\)"):
        native.load(tiny("llama"), tmp_path)


def test_file_for_peft_is_plain_lora(tmp_path):
    model, handle, batch = carried(NOLA(rank=4, bases=24, scale=0.5), "llama")
    randomise(handle)
    expected = logits(model, batch)
    peft.save(handle, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 4)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    # fp32, the scale multiplied beforehand
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_within_half_a_step(bits):
    c = torch.stack([draw(200), torch.zeros(200, dtype=F64), 1e-9 * draw(200, seed=1)])
    codes, step = quantise(c, bits)
    assert codes.dtype == torch.int8 and codes.abs().max() == 2 ** (bits - 1) - 1
    assert (c - codes * step).abs().le(step / 2 * (1 + 1e-12)).all()
    assert step[1] == 1 and not codes[1].any()
    free = c.clone().requires_grad_()
    kept = rounded(free, bits)
    torch.testing.assert_close(kept, codes * step, rtol=0, atol=1e-15)
    kept.sum().backward()
    assert torch.equal(free.grad, torch.ones_like(c))  # straight through


def test_eight_bits_hardly_change_the_loss():
    model, handle, batch = carried(NOLA(rank=4, bases=48), "llama")
    randomise(handle, std=1.0)
    before = model(**batch)["loss"].item()
    for by_name in handle.terms().values():
        by_name["nola"].bits = 8
    after = model(**batch)["loss"].item()
    assert after != before and abs(after / before - 1) < 0.01


def test_start_is_uniform_and_its_own_for_every_site():
    one, other = (frozen_start(0, path, 1, 400, 16) for path in ("q", "k"))
    assert one.shape == (1, 400, 16) and not torch.equal(one, other)
    site = find_sites(nn.Linear(5, 6), seed=3)[0]
    assert torch.equal(NOLA(rank=4).build_one(site)["nola"].A0, frozen_start(3, "", 1, 5, 4)[0])
    assert one.abs().max() <= 1 / 20 and abs(one.std() - 1 / (20 * 3**0.5)) < 1e-3
    (site,) = find_sites(nn.Linear(5, 6))
    assert NOLA(rank=9).build_one(site)["nola"].A0.shape == (5, 5)  # cut to min(m, n)
