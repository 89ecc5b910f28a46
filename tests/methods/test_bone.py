"""What Bone alone promises, and that tile is LoRA with a folded A."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.autograd import gradcheck
from torch.nn import functional as F

from eckart.errors import UsageError
from eckart.io import peft
from eckart.linear import find_sites, install
from eckart.linear.lowrank import low_rank
from eckart.methods.weights.bone import (
    BlockAffine,
    Bone,
    Recomputed,
    Tile,
    affine,
    fold,
    fold_matrix,
    unfold,
)
from eckart.recipe import Recipe, attach
from tests.conftest import batch_for, randomise, tiny
from tests.laws.matrix import logits
from tests.methods.lawful import assert_lawful, carried, draw

F64 = torch.float64
SHAPES = [(7, 12), (8, 12), (8, 13), (12, 4)]  # n a multiple of r = 4 and not; n = r


def by_entries(M, m, n):
    """dW entry by entry, as the paper indexes it."""
    r, q = M.shape
    return torch.tensor([[M[i % r, o % q] for i in range(n)] for o in range(m)], dtype=F64)


@pytest.mark.parametrize("mode", ["tile", "mini", "bat"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma", "mixtral", "vit"])
def test_every_mode_keeps_the_laws(mode, architecture):
    targets = ("linear", "embedding") if architecture == "gemma" else ("linear",)
    assert_lawful(Bone(rank=5, mode=mode, mini_rank=3, targets=targets), architecture)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_tile_is_lora_with_a_folded_frozen_a(m, n):
    W, x, D, r = draw(m, n), draw(3, n, seed=1), draw(4, m, seed=2), 4
    layer = torch.nn.Linear(n, m, bias=False).double()
    layer.weight.data.copy_(W)
    layer.requires_grad_(False)
    (site,) = find_sites(layer)
    term = Tile(D, m, n)
    install(site, {"bone": term})
    S = torch.zeros(r, n, dtype=F64)
    for i in range(n):
        S[i % r, i] = 1
    assert torch.equal(fold_matrix(r, n, W), S)
    y = layer(x)
    # fp64, sums of at most 13 terms in another order
    torch.testing.assert_close(y, x @ W.T + low_rank(x, S, D.T), rtol=0, atol=1e-12)
    dy = draw(3, m, seed=3)
    (y * dy).sum().backward()
    torch.testing.assert_close(term.M.grad, S @ (dy.T @ x).T, rtol=0, atol=1e-12)  # S G^T


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("q", [2, 3, 7])
def test_dense_and_factors_repeat_the_block(m, n, q):
    term = Tile(draw(4, q), m, n)
    expected = by_entries(term.M.detach(), m, n)
    assert torch.equal(term.dense(), expected)
    B, A = term.factors()
    assert torch.equal(B @ A, expected)  # products with zeros and ones are exact
    assert A.shape[-2] == min(4, q) and torch.linalg.matrix_rank(expected) <= min(4, q)


def test_mini_of_full_width_is_tile():
    x = draw(3, 13)
    site = find_sites(torch.nn.Linear(13, 8))[0]
    tile = Bone(rank=4).build_one(site)["bone"].double()
    mini = Bone(rank=4, mode="mini", mini_rank=8).build_one(site)["bone"].double()
    with torch.no_grad():
        tile.M.copy_(draw(4, 8))
        mini.M.copy_(draw(4, 8))
    assert torch.equal(tile(x), mini(x)) and tile(x).any()


def test_one_block_trains_as_full_fine_tuning():
    W, x, y = draw(5, 6), draw(9, 6, seed=1), draw(9, 5, seed=2)
    full, tile = W.clone().requires_grad_(), Tile(torch.zeros(6, 5, dtype=F64), 5, 6)
    for _ in range(5):
        for weight, parameter in ((full, full), (W + tile.dense(), tile.M)):
            loss = (x @ weight.T - y).square().sum()
            (grad,) = torch.autograd.grad(loss, parameter)
            parameter.data -= 1e-2 * grad
    torch.testing.assert_close(W + tile.dense(), full, rtol=0, atol=1e-12)


def test_a_step_of_sgd_moves_w_by_the_folded_gradient():
    m, n, r, lr = 8, 13, 4, 0.1
    tile, x, dy = Tile(torch.zeros(r, m, dtype=F64), m, n), draw(3, n), draw(3, m, seed=1)
    (tile(x) * dy).sum().backward()
    tile.M.data -= lr * tile.M.grad
    S = fold_matrix(r, n, x)
    torch.testing.assert_close(tile.dense(), -lr * dy.T @ x @ S.T @ S, rtol=0, atol=1e-12)


def test_zero_columns_change_nothing():
    tile, x = Tile(draw(4, 8), 8, 13), draw(3, 13)
    longer = Tile(tile.M.detach(), 8, 19)
    torch.testing.assert_close(longer(F.pad(x, (0, 6))), tile(x), rtol=0, atol=1e-13)


def test_fold_of_bf16_rounds_once():
    x = torch.ones(4 * 256 + 1, dtype=torch.bfloat16)
    x[0] = 2
    # 257 and then 1 more: rounded on the way, at steps of 2, it would be 256
    assert fold(x, 4, torch.bfloat16).tolist() == [258, 256, 256, 256]


@pytest.mark.parametrize("n", [12, 13])
def test_tile_keeps_nothing_of_the_size_of_its_input(n):
    kept = []
    x = draw(6, 64, n).requires_grad_()
    tile = Tile(draw(4, 8), 8, n)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        tile(x).sum().backward()
    assert kept and all(shape.numel() < x.numel() for shape in kept), kept


@pytest.mark.parametrize(("m", "n"), [(8, 12), (7, 13)])
def test_bat_multiplies_every_block_and_adds_itself(m, n):
    r = 4
    W, B = draw(m, n), draw(-(-m // r), r, r, seed=1)
    padded = F.pad(W, (0, -n % r, 0, -m % r))
    expected = torch.zeros_like(padded)
    for i in range(padded.shape[0] // r):
        for j in range(padded.shape[1] // r):
            block = padded[i * r : i * r + r, j * r : j * r + r]
            expected[i * r : i * r + r, j * r : j * r + r] = block @ B[i] + B[i]
    torch.testing.assert_close(affine(W, B), expected[:m, :n], rtol=0, atol=1e-13)
    assert torch.linalg.matrix_rank(affine(W, B)) == min(m, n)  # no bound by r


@pytest.mark.parametrize(("m", "n"), [(8, 12), (7, 13)])
def test_recomputed_product_has_the_plain_gradients(m, n, monkeypatch):
    monkeypatch.setattr(Recomputed, "ROWS", 4)  # several pieces of G
    W, x, B = draw(m, n), draw(2, 3, n, seed=1), draw(2, 4, 4, seed=2)
    x.requires_grad_(), B.requires_grad_()
    y, plain = Recomputed.apply(x, W, B), x @ affine(W, B).mT
    assert torch.equal(y, plain)
    dy = draw(2, 3, m, seed=3)
    ours, theirs = torch.autograd.grad(y, (x, B), dy), torch.autograd.grad(plain, (x, B), dy)
    # fp64; G_ij summed over 6 tokens and 4 blocks in another order
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert gradcheck(lambda x, B: Recomputed.apply(x, W, B), (x, B))


def test_bat_on_a_zero_matrix_is_tile():
    m, n, r = 8, 12, 4
    B = draw(m // r, r, r)
    D = B.flatten(0, 1).mT  # D[:, block i] = B_i^T
    assert torch.equal(affine(torch.zeros(m, n, dtype=F64), B), Tile(D, m, n).dense())


def test_bat_sees_the_matrix_of_its_own_site():
    layer = torch.nn.Linear(12, 8).double()
    (site,) = find_sites(layer)
    term = BlockAffine(draw(2, 4, 4), 8)
    install(site, {"bone": term})
    term.bind({}, layer, "weight")
    x = draw(3, 12)
    W = layer.weight.detach()
    expected = F.linear(x, W + affine(W, term.B), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_algebra_takes_a_merged_bat_back():
    r, m, n = 4, 8, 12
    W, B = draw(m, n).float(), 0.3 * F.normalize(draw(2, r, r), dim=(-2, -1)).float()
    merged = (W + affine(W, B)).unflatten(-1, (-1, r)).unflatten(-3, (-1, r)).transpose(1, 2)
    back = (merged - B[:, None]) @ torch.linalg.inv(torch.eye(r) + B)[:, None]
    # I + B has a condition below 2 at norm 0.3: fp32 rounding alone
    torch.testing.assert_close(back.transpose(1, 2).reshape(m, n), W, rtol=0, atol=1e-4)


def test_fold_and_unfold_are_transposes():
    x, h = draw(3, 13), draw(3, 4, seed=1)
    left, right = (fold(x, 4, F64) * h).sum(), (x * unfold(h, 13)).sum()
    torch.testing.assert_close(left, right, rtol=1e-13, atol=0)


@pytest.mark.parametrize("first, second", [("tile", "bat"), ("bat", "tile"), ("mini", "tile")])
def test_two_modes_stand_beside_each_other(first, second):
    """In bat W is the base's alone whatever other terms there are, so the order does not matter."""
    model, batch = tiny("llama", F64), batch_for("llama")
    sites = {s.path: s.weight() for s in find_sites(model) if s.kind == "linear"}
    handles = {}
    for mode in (first, second):
        method = Bone(rank=5, mode=mode, mini_rank=3)
        handles[mode] = attach(model, Recipe(weights=method), name=mode)
        model.to(F64)
        randomise(handles[mode])
    handles[first].use([first, second])
    expected = tiny("llama", F64)
    for path, W in sites.items():
        terms = [h.terms()[path]["bone"].dense() for h in handles.values() if path in h.attached]
        expected.get_submodule(path).weight.data.copy_(sum(terms, W))
    # fp64, one product where there were three
    torch.testing.assert_close(logits(model, batch), logits(expected, batch), rtol=0, atol=1e-11)


