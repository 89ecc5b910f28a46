"""What ALLoRA alone promises: rows of the gradient scaled, the layer's input left alone."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd.gradcheck import GradcheckError

import eckart
from eckart import Recipe, attach
from eckart.jobs.lab.candidates import parse_candidate
from eckart.jobs.settings.config import resolve
from eckart.linear import LowRank, low_rank
from eckart.linear.sites import as_matrix
from eckart.methods.update.allora import ALLoRA, row_factor, slowed
from eckart.methods.weights.lora import LoRA
from eckart.optim import LowRankOptimizer
from eckart.recipe.method import Precision
from tests.conftest import ARCHITECTURES, batch_for, cast, randomise, tiny

F64 = torch.float64
M, N, R, ETA = 9, 7, 3, 3.0


def pair(seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(s, generator=g, dtype=F64) for s in ((M, R), (R, N)))


def attached(architecture="llama", dtype=F64, targets=("linear",), **fields):
    model = tiny(architecture, dtype)
    lora = LoRA(rank=4, alpha=4.0, targets=targets)
    handle = attach(model, Recipe(lora, ALLoRA(eta=ETA, **fields)))
    model.to(dtype)
    return model, handle, cast(batch_for(architecture), dtype)


def test_rows_at_zero_have_eta_and_norms_are_those_of_the_product():
    B, A = pair()
    torch.testing.assert_close(
        row_factor(torch.zeros_like(B), A, ETA), torch.full((M,), ETA, dtype=F64), rtol=1e-12,
        atol=0,
    )  # fmt: skip
    wanted = 1 / ((B @ A).norm(dim=1) + 1 / ETA**2).sqrt()  # of the norm, not of its square
    torch.testing.assert_close(row_factor(B, A, ETA), wanted, rtol=1e-10, atol=0)
    far = row_factor(B, A, 1e9)
    torch.testing.assert_close(far, (B @ A).norm(dim=1) ** -0.5, rtol=1e-10, atol=0)
    single = row_factor(B.float(), A.float(), ETA)
    # fp32 sums of r^2 products
    torch.testing.assert_close(single, wanted.float(), rtol=1e-4, atol=0)


def test_tiny_rows_of_bf16_keep_their_norms():
    """|(B A)_i| of 1e-20 has a square below what fp32 holds as a normal number, let alone bf16's
    eight bits of sums; the factor stays finite and near eta."""
    B, A = (t.bfloat16() for t in pair())
    small = row_factor(1e-20 * B, A, ETA)
    assert small.dtype == torch.float32 and small.isfinite().all()
    torch.testing.assert_close(small, torch.full((M,), ETA), rtol=1e-6, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        wide = row_factor(B, A, ETA)
    # the inputs are rounded, the norms are not
    wanted = slowed((B.double() @ A.double()).norm(dim=1), ETA).float()
    torch.testing.assert_close(wide, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_the_gradient_is_that_of_the_matrix_with_its_rows_scaled(architecture):
    """On every kind of layer: Linear, Conv1D, embedding, tied head, convolution, experts."""
    model, handle, batch = attached(architecture, targets=("re:.*",))
    randomise(handle)
    for site in handle.sites.values():
        site.raw.requires_grad_(True)  # its gradient is dL/d(B A)
    model(**batch)["loss"].backward()
    compared = 0
    for path, by_name in handle.terms().items():
        site, term = handle.sites[path], by_name["lora"]
        if site.raw.grad is None:
            continue  # BERT's pooler
        G = as_matrix(site.raw.grad, site.module, site.kind)
        G = row_factor(term.B.detach(), term.A.detach(), ETA).unsqueeze(-1) * G
        torch.testing.assert_close(term.B.grad, G @ term.A.detach().mT, rtol=0, atol=1e-10)
        torch.testing.assert_close(term.A.grad, term.B.detach().mT @ G, rtol=0, atol=1e-10)
        compared += 1
    assert compared >= len(handle.sites) - 1


@pytest.mark.parametrize("back", [False, True])
def test_what_reaches_the_layers_input_is_not_scaled(back):
    B, A = pair()
    term = LowRank(B, A)
    term.branch_gradient = ALLoRA(eta=ETA).branch_gradient()
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, M if back else N, generator=g, dtype=F64, requires_grad=True)
    y = term.back(x) if back else term(x)
    dy = torch.randn(y.shape, generator=g, dtype=F64)
    y.backward(dy)
    plain = x.detach().clone().requires_grad_()
    z = low_rank(plain, B.mT, A.mT) if back else low_rank(plain, A, B)
    z.backward(dy)
    assert torch.equal(y, z)
    torch.testing.assert_close(x.grad, plain.grad, rtol=0, atol=1e-12)


def test_b_still_moves_downhill_and_a_numerical_check_fails():
    B, A = pair()
    term, plain = LowRank(B.clone(), A.clone()), LowRank(B.clone(), A.clone())
    term.branch_gradient = ALLoRA(eta=ETA).branch_gradient()
    x = torch.randn(4, N, generator=torch.Generator().manual_seed(2), dtype=F64)
    for t in (term, plain):
        t(x).square().sum().backward()
    assert (term.B.grad * plain.B.grad).sum() > 0
    x.requires_grad_()
    assert torch.autograd.gradcheck(plain, x) and torch.autograd.gradcheck(term, x)

    def of_A(A):
        return torch.func.functional_call(term, {"A": A}, x)

    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(of_A, A.clone().requires_grad_())


def test_the_factor_is_a_constant():
    """Autograd does not differentiate the factor, in the gradient or in second derivatives."""
    B, A = pair()
    term = LowRank(B, A)
    term.branch_gradient = ALLoRA().branch_gradient()
    x = torch.ones(2, N, dtype=F64)
    (dB,) = torch.autograd.grad(term(x).sum(), term.B, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        dB.sum().backward()


def test_gradient_checkpointing_changes_nothing():
    found = []
    for checkpointing in (False, True):
        model, handle, batch = attached()
        randomise(handle)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**batch)["loss"].backward()
        found.append({n: p.grad for n, p in handle.trainable().items()})
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_under_autocast_gradients_are_those_of_fp32_up_to_bf16():
    grads = []
    for enabled in (False, True):
        model, handle, batch = attached(dtype=torch.float32)
        randomise(handle)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(**batch)["loss"]
        loss.backward()
        found = [p.grad.flatten() for p in handle.trainable().values()]
        grads.append(torch.cat(found))
    # eight bits of mantissa, through a dozen products
    assert (grads[1] - grads[0]).norm() < 0.05 * grads[0].norm()
    assert grads[1].dtype == torch.float32


@pytest.mark.slow
def test_compiled_gradients_are_the_same():
    model, handle, batch = attached(targets=("linear",))
    randomise(handle)
    model(**batch)["loss"].backward()
    wanted = {n: p.grad.clone() for n, p in handle.trainable().items()}
    model.zero_grad()
    torch._dynamo.reset()
    torch.compile(model, backend="aot_eager")(**batch)["loss"].backward()
    for name, p in handle.trainable().items():  # fp64, the same products
        torch.testing.assert_close(p.grad, wanted[name], rtol=0, atol=1e-12)


def test_it_leaves_zero_faster_than_lora_of_scale_one():
    """|B A| after ten steps of SGD, from the same start and on the same batch."""
    sizes = []
    for update in (None, ALLoRA(eta=4.0)):
        model = tiny("llama", F64)
        handle = attach(model, Recipe(LoRA(rank=4, alpha=4.0), update))
        model.to(F64)
        optimizer = LowRankOptimizer(
            list(handle.trainable().items()), lr=0.1, rule=ALLoRA(inner="sgd").plain()
        )
        batch = cast(batch_for("llama"), F64)
        for _ in range(10):
            model(**batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        terms = [t for by_name in handle.terms().values() for t in by_name.values()]
        sizes.append(sum(float(t.dense().detach().norm()) for t in terms))
    assert sizes[1] > 3 * sizes[0]


def by_definition(B, A, grads, lr, apply, wd=0.1):
    """AdamW's steps times a factor per row, which does not apply to decay."""
    p, q = B.clone(), A.clone()
    rows = [slowed(t.norm(dim=1, keepdim=True), ETA) for t in (B, A)]
    moments = [[torch.zeros_like(t), torch.zeros_like(t)] for t in (B, A)]
    for t, (gB, gA) in enumerate(grads, 1):
        factors = [row_factor(p, q, ETA)[:, None], 1.0] if apply == "update" else rows
        moved = []
        for w, g, (mean, square), c in zip((p, q), (gB, gA), moments, factors, strict=True):
            mean.mul_(0.9).add_(0.1 * g)
            square.mul_(0.999).add_(0.001 * g * g)
            step = (mean / (1 - 0.9**t)) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)
            moved.append((1 - lr * wd) * w - lr * c * step)
        p, q = moved
    return p, q


