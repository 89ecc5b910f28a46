"""What Block-LoRA alone promises: that it is a LoRA of rank r / p, step by step."""

import pytest
import torch
from peft import PeftModel
from torch.autograd import gradcheck

from eckart.errors import UsageError
from eckart.io import peft
from eckart.linear import LowRank
from eckart.methods.update.adamw import AdamW
from eckart.methods.weights.block_lora import Arms, BlockLoRA, Grid, Rows, block_diagonal
from eckart.methods.weights.lora import LoRA
from eckart.recipe import Recipe, attach
from tests.conftest import batch_for, randomise, tiny
from tests.laws.matrix import logits, steps
from tests.methods.lawful import assert_lawful, carried, draw

F64 = torch.float64


@pytest.mark.parametrize("form", ["arms", "row", "grid"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma", "mixtral", "vit"])
def test_every_form_keeps_the_laws(form, architecture):
    targets = ("linear", "embedding") if architecture == "gemma" else ("linear",)
    method = BlockLoRA(rank=4, blocks=2, alpha=4.0, form=form, targets=targets)
    assert_lawful(method, architecture)


def trained(method, count=6, clip=None, **update):
    """A tiny model in fp64 after some steps: its update, term by term, and its handle."""
    model = tiny("llama", F64)
    recipe = Recipe(weights=method, update=AdamW(**update))
    handle = attach(model, recipe)
    model.to(F64)
    batches = [batch_for("llama", seed=s) for s in range(count)]
    steps(handle, handle.optimizer(lr=1e-2, clip=clip), batches)
    terms = {path: next(iter(by_name.values())) for path, by_name in handle.terms().items()}
    return {path: term.dense().detach() for path, term in terms.items()}, terms


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_merged_arms_move_as_their_sum_does(decay, clip):
    """LoRA+ of rank r / p: p times the rate, 1/p of the decay, p times the weight in the norm."""
    arms, _ = trained(BlockLoRA(rank=8, blocks=4, form="arms"), weight_decay=decay, clip=clip)
    merged, _ = trained(BlockLoRA(rank=8, blocks=4), weight_decay=decay, clip=clip)
    for path, expected in arms.items():
        assert expected.abs().max() > 1e-3
        # fp64, six steps: p equal arms are summed where one is scaled
        torch.testing.assert_close(merged[path], expected, rtol=0, atol=1e-10)


def test_merged_is_lora_plus_of_the_shared_rank():
    ours, _ = trained(BlockLoRA(rank=8, blocks=4, alpha=16.0))
    theirs, _ = trained(LoRA(rank=2, alpha=4.0, lr_ratio=4.0))  # the same s = 2
    assert all(torch.equal(ours[path], theirs[path]) for path in theirs)


@pytest.mark.parametrize("form", ["merged", "arms"])
def test_one_block_is_lora(form):
    ours, _ = trained(BlockLoRA(rank=4, blocks=1, form=form), clip=0.1)
    theirs, _ = trained(LoRA(rank=4, alpha=16.0), clip=0.1)
    if form == "merged":
        assert all(torch.equal(ours[path], theirs[path]) for path in theirs)
    for path in theirs:  # arms scale B where LoRA scales A x
        torch.testing.assert_close(ours[path], theirs[path], rtol=0, atol=1e-12)


@pytest.mark.parametrize("rate", ["adam", "sgd"])
def test_arms_stay_equal(rate):
    term = Arms(torch.zeros(4, 6, 2, dtype=F64), draw(2, 5), 0.5)
    optimizer = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[rate](term.parameters(), 1e-2)
    x, y = draw(9, 5, seed=1), draw(9, 6, seed=2)
    for _ in range(50):
        optimizer.zero_grad()
        (term(x) - y).square().sum().backward()
        optimizer.step()
    assert term.B.abs().max() > 1e-2
    assert torch.equal(term.B, term.B[:1].expand_as(term.B))


def test_the_update_has_the_rank_of_one_block():
    for form in ("merged", "arms"):
        dense, _ = trained(BlockLoRA(rank=8, blocks=4, form=form))
        # after training: no more than k = 2 singular values above rounding
        assert all(torch.linalg.matrix_rank(d, rtol=1e-10) <= 2 for d in dense.values())
    dense, _ = trained(BlockLoRA(rank=8, blocks=4, form="row"))
    assert max(int(torch.linalg.matrix_rank(d, rtol=1e-10)) for d in dense.values()) == 8
    dense, _ = trained(BlockLoRA(rank=4, blocks=2, form="grid"))
    ranks = [int(torch.linalg.matrix_rank(d, rtol=1e-10)) for d in dense.values()]
    assert max(ranks) == 8 and max(ranks) > 4  # p r


def test_a_grid_of_ones_is_lora():
    B, A, x = draw(6, 3), draw(3, 8, seed=1), draw(5, 8, seed=2)
    blocks = A.unflatten(-1, (2, 4)).transpose(-3, -2)
    grid = Grid(B.unflatten(0, (2, 3)), torch.ones(2, 2, 3, dtype=F64), blocks, 0.5)
    lora = LowRank(B, A, 0.5)
    torch.testing.assert_close(grid(x), lora(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(grid.dense(), lora.dense(), rtol=0, atol=1e-12)


def by_blocks(term):
    """dW block by block, as in the method's docstring."""
    B, A, s = term.B.detach(), term.A.detach(), term.scale
    p = B.shape[0]
    if isinstance(term, Rows):
        return torch.cat([s * B[i] @ A[i] for i in range(p)])
    D = term.D.detach()
    rows = [
        torch.cat([s * B[i] @ D[i, j].diag() @ A[j] for j in range(p)], dim=1) for i in range(p)
    ]
    return torch.cat(rows)


TERMS = {
    "arms": lambda: Arms(draw(3, 6, 2), draw(2, 8, seed=1), 0.5),
    "row": lambda: Rows(draw(2, 3, 2), draw(2, 2, 8, seed=1), 0.5),
    "grid": lambda: Grid(draw(2, 3, 3), draw(2, 2, 3, seed=1), draw(2, 3, 4, seed=2), 0.5),
}


@pytest.mark.parametrize("form", TERMS)
def test_every_form_is_its_formula(form):
    term, x = TERMS[form](), draw(5, 8, seed=3)
    expected = by_blocks(term) if form != "arms" else 0.5 * term.B.detach().sum(0) @ term.A.detach()
    torch.testing.assert_close(term.dense(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(term(x), x @ expected.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(term.back(term(x)), term(x) @ expected, rtol=0, atol=1e-11)
    columns = term.columns(torch.tensor([3, 0]))
    torch.testing.assert_close(columns, expected.T[[3, 0]], rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", TERMS)
def test_gradients_of_every_form(form):
    term, x = TERMS[form](), draw(4, 8, seed=3).requires_grad_()
    names, values = zip(*term.named_parameters(), strict=True)

    def run(x, *tensors):
        return torch.func.functional_call(term, dict(zip(names, tensors, strict=True)), (x,))

    assert gradcheck(run, (x, *values))


def test_block_diagonal_places_the_blocks():
    blocks = draw(3, 2, 4)
    assert torch.equal(block_diagonal(blocks), torch.block_diag(*blocks))
    assert torch.equal(
        block_diagonal(torch.stack([blocks, -blocks]))[1], -torch.block_diag(*blocks)
    )


@pytest.mark.parametrize("form", ["merged", "arms", "row", "grid"])
def test_peft_computes_the_same(form, tmp_path):
    model, handle, batch = carried(BlockLoRA(rank=8, blocks=4, form=form), "llama")
    randomise(handle)
    expected = logits(model, batch)
    peft.save(handle, tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    # fp32, the same products in another order
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=0, atol=5e-6)
    ranks = {"merged": 2, "arms": 2, "row": 8, "grid": 32}
    assert loaded.peft_config["default"].r == ranks[form]


def test_arms_hold_copies_where_the_sum_has_one():
    """Nominal k n + r m numbers, k (m + n) distinct ones."""
    method = BlockLoRA(rank=8, blocks=4, form="arms")
    assert method.cost(30, 20).parameters == 2 * 20 + 8 * 30
    assert BlockLoRA(rank=8, blocks=4).cost(30, 20).parameters == 2 * (20 + 30)


def test_blocks_must_divide():
    with pytest.raises(UsageError, match=r"blocks must divide rank(.|\n)*rank=8"):
        BlockLoRA(rank=6, blocks=4)
    with pytest.raises(UsageError, match="one number of blocks"):
        BlockLoRA(rank=8, blocks=4, overrides=({"match": "attn", "blocks": 2},))
    BlockLoRA(rank=8, blocks=4, form="arms", overrides=({"match": "attn", "blocks": 2},))
    with pytest.raises(UsageError, match=r"divide the map(.|\n)*32 x 32"):
        attach(tiny("llama"), Recipe(weights=BlockLoRA(rank=5, blocks=5, form="grid")))