def test_bat_refuses_dropout():
    with pytest.raises(UsageError, match="bat has no dropout"):
        Bone(mode="bat", dropout=0.1)


MODES = {
    "tile": {"init_weights": True},
    "mini": {"init_weights": "mini", "mini_r": 8},
    "bat": {"init_weights": "bat"},
}


def peft_adapter(folder, **config):
    """An adapter of stock PEFT with random blocks on a tiny Llama: its logits."""
    from peft import MissConfig, get_peft_model

    base = tiny("llama")
    model = get_peft_model(base, MissConfig(r=8, target_modules=["q_proj", "down_proj"], **config))
    g = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "miss" in name:
            parameter.data.normal_(0, 0.1, generator=g)
    model.save_pretrained(folder)
    return logits(model, batch_for("llama"))


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("mode", MODES)
def test_files_of_peft_load_and_are_written_back_equal(mode, tmp_path):
    expected = peft_adapter(tmp_path / "theirs", **MODES[mode])
    model = tiny("llama")
    handle = peft.load(model, tmp_path / "theirs")
    assert handle.weights.mode == mode
    # fp32, the same products in another order; logits of order 1
    torch.testing.assert_close(logits(model, batch_for("llama")), expected, rtol=0, atol=2e-6)
    peft.save(handle, tmp_path / "ours")
    theirs, ours = tensors(tmp_path / "theirs"), tensors(tmp_path / "ours")
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[k], ours[k]) for k in theirs)
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path / "ours")
    assert torch.equal(logits(again, batch_for("llama")), expected)