@pytest.mark.parametrize("apply", ["update", "param_row"])
def test_what_other_optimizers_do_under_this_name(apply):
    B, A = pair()
    B = torch.zeros_like(B)
    g = torch.Generator().manual_seed(5)
    grads = [
        (torch.randn(M, R, generator=g, dtype=F64), torch.randn(R, N, generator=g, dtype=F64))
        for _ in range(5)
    ]
    method = ALLoRA(eta=ETA, apply=apply, weight_decay=0.1)
    assert method.branch_gradient() is None
    p, q = nn.Parameter(B.clone()), nn.Parameter(A.clone())
    groups = [{"params": [("B", p), ("A", q)], "pairs": [("B", "A", 1.0)]}]
    optimizer = LowRankOptimizer(groups, lr=0.02, rule=method.rule())
    for p.grad, q.grad in grads:
        optimizer.step()
    wanted = by_definition(B, A, grads, 0.02, apply)
    torch.testing.assert_close(p.detach(), wanted[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(q.detach(), wanted[1], rtol=0, atol=1e-12)
    held = [v for state in optimizer.state.values() for v in state.values()]
    measured = sum(v.numel() for v in held if isinstance(v, torch.Tensor))
    assert measured == method.cost(M, R).state + method.cost(R, N).state


def test_copies_and_pickles_keep_the_rule():
    model, handle, batch = attached()
    randomise(handle)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        names = set(handle.trainable())
        model.zero_grad()
        model(**batch)["loss"].backward()
        other(**batch)["loss"].backward()
        ours = dict(model.named_parameters())
        for name, p in other.named_parameters():
            if name in names:
                assert torch.equal(p.grad, ours[name].grad)


def message(*choices):
    with pytest.raises(eckart.EckartError) as caught:
        Recipe(*choices)
    return str(caught.value)


def test_scale_and_dropout_are_refused():
    assert message(LoRA(rank=8, dropout=0.1), ALLoRA()) == (
        "these two do not combine\n"
        "  update = allora  asks for alpha 8.0, dropout 0.0\n"
        "  weights = lora   has alpha 32.0, dropout 0.1\n"
        "Type weights.alpha=8.0 weights.dropout=0.0."
    )
    stable = message(LoRA(rank=8, alpha=8.0, scaling="rslora"), ALLoRA())
    assert "weights.scaling=lora" in stable
    overrides = ({"match": "layers.0-0", "rank": 2},)
    recipe = Recipe(LoRA(rank=4, alpha=4.0, overrides=overrides), ALLoRA())
    asked = r"combine     .*layers\.0.*\n.*asks for alpha 2\.0"
    with pytest.raises(eckart.EckartError, match=asked):
        attach(tiny("llama"), recipe)


def test_a_precision_with_products_of_its_own_is_refused():
    class Rounded(Precision):
        multiplies = True

    recipe = (LoRA(rank=4, alpha=4.0), ALLoRA(), Rounded())
    assert "has a backward pass of its own" in message(*recipe)
    Recipe(recipe[0], ALLoRA(apply="update"), recipe[2])


def test_the_command_line_sets_what_nobody_spoke_about():
    job = resolve("finetune", "m", "d", ["update=allora", "weights.rank=8"])
    assert (job.choices["weights"].method.alpha, job.choices["weights"].method.dropout) == (
        8.0,
        0.0,
    )
    assert job.settled["weights.alpha"] == "allora asks for it"
    with pytest.raises(eckart.EckartError, match=r"Type weights\.alpha=16\.0\."):
        resolve("finetune", "m", "d", ["update=allora", "weights.alpha=32"])
    bench = resolve("bench", "m", "d")
    one = parse_candidate("lora:rank=4+allora:eta=8", bench)
    assert one.recipe.weights.alpha == 4.0 and one.recipe.update.eta == 8.0


def test_what_is_no_plain_pair_is_refused():
    assert "trains no factor pairs" in message(eckart.Dense(), ALLoRA())
    recipe = Recipe(LoRA(rank=4, alpha=4.0, init="pissa"), ALLoRA())
    model = tiny("llama")
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(eckart.EckartError, match=r"has more than that at .*q_proj"):
        attach(model, recipe)
    assert [name for name, _ in model.named_parameters()] == before
