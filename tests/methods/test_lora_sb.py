"""What LoRA-SB alone promises: orthonormal bases of the first update, optimal steps inside."""

import json

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.autograd import gradcheck

import eckart
from eckart.decompose import truncated_svd
from eckart.errors import UsageError
from eckart.io import peft
from eckart.linear import Horizon, LowRank, find_sites
from eckart.methods.weights.lora_sb import LoRASB, first_update
from eckart.recipe import Recipe, attach
from eckart.recipe.calibrate import gather_gradients
from eckart.recipe.targets import sites_of
from tests.conftest import batch_for, randomise, tiny
from tests.laws.matrix import logits, steps
from tests.methods.lawful import assert_lawful, carried, draw

F64 = torch.float64


def site_with(G, eta=0.01, leading=()):
    """A site of one layer (or of fused experts) that has seen a gradient."""
    m, n = G.shape[-2:]
    (site,) = find_sites(nn.Linear(n, m, bias=False))
    site.matrix_shape = tuple(G.shape)
    if leading:
        site.module.weight = nn.Parameter(draw(*G.shape, seed=9).float())
    site.gradient, site.horizon = G.float(), Horizon(100, eta * 5, 5)
    return site


@pytest.mark.parametrize("init", ["sign", "raw", "weight", "xs", "random"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma", "mixtral"])
def test_every_init_keeps_the_laws(init, architecture):
    targets = ("linear", "embedding") if architecture == "gemma" else ("linear",)
    core = "zero" if init in ("sign", "raw") else "step"
    assert_lawful(LoRASB(rank=3, init=init, core=core, targets=targets), architecture)


@pytest.mark.parametrize("shape", [(14, 11), (11, 14), (9, 9), (3, 14, 11)])
@pytest.mark.parametrize("rule", ["sign", "raw"])
def test_core_and_bases_are_the_truncated_first_update(shape, rule):
    G, eta, r = draw(*shape), 0.01, 4
    term = LoRASB(rank=r, init=rule).build_one(site_with(G, eta))["core"]
    B, A, R = term.B.double(), term.A.double(), term.R.double()
    identity = torch.eye(r, dtype=F64).expand(*shape[:-2], r, r)
    torch.testing.assert_close(B.mT @ B, identity, rtol=0, atol=1e-6)
    torch.testing.assert_close(A @ A.mT, identity, rtol=0, atol=1e-6)
    update = -eta * (G.sign() if rule == "sign" else G.float().double())
    tail = torch.linalg.svdvals(update)[..., r:].square().sum(-1)
    error = (update - B @ R @ A).square().sum((-2, -1))
    # fp32 factors: products rounded at 1e-7 of the update, the error is about half of it
    torch.testing.assert_close(error, tail, rtol=1e-5, atol=0)


def test_bases_are_orthonormal_where_the_update_has_no_such_rank():
    G, eta = draw(12, 2) @ draw(2, 9, seed=1), 1.0
    term = LoRASB(rank=5, init="raw").build_one(site_with(G, eta))["core"]
    for Q in (term.B.mT, term.A):
        torch.testing.assert_close(Q @ Q.mT, torch.eye(5), rtol=0, atol=1e-6)
    # fp32 factors of entries of order 1
    torch.testing.assert_close(term.dense(), -G.float(), rtol=0, atol=1e-5)


def test_eta_is_the_rate_of_the_first_warm_up_step():
    model, batch = tiny("llama"), batch_for("llama")
    cores = []
    for warmup in (None, 4):
        handle = attach(
            model, Recipe(LoRASB(rank=4)), calibration=[batch], steps=50, lr=0.08, warmup=warmup
        )
        cores.append(next(iter(handle.terms().values()))["core"].R.detach())
        handle.remove()
    torch.testing.assert_close(cores[0], 4 * cores[1], rtol=1e-6, atol=0)
    assert cores[0].diagonal().min() > 0.08  # singular values of lr * signs


def core_of(m, n, r, seed=0, orthonormal=True):
    B, A = draw(m, r, seed=seed), draw(r, n, seed=seed + 1)
    if orthonormal:
        B, A = torch.linalg.qr(B)[0], torch.linalg.qr(A.mT)[0].mT
    return LowRank(B, A, R=0.1 * draw(r, r, seed=seed + 2), trained=("R",))


def test_gradient_of_the_core_is_the_projected_gradient():
    term, x, dy = core_of(7, 9, 3), draw(5, 9, seed=4), draw(5, 7, seed=5)
    (term(x) * dy).sum().backward()
    G = dy.T @ x
    torch.testing.assert_close(term.R.grad, term.B.T @ G @ term.A.T, rtol=0, atol=1e-12)
    before, lr = term.dense().detach(), 0.1
    term.R.data -= lr * term.R.grad
    step = -lr * term.B @ term.B.T @ G @ term.A.T @ term.A  # the projection of a full step
    torch.testing.assert_close(term.dense() - before, step, rtol=0, atol=1e-12)


def test_core_passes_gradcheck():
    term = core_of(7, 9, 3)

    def forward(x, R):
        return torch.func.functional_call(term, {"R": R}, x)

    inputs = (draw(2, 4, 9, seed=4).requires_grad_(), term.R.detach().clone().requires_grad_())
    assert gradcheck(forward, inputs)


@pytest.mark.parametrize("orthonormal", [True, False])
def test_no_other_core_comes_closer_to_a_gradient(orthonormal):
    term, G = core_of(7, 9, 3, orthonormal=orthonormal), draw(7, 9, seed=4)
    B, A = term.B, term.A
    g = B.T @ G @ A.T
    best = torch.linalg.solve(B.T @ B, g) @ torch.linalg.inv(A @ A.T)
    least = (B @ best @ A - G).norm()
    for seed in range(20):
        other = best + 1e-3 * draw(3, 3, seed=seed)
        assert (B @ other @ A - G).norm() > least
    if orthonormal:  # so plain training of R takes the best step
        torch.testing.assert_close(best, g, rtol=0, atol=1e-12)


def test_a_full_square_core_trains_as_the_matrix_itself():
    n, W, x, y = 6, draw(6, 6), draw(9, 6, seed=1), draw(9, 6, seed=2)
    term = core_of(n, n, n)
    term.R.data.zero_()
    full = W.clone().requires_grad_()
    for _ in range(5):
        for weight, parameter in ((full, full), (W + term.dense(), term.R)):
            loss = (x @ weight.T - y).square().sum()
            (grad,) = torch.autograd.grad(loss, parameter)
            parameter.data -= 1e-2 * grad
    torch.testing.assert_close(W + term.dense(), full, rtol=0, atol=1e-12)


def test_start_lowers_the_loss_of_the_calibration_batch():
    model, batch = tiny("llama"), batch_for("llama")
    before = model(**batch)["loss"].item()
    attach(model, Recipe(LoRASB(rank=8)), calibration=[batch], lr=1e-3)
    assert model(**batch)["loss"].item() < before - 1e-3


def test_only_the_core_is_trained_with_two_numbers_of_state_each():
    model, batch = tiny("llama"), batch_for("llama")
    recipe = Recipe(LoRASB(rank=4), eckart.AdamW(weight_decay=0.1))
    handle = attach(model, recipe, calibration=[batch])
    trained = handle.trainable()
    assert all(name.endswith(".core.R") for name in trained)
    optimizer = handle.optimizer(lr=1e-2)
    steps(handle, optimizer, [batch])
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)
    for parameter in trained.values():
        tensors = [t for t in optimizer.state[parameter].values() if torch.is_tensor(t)]
        assert sum(t.numel() for t in tensors if t.ndim == 2) == 2 * 4 * 4


def test_calibration_leaves_no_trace():
    model, batch = tiny("vit").train(), batch_for("vit")
    model.vit.layernorm.eval()
    flags = [m.training for m in model.modules()]
    rng, config = torch.get_rng_state(), model.config.to_dict()
    handle = attach(model, Recipe(LoRASB(rank=4)), calibration=[batch], lr=1e-3)
    assert torch.equal(torch.get_rng_state(), rng)
    handle.remove()
    assert [m.training for m in model.modules()] == flags
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.config.to_dict() == config


def test_groups_of_any_size_give_the_same_gradients():
    model, batches = tiny("llama"), [batch_for("llama", seed=s) for s in range(2)]
    found = []
    for at_a_time in (1, 3, 100):
        sites = sites_of(model)
        gather_gradients(model, sites, batches, at_a_time=at_a_time)
        found.append([site.gradient for site in sites])
    for one, three, all_of_them in zip(*found, strict=True):
        assert torch.equal(one, three) and torch.equal(one, all_of_them)


def test_an_expert_without_tokens_takes_the_bases_of_its_weight():
    G = draw(3, 8, 6)
    G[1] = 0
    site = site_with(G, leading=(3,))
    term = LoRASB(rank=2).build_one(site)["core"]
    assert not term.R[1].any() and term.R[0].any() and term.R[2].any()
    U, _, Vt = truncated_svd(site.weight()[1], 2)
    torch.testing.assert_close(term.B[1] @ term.A[1], U @ Vt, rtol=0, atol=1e-6)


def test_lora_xs_starts_as_published():
    (site,) = find_sites(nn.Linear(9, 7))
    term = LoRASB(rank=3, init="xs").build_one(site)["core"]
    U, s, Vt = torch.linalg.svd(site.weight(), full_matrices=False)
    product = term.B @ term.A
    torch.testing.assert_close(product, U[:, :3] * s[:3] @ Vt[:3], rtol=0, atol=1e-6)
    torch.testing.assert_close(term.B.norm(dim=0), s[:3], rtol=1e-5, atol=0)
    assert 2e-6 < term.R.std() < 3e-5


def test_file_for_peft_is_plain_lora(tmp_path):
    model, handle, batch = carried(LoRASB(rank=4), "llama")
    randomise(handle)
    expected = logits(model, batch)
    peft.save(handle, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 4)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    # fp32, B R multiplied beforehand
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=0, atol=5e-6)


def test_signs_only_where_there_is_a_gradient():
    assert first_update(torch.tensor([-2.0, 0.0, 3.0]), 0.1, "sign").tolist() == pytest.approx(
        [0.1, 0.0, -0.1]
    )


def test_calibration_is_asked_for_by_the_inits_that_use_it():
    with pytest.raises(UsageError, match="lora-sb needs gradients"):
        attach(tiny("llama"), Recipe(LoRASB(rank=4)))
    attach(tiny("llama"), Recipe(LoRASB(rank=4, init="random")))