def test_files_of_bones_first_name_load(tmp_path):
    expected = peft_adapter(tmp_path, init_weights="bat")
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k != "mini_r"} | BONE))
    renamed = {k.replace("miss_block", "bone_block"): t for k, t in tensors(tmp_path).items()}
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    model = tiny("llama")
    with pytest.warns(UserWarning, match="BONE is called MISS"):
        peft.load(model, tmp_path)
    torch.testing.assert_close(logits(model, batch_for("llama")), expected, rtol=0, atol=2e-6)


BONE = {"peft_type": "BONE", "bias": "bone_only"}


@pytest.mark.parametrize("mode", ["tile", "mini"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_peft_has_no_bone_for_becomes_lora(mode, architecture, tmp_path):
    # 5 divides no width here, and Conv1D is refused by PEFT's MiSS
    method = Bone(rank=5, mode=mode, mini_rank=3, overrides=({"match": "attn", "rank": 4},))
    model, handle, batch = carried(method, architecture)
    randomise(handle)
    expected = logits(model, batch)
    peft.save(handle, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    loaded = PeftModel.from_pretrained(tiny(architecture), tmp_path)
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=0, atol=5e-6)


def test_a_padded_bat_has_no_peft_file(tmp_path):
    model, handle, _ = carried(Bone(rank=5, mode="bat"), "llama")
    with pytest.raises(UsageError, match="cannot be written for PEFT"):
        peft.save(handle, tmp_path)
